"""Training one task and scoring tasks.

Every random choice comes from a generator seeded by (seed, task number, step), so that a run which was stopped goes on
to the same numbers, bitwise on the CPU.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from tqdm import tqdm

from reference.config import Config
from reference.data.tasks import Split, Task
from reference.errors import ExperimentError
from reference.training.clip import Clip

SMALLEST_CROP = 0.9  # share of the image's area, as in CLIP's own training
EVALUATION_BATCH = 64

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Look = Callable[[Tensor, Tensor, Tensor], object]
Vectors = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One finished step: its number, loss, learning rate, and seconds without the preparation of the batch."""

    number: int
    loss: float
    rate: float
    seconds: float


@dataclass(frozen=True)
class Batch:
    """Data of one training step.

    `images` `[n, 3, s, s]` are normalised, on the model's device; `labels` `[n]`; `tokens` `[classes, context]` are the
    task's prompts; `task` and `step` are numbers from 0; `index` `[n]` holds the numbers of the task's training images.
    """

    images: Tensor
    labels: Tensor
    tokens: Tensor
    task: int
    step: int
    index: Tensor


@dataclass(frozen=True)
class Schedule:
    """Steps of one task and the learning rate of each: linear warm-up, then cosine towards zero.

    `done` steps of `total` lie before the first one where the task is a part of a longer schedule.
    """

    iterations: int
    rate: float
    warmup: int
    done: int = 0
    total: int | None = None

    def at(self, step: int) -> float:
        """Learning rate of `step`."""
        step, total = step + self.done, self.total or self.iterations
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, total - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class Learner:
    """Model, optimizer and objective of one training; a method has the same parts with more behind them."""

    clip: Clip
    optimizer: Optimizer
    objective: Loss

    def loss(self, batch: Batch) -> Tensor:
        """The scalar that is minimised."""
        return self.objective(batch.images, batch.labels, batch.tokens)

    def set_rate(self, rate: float) -> None:
        """Take this learning rate for the next step."""
        set_rate(self.optimizer, rate)

    def after_step(self, batch: Batch) -> None:
        """Act after `optimizer.step()`."""


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group of `optimizer` the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose seed is a digest of `numbers`."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def attention(clip: Clip) -> AbstractContextManager[object]:
    """Attention on a CPU runs as plain matrix products inside this context; on a GPU nothing is changed.

    torch's flash kernel on a CPU takes 1.6 times as long per training step in bfloat16 (mini-clip, 65 tokens), most of
    it in the backward pass. What is computed again in the backward pass must find the same kernel.
    """
    return sdpa_kernel(SDPBackend.MATH) if clip.device.type == "cpu" else nullcontext()


@contextmanager
def precision(clip: Clip, config: Config) -> Iterator[None]:
    """Forward passes in the precision of `config`, with its kernels of attention."""
    half = config.precision == "bfloat16"
    with torch.autocast(clip.device.type, dtype=torch.bfloat16, enabled=half), attention(clip):
        yield


def uniform(config: Config) -> Schedule:
    """The schedule that the settings name, the same for every task."""
    return Schedule(config.iterations, config.learning_rate, config.warmup)


def train(clip: Clip, optimizer: Optimizer, task: Task, config: Config, loss: Loss, seed: int, number: int = 0) -> None:
    """Train `task` (the `number`-th) with `optimizer` on `loss(images, labels, tokens)`.

    Raises:
        ExperimentError: the loss is no longer finite.
    """
    learn(Learner(clip, optimizer, loss), task, config, uniform(config), seed, number)


def learn(
    learner: Learner,
    task: Task,
    config: Config,
    schedule: Schedule,
    seed: int,
    number: int = 0,
    first_step: int = 0,
    after_step: Callable[[Step], None] | None = None,
    smallest_crop: float = SMALLEST_CROP,
) -> None:
    """Let `learner` train `task` (the `number`-th) from `first_step` on.

    `after_step` is called after each step and may raise to stop.

    Raises:
        ExperimentError: the loss is no longer finite.
    """
    clip = learner.clip
    tokens = clip.tokens(task.prompts())
    order = shuffled_passes(len(task.train), schedule.iterations, config.batch_size, seeded(seed, number))
    clip.train()
    bar = tqdm(
        range(first_step, schedule.iterations), desc=f"train {task.name}", leave=False, disable=None,
        initial=first_step, total=schedule.iterations,
    )  # fmt: skip
    for step in bar:
        rate = schedule.at(step)
        learner.set_rate(rate)
        images = clip.normalised(crop(task.train.images[order[step]], seeded(seed, number, step), smallest_crop))
        batch = Batch(images, task.train.labels[order[step]], tokens, number, step, order[step])
        started = time.perf_counter()
        loss = _one_step(learner, batch, config)
        bar.set_postfix(loss=f"{loss:.3f}")
        if not math.isfinite(loss):
            raise ExperimentError(f"task {task.name}, step {step}: the loss is {loss}; lower learning_rate")
        if after_step is not None:
            after_step(Step(step, loss, rate, time.perf_counter() - started))


