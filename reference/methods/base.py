"""Base class of the methods: what happens before, during and after a task.

A method owns the model's optimizer for the whole sequence; the base optimizer starts afresh with each task. The order
of calls is `before_sequence`, then for each task `before_task`, steps of (`set_rate`, `loss`, `optimizer.step`,
`after_step`), `after_task`; `evaluating` stands around the scoring of every task. A run that was stopped calls
`load_state` instead of what lies behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from reference.config import Config
from reference.data.folders import ReferencePool
from reference.data.tasks import Task
from reference.errors import ExperimentError
from reference.training.clip import Clip, classification_loss
from reference.training.steps import Batch, Schedule, crop, set_rate, uniform

LAYERS = {
    "all": ".*",
    "vision": r"visual\..*",
    "gnsp": r"visual\.(transformer\.resblocks\.\d+\.mlp\.c_(fc|proj)\.weight|proj)",
    "pooling": r"visual\.(attn_?pool\..*|transformer\.resblocks\.LAST\.attn\..*|proj)",
}


@dataclass(frozen=True)
class Setting:
    """Arguments of a method: the pretrained model (its own copy), the settings, the tasks in order, the pool, a seed.

    A method uses of `tasks` only the tasks up to the one at work; `joint` alone looks ahead, and says so.
    """

    clip: Clip
    config: Config
    tasks: Sequence[Task]
    pool: ReferencePool | None
    seed: int


class Method:
    """Plain AdamW on every parameter except `logit_scale`; a child says what it does otherwise.

    Class attributes:
        name: as given to `--methods`.
        trains: False if the model never changes.
        needs_reference: the reference pool must be there.
        scored: which tasks are scored after a task: `all`; `own`, the task just trained, while the others keep the
            scores they had (separate models); `end`, all of them, but after the last task only.
        evaluations: ways of scoring; the first is the accuracy matrix, the others are stored beside it.
        layers: what trains, a key of `LAYERS`; None: as the settings say.
        saved: attributes that a stopped run needs to go on, beside model and optimizer: tensors and plain values only.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    scored: ClassVar[Literal["all", "own", "end"]] = "all"
    evaluations: ClassVar[tuple[str, ...]] = ("task known",)
    layers: ClassVar[str | None] = None
    saved: ClassVar[tuple[str, ...]] = ()

    def __init__(self, setting: Setting) -> None:
        self.setting, self.clip, self.config = setting, setting.clip, setting.config
        train_only(self.clip.model, self.layers or self.config.layers, self.name)
        self.optimizer: Optimizer = self.make_optimizer()

    def make_optimizer(self) -> Optimizer:
        """The optimizer whose `step` is called."""
        trained = [parameter for parameter in self.clip.model.parameters() if parameter.requires_grad]
        return AdamW(trained, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True)

    def before_sequence(self) -> dict[str, Any]:
        """Act on the pretrained model before the first task; returns facts for the log."""
        return {}

    def before_task(self, number: int) -> None:
        """Forget moments and step counts of the previous task."""
        self.optimizer.state.clear()

    def schedule(self, number: int) -> Schedule:
        """Steps and learning rates of task `number`."""
        return uniform(self.config)

    def set_rate(self, rate: float) -> None:
        """Take `rate` for the next step."""
        set_rate(self.optimizer, rate)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy over the classes of the task, label smoothing as in ZSCL; scalar."""
        smoothing = self.config.label_smoothing
        return classification_loss(self.clip.model, batch.images, batch.labels, batch.tokens, smoothing)

    def loss_on(self, task: Task, index: Tensor, draw: Generator) -> Tensor:
        """The same loss on the training images `index` `[n]` of `task`, cropped by `draw`."""
        images, tokens = self.clip.normalised(crop(task.train.images[index], draw)), self.clip.tokens(task.prompts())
        smoothing = self.config.label_smoothing
        return classification_loss(self.clip.model, images, task.train.labels[index], tokens, smoothing)

    def after_step(self, batch: Batch) -> None:
        """Act after the optimizer's step."""

    def after_task(self, number: int) -> dict[str, Any]:
        """Act on the finished task; returns facts for the log."""
        return {}

    def class_vectors(self, evaluation: str, task: Task, vectors: Tensor) -> Tensor:
        """The vectors `[c, e]` by which `task` is scored in the way `evaluation`, given those of its prompts."""
        return vectors

    def evaluating(self, evaluation: str, task: Task) -> AbstractContextManager[object]:
        """The state in which the model is while `task` is scored in the way `evaluation`."""
        return nullcontext()

    def without_task(self) -> AbstractContextManager[object]:
        """The state in which the model looks at inputs of no task, such as the pool."""
        return nullcontext()

    def trained_parameters(self) -> int:
        """Count of the numbers that the optimizer may change in the task at work."""
        groups = self.optimizer.param_groups
        return sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)

    def facts(self) -> dict[str, Any]:
        """Figures of the method's own for `results.json` (plain numbers, strings, lists)."""
        return {}

    def state(self) -> dict[str, Any]:
        """Model, optimizer and the attributes `saved`."""
        own = {name: getattr(self, name) for name in self.saved}
        return {"model": self.clip.model.state_dict(), "optimizer": self.optimizer.state_dict(), **own}

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take up what `state` returned during task `number`."""
        self.clip.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.saved:
            setattr(self, name, state[name])


def train_only(model: nn.Module, layers: str, method: str) -> None:
    """Fix every parameter of `model` that does not belong to `layers`, a key of `LAYERS`; `method` is for the error.

    Raises:
        ExperimentError: the model has no such parameters.
    """
    named = dict(model.named_parameters())
    blocks = re.findall(r"visual\.transformer\.resblocks\.(\d+)\.", " ".join(named))
    chosen = LAYERS[layers].replace("LAST", max(blocks, key=int, default=""))
    for name, parameter in named.items():
        if not re.fullmatch(chosen, name):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ExperimentError(
            f"{method}: layers={layers} names parameters of an open_clip image tower (visual.*), the model has none; "
            "take layers=all, another method or another --model"
        )
