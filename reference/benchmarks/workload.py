"""Workload of the speed benchmarks, and their clocks.

An open_clip CLIP with random weights, random images and prompts, CLIP's loss. Runs that are compared take turns in one
process, so that a slow moment of the machine meets both alike (which `torch.utils.benchmark.Timer` cannot).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nullspace_optim import NullSpaceOptimizer, SketchedCovariance, clip_forward
from nullspace_optim.errors import NullSpaceWarning
from nullspace_optim.policies import FixedRank, Policy, Spectrum

Run = Callable[[], object]
SMALLEST = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Share(Policy):
    """Protect `share` of all directions with the first task, whatever energy they hold, then no more."""

    share: float

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many directions to take."""
        return 0 if spectrum.kept else round(self.share * spectrum.size)


class Still(Optimizer):
    """A base optimizer that moves nothing: all that remains of a protected step is the protection itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's warnings about capacity: benchmarks fill bases on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullSpaceWarning)
        yield


@dataclass(frozen=True)
class Batch:
    """Images `[n, 3, s, s]` and as many prompts `[n, context]`."""

    images: Tensor
    tokens: Tensor


def build(name: str, blocks: int | None, device: torch.device) -> nn.Module:
    """The open_clip model `name` (`tiny`: one block of width 64 a tower) with random weights and its first `blocks`."""
    torch.manual_seed(0)
    if name == "tiny":
        model: Any = open_clip.CLIP(**SMALLEST)
    else:
        model = open_clip.create_model(name, pretrained_hf=False)
    if blocks is not None:
        for tower in (model.visual.transformer, model.transformer):
            tower.resblocks = tower.resblocks[:blocks]
    return model.float().to(device).train()


def random_batch(model: Any, size: int, device: torch.device, seed: int = 0) -> Batch:
    """Noise of the model's image size, and prompts of random words whose end stands in the middle on average."""
    draw = torch.Generator().manual_seed(seed)
    height, width = model.visual.image_size
    length, words = model.context_length, model.vocab_size
    tokens = torch.randint(1, words - 1, (size, length), generator=draw)
    ends = torch.randint(2, length, (size, 1), generator=draw)
    place = torch.arange(length)
    tokens = torch.where(place < ends, tokens, torch.where(place == ends, words - 1, 0))
    return Batch(torch.randn(size, 3, height, width, generator=draw).to(device), tokens.to(device))


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight of `model` that is multiplied with rows of inputs, by name."""
    return {name: w for name, w in model.named_parameters() if w.ndim > 1 and "embedding" not in name}


def protected_at_random(base: Optimizer, model: Any, precision: str = "exact") -> NullSpaceOptimizer:
    """Protect one direction of every matrix that `base` moves; `fill` makes them any number."""
    device = next(iter(model.parameters())).device
    sketch = SketchedCovariance(size=4, above=4)
    optimizer = NullSpaceOptimizer(
        base, model, policy=FixedRank(1), project="update", precision=precision, rows="all",
        covariance=sketch,  # type: ignore[arg-type]
    )  # fmt: skip
    batch = random_batch(model, 1, device, seed=1)
    with quiet():
        optimizer.consolidate([batch.images], name="task", forward=clip_forward(model, batch.tokens), progress=False)
    return optimizer


def fill(optimizer: NullSpaceOptimizer, share: float) -> None:
    """Put random directions, a `share` of all, in the place of every basis: a curve over ranks without eigenvectors."""
    draws: dict[tuple[int, int], Tensor] = {}
    optimizer._core.protection.make_exact()  # nothing is owed to the bases that go
    for basis in optimizer.bases.values():
        for side, subspace in basis.subspaces.items():
            if side == "rows":
                continue
            rank, groups, size = max(1, round(share * subspace.size)), len(subspace.ranks), subspace.size
            if (size, rank) not in draws:
                draw = torch.randn(size, rank, generator=torch.Generator().manual_seed(size))
                draws[size, rank] = torch.linalg.qr(draw.to(subspace.basis.device))[0]
            directions = draws[size, rank].expand(groups, -1, -1).clone()
            basis.subspaces[side] = replace(subspace, basis=directions, ranks=(rank,) * groups)
    optimizer.reanchor()


def seconds(run: Run, device: torch.device) -> float:
    """Seconds that `run` takes, work that it queued on `device` included."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Return when all queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(runs: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run, A B A B ..., `repeats` times, after one turn that does not count."""
    turns = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in runs}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of neighbouring runs."""
    return median(a / b for a, b in zip(over, under, strict=True))
