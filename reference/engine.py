"""Training one task and scoring tasks.

Every random choice comes from a generator seeded by (seed, task number, step), so that a run which was stopped goes on
to the same numbers, bitwise on the CPU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from tqdm import tqdm

from reference.clip import Clip
from reference.config import Config
from reference.errors import ExperimentError
from reference.tasks import Split, Task

SMALLEST_CROP = 0.9  # share of the image's area, as in CLIP's own training
EVALUATION_BATCH = 64

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose seed is a digest of `numbers`."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def precision(clip: Clip, config: Config) -> Iterator[None]:
    """Forward passes in the precision of `config`.

    On a CPU attention runs as plain matrix products: torch's flash kernel there takes 1.6 times as long per training
    step in bfloat16 (mini-clip, 65 tokens), most of it in the backward pass.
    """
    half = config.precision == "bfloat16"
    products = sdpa_kernel(SDPBackend.MATH) if clip.device.type == "cpu" else nullcontext()
    with torch.autocast(clip.device.type, dtype=torch.bfloat16, enabled=half), products:
        yield


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up over `config.warmup` steps, then cosine towards zero at `config.iterations`."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.iterations - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def train(
    clip: Clip,
    optimizer: Optimizer,
    task: Task,
    config: Config,
    loss: Loss,
    seed: int,
    number: int = 0,
    first_step: int = 0,
    after_step: Callable[[int, float, float], None] | None = None,
) -> None:
    """Train `task` (the `number`-th) from `first_step` on; `after_step(step, loss, rate)` may raise to stop.

    Raises:
        ExperimentError: the loss is no longer finite.
    """
    tokens = clip.tokens(task.prompts())
    order = _order(len(task.train), config, seeded(seed, number))
    clip.model.train()
    bar = tqdm(range(first_step, config.iterations), desc=f"train {task.name}", leave=False, disable=None)
    for step in bar:
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = clip.normalised(crop(task.train.images[order[step]], seeded(seed, number, step)))
        with precision(clip, config):
            value = loss(images, task.train.labels[order[step]], tokens)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        number_of_loss = value.item()
        bar.set_postfix(loss=f"{number_of_loss:.3f}")
        if not math.isfinite(number_of_loss):
            raise ExperimentError(f"task {task.name}, step {step}: the loss is {number_of_loss}; lower learning_rate")
        if after_step is not None:
            after_step(step, number_of_loss, rate)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random square crops of at least 90 % of the area, resized bilinearly to the same size: uint8 `[n, 3, s, s]`."""
    draw = torch.rand(len(images), 3, generator=generator)
    side = (SMALLEST_CROP + (1 - SMALLEST_CROP) * draw[:, 0]).sqrt()
    shift = (2 * draw[:, 1:] - 1) * (1 - side)[:, None]
    window = torch.cat([torch.diag_embed(side[:, None].expand(-1, 2)), shift[:, :, None]], dim=2)
    grid = F.affine_grid(window, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


def batches(clip: Clip, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of `split` in order, normalised `[n, 3, s, s]`, with their class numbers `[n]`."""
    for first in range(0, len(split), EVALUATION_BATCH):
        part = slice(first, first + EVALUATION_BATCH)
        yield clip.normalised(split.images[part]), split.labels[part]


@torch.no_grad()
def evaluate(clip: Clip, task: Task, config: Config) -> float:
    """Accuracy in percent over the classes of `task`, on (a fixed draw of) its test images."""
    clip.model.eval()
    correct = 0
    split = task.test.drawn(config.evaluation_images, seed=0)
    with precision(clip, config):
        classes = _class_vectors(clip, task, config)
        for images, labels in batches(clip, split):
            features = clip.model.encode_image(images, normalize=True).float()  # type: ignore[operator]
            correct += int(((features @ classes.T).argmax(dim=1).cpu() == labels).sum())
    return 100.0 * correct / len(split)


def _class_vectors(clip: Clip, task: Task, config: Config) -> Tensor:
    """One unit vector per class, `[classes, d]`: normalised text features, averaged over the templates, normalised."""
    templates = len(task.templates) if config.evaluation_templates == "all" else 1
    features = [
        clip.model.encode_text(clip.tokens(task.prompts(k)), normalize=True).float()  # type: ignore[operator]
        for k in range(templates)
    ]
    return F.normalize(torch.stack(features).mean(dim=0), dim=-1)


def _order(images: int, config: Config, generator: torch.Generator) -> list[Tensor]:
    """Image numbers of each step's batch: shuffled passes over the data, one after another."""
    needed = config.iterations * config.batch_size
    passes = [torch.randperm(images, generator=generator) for _ in range(-(-needed // images))]
    return list(torch.cat(passes)[:needed].view(config.iterations, config.batch_size))
