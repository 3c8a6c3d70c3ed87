"""A wrapper around a base optimizer and a small task."""

from __future__ import annotations

from typing import Any

from cases import Setting
from torch.optim import Optimizer

from nullspace_optim import NullSpaceOptimizer, NumericalRank


def wrap(
    base: Optimizer | list[Optimizer], task: Setting, consolidated: bool = True, **options: Any
) -> NullSpaceOptimizer:
    """Wrap `base`, with the old task consolidated exactly unless told otherwise."""
    optimizer = NullSpaceOptimizer(base, task.model, policy=NumericalRank(), **options)
    if consolidated:
        optimizer.consolidate([task.old], progress=False)
    return optimizer
