"""What the speed benchmarks train: an open_clip CLIP with random weights, random images and prompts, CLIP's loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from nullspace_optim import Basis, NullSpaceWarning, Policy, Spectrum

SMALLEST = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Share(Policy):
    """Protect `share` of all directions with the first task, whatever energy they hold, then `growth` more a task."""

    share: float
    growth: int = 0

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many directions to take."""
        return self.growth if spectrum.kept else round(self.share * spectrum.size)


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
    built: nn.Module = model.float().to(device).train()
    return built


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


def contrastive_loss(model: Any, batch: Batch) -> Tensor:
    """CLIP's own training loss over the batch; scalar."""
    images, texts, scale = model(batch.images, batch.tokens)[:3]
    logits = (scale * images @ texts.T).float()
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def shrink(bases: Mapping[str, Basis], share: float) -> None:
    """Keep of every basis its leading `share` of all directions; to be called before the first protected step.

    One eigen-decomposition then serves a whole curve over ranks.
    """
    for basis in bases.values():
        for side, subspace in basis.subspaces.items():
            if side == "rows":
                continue
            rank = round(share * subspace.size)
            anchor = subspace.anchor[:, :, :rank] if side == "right" else subspace.anchor[:, :rank]
            basis.subspaces[side] = replace(
                subspace,
                basis=subspace.basis[:, :, :rank].contiguous(),
                anchor=anchor.contiguous(),
                ranks=tuple(min(rank, old) for old in subspace.ranks),
            )
