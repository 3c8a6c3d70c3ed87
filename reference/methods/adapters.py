"""Adapters: a module beside every block's MLP, the selector of the task of an input, and their methods' base class.

The places are those of MoE-Adapters4CL (Yu et al., 2024): all blocks of both towers, parallel to the MLP. Inputs of
unknown task are given to the nearest task by the frozen backbone's features, image by image and prompt by prompt
(MoE-Adapters4CL's own selector, DDAS, needs an AlexNet and decides for a batch at once).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.data.tasks import Task
from reference.methods.base import Method
from reference.training.clip import Clip, replaced
from reference.training.steps import Batches

TASK_KNOWN, TASK_UNKNOWN = "task known", "task unknown"
PLAIN = -1
OUTLIER = 3.0  # standard deviations of the distance to a task's centre beyond which an input belongs to no task


@dataclass
class Routing:
    """The task whose adapters are used: a number, one number a sample `[n]`, or PLAIN for none.

    `counting` is true while the experts that a step chooses are counted; a forward pass that is computed a second time
    for the backward pass (gradient checkpointing) is not.
    """

    task: int | Tensor = PLAIN
    counting: bool = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is chosen inside this context."""
        self.counting = True
        try:
            yield
        finally:
            self.counting = False


class Beside:
    """Hooks of one block: the adapter reads what the MLP reads, or what the LayerNorm before it reads, and adds."""

    def __init__(self, block: Any, adapter: nn.Module, normalised: bool) -> None:
        self.adapter = adapter
        self.seen: Tensor | None = None  # one place: a forward pass that is computed again may stop half way
        source = block.mlp if normalised else block.ln_2
        source.register_forward_pre_hook(self._read)
        block.mlp.register_forward_hook(self._add)

    def _read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = args[0]

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen, self.seen = self.seen, None
        return output + self.adapter(seen)  # type: ignore[no-any-return]


def put_beside(model: nn.Module, make: Callable[[int], nn.Module], normalised: bool = True) -> list[nn.Module]:
    """Put `make(width)` beside every block's MLP of an open_clip model, as its child `adapter`; the rest is frozen.

    Without `normalised` the adapter reads what the block's second LayerNorm reads.
    """
    model.requires_grad_(False)
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "mlp") and hasattr(module, "ln_2")]
    for block in blocks:
        block.adapter = make(len(block.ln_2.weight)).to(block.ln_2.weight.device)
        Beside(block, block.adapter, normalised)
    return [block.adapter for block in blocks]


@dataclass
class Centres:
    """Mean feature of every finished task in one tower and how far its own samples lie from it (cosine distance)."""

    means: list[Tensor] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def add(self, features: Tensor) -> None:
        """Add a task with the unit features `[n, e]`."""
        mean = F.normalize(features.mean(dim=0), dim=0)
        distances = 1 - features @ mean
        self.means.append(mean)
        spread = max(float(distances.std(unbiased=False)), 0.1 * float(distances.mean()))
        self.limits.append(float(distances.mean()) + OUTLIER * spread)

    def nearest(self, features: Tensor) -> Tensor:
        """The number of the nearest task for each of `[n, e]`, PLAIN where all are too far away; `[n]`."""
        if not self.means:
            return torch.full((len(features),), PLAIN, device=features.device)
        distance, task = (1 - features @ torch.stack(self.means).T).min(dim=1)
        limits = torch.tensor(self.limits, device=features.device)
        return torch.where(distance <= limits[task], task, torch.full_like(task, PLAIN))


class Selector:
    """Finds the task of inputs by the frozen backbone's features, in both towers."""

    def __init__(self, clip: Clip, routing: Routing) -> None:
        self.clip, self.routing = clip, routing
        self.centres = {"encode_image": Centres(), "encode_text": Centres()}

    @torch.no_grad()
    def learn(self, images: Batches, tokens: Tensor) -> None:
        """Remember a finished task by its images and prompts."""
        with self.using(PLAIN):
            self.centres["encode_image"].add(torch.cat([self._features("encode_image", batch) for batch, _ in images]))
            self.centres["encode_text"].add(self._features("encode_text", tokens))

    def _features(self, tower: str, inputs: Tensor) -> Tensor:
        return getattr(self.clip.model, tower)(inputs, normalize=True).float()

    @contextmanager
    def using(self, task: int | Tensor) -> Iterator[None]:
        """Route for `task` inside this context."""
        before, self.routing.task = self.routing.task, task
        try:
            yield
        finally:
            self.routing.task = before

    def guessing(self) -> AbstractContextManager[None]:
        """Let every image and prompt find its own task inside this context."""
        model = self.clip.model
        return replaced(model, **{tower: self._guessed(tower, getattr(model, tower)) for tower in self.centres})

    def _guessed(self, tower: str, encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(inputs: Tensor, normalize: bool = False) -> Tensor:
            with self.using(PLAIN):
                features = encode(inputs, normalize=True).float()
            with self.using(self.centres[tower].nearest(features)):
                return encode(inputs, normalize=normalize)

        return run

    @property
    def parameters(self) -> int:
        """Count of the numbers it keeps."""
        return sum(mean.numel() + 1 for centres in self.centres.values() for mean in centres.means)

    def state(self) -> dict[str, Any]:
        """Centres of finished tasks."""
        return {tower: vars(centres) for tower, centres in self.centres.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        self.centres = {tower: Centres(**known) for tower, known in state.items()}


class AdaptersOfTasks(Method):
    """Base class of methods with one adapter per task: `put_adapters` places modules, `at_work` chooses what trains.

    Without a task's name each image and each prompt is given to the nearest task by the backbone's features.
    """

    evaluations = (TASK_KNOWN, TASK_UNKNOWN)
    saved = ("names",)

    def make_optimizer(self) -> Optimizer:
        """AdamW on what `put_adapters` leaves trainable."""
        torch.manual_seed(self.setting.seed)
        self.routing = Routing()
        self.selector = Selector(self.clip, self.routing)
        self.names: list[str] = []
        self.put_adapters()
        return super().make_optimizer()

    def put_adapters(self) -> None:
        """Put modules beside the blocks; they read `self.routing`."""
        raise NotImplementedError

    def at_work(self, number: int, resumed: bool = False) -> None:
        """Let the parameters of task `number` alone be trainable."""
        raise NotImplementedError

    def before_task(self, number: int) -> None:
        """Begin with fresh moments and what belongs to task `number`."""
        super().before_task(number)
        self.routing.task = number
        self.at_work(number)

    def after_task(self, number: int) -> dict[str, Any]:
        """Remember what the task's images and prompts look like."""
        task = self.setting.tasks[number]
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        self.clip.model.eval()
        self.selector.learn(Batches(self.clip, drawn), self.clip.tokens(task.prompts()))
        self.names.append(task.name)
        return {}

    def evaluating(self, evaluation: str, task: Task) -> AbstractContextManager[object]:
        """Route for `task`, or for the nearest task of each input."""
        if evaluation == TASK_UNKNOWN:
            return self.without_task()
        return self.selector.using(self.names.index(task.name) if task.name in self.names else PLAIN)

    def without_task(self) -> AbstractContextManager[object]:
        """Route each input for the nearest task, or for none."""
        return self.selector.guessing()

    def state(self) -> dict[str, Any]:
        """The model, the optimizer, and what is known of finished tasks."""
        return {**super().state(), "selector": self.selector.state()}

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take it up again."""
        super().load_state(state, number)
        self.selector.load_state(state["selector"])
        if number < len(self.setting.tasks):
            self.routing.task = number
            self.at_work(number, resumed=True)