def _one_step(learner: Learner, batch: Batch, config: Config) -> float:
    with attention(learner.clip):
        with precision(learner.clip, config):
            value = learner.loss(batch)
        learner.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
    learner.optimizer.step()
    learner.after_step(batch)
    return value.item()


def crop(images: Tensor, generator: torch.Generator, smallest: float = SMALLEST_CROP) -> Tensor:
    """Random square crops of at least the share `smallest` of the area, resized bilinearly: uint8 `[n, 3, s, s]`."""
    draw = torch.rand(len(images), 3, generator=generator)
    side = (smallest + (1 - smallest) * draw[:, 0]).sqrt()
    shift = (2 * draw[:, 1:] - 1) * (1 - side)[:, None]
    window = torch.cat([torch.diag_embed(side[:, None].expand(-1, 2)), shift[:, :, None]], dim=2)
    grid = F.affine_grid(window, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


@dataclass(frozen=True)
class Batches:
    """The images of `split` in order, normalised `[n, 3, s, s]`, with class numbers `[n]`; made when asked for."""

    clip: Clip
    split: Split
    size: int = EVALUATION_BATCH

    def __len__(self) -> int:
        return -(-len(self.split) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.split), self.size):
            part = slice(first, first + self.size)
            yield self.clip.normalised(self.split.images[part]), self.split.labels[part]


def evaluate(clip: Clip, task: Task, config: Config) -> float:
    """Accuracy in percent over the classes of `task`, on (a fixed draw of) its test images."""
    (correct,) = scores(clip, task, config, (1 if config.evaluation_templates == "first" else len(task.templates),))
    return accuracy(correct)


def accuracy(correct: Tensor) -> float:
    """Percent of the booleans `[n]` that are true."""
    return 100.0 * int(correct.sum()) / len(correct)


@torch.no_grad()
def scores(
    clip: Clip,
    task: Task,
    config: Config,
    templates: tuple[int, ...],
    look: Look | None = None,
    vectors: Vectors = lambda classes: classes,
) -> list[Tensor]:
    """Test images that are classified rightly, booleans `[n]`, once for each number of templates in `templates`.

    A class is what `vectors` makes of the mean of its first so many prompts' features; all share one pass over the
    images. `look` is shown unit features `[n, e]`, labels `[n]` and the class vectors `[c, e]` of the first number of
    templates.
    """
    clip.model.eval()
    found: list[list[Tensor]] = [[] for _ in templates]
    split, seen = task.test.drawn(config.evaluation_images, seed=0), list[Tensor]()
    with precision(clip, config):
        classes = [vectors(class_vectors(clip, task, count)) for count in templates]
        for images, labels in Batches(clip, split):
            seen.append(clip.model.encode_image(images, normalize=True).float())  # type: ignore[operator]
            for known, correct in zip(classes, found):
                correct.append((seen[-1] @ known.T).argmax(dim=1).cpu() == labels)
    if look is not None:
        look(torch.cat(seen), split.labels, classes[0])
    return [torch.cat(correct) for correct in found]


def class_vectors(clip: Clip, task: Task, templates: int) -> Tensor:
    """One unit vector per class, `[classes, d]`: normalised text features, averaged over the templates, normalised."""
    features = [
        clip.model.encode_text(clip.tokens(task.prompts(k)), normalize=True).float()  # type: ignore[operator]
        for k in range(templates)
    ]
    return F.normalize(torch.stack(features).mean(dim=0), dim=-1)


def shuffled_passes(images: int, steps: int, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Image numbers of each step's batch: shuffled passes over the data, one after another."""
    needed = steps * batch
    passes = [torch.randperm(images, generator=generator) for _ in range(-(-needed // images))]
    return list(torch.cat(passes)[:needed].view(steps, batch))
