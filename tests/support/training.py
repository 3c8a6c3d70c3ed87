"""A small network, a wrapper around AdamW, a training loop, and how far a tensor is from what it was."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nullspace_optim import NullSpaceOptimizer, NumericalRank

OLD = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))


def mlp(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return linear layers with tanh between them, from 24 inputs over 16 to 8 outputs unless told otherwise."""
    layers = [part for sizes in pairwise(widths or (24, 16, 8)) for part in (nn.Linear(*sizes), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def wrap(model: nn.Module, base: Optimizer | None = None, **options: Any) -> NullSpaceOptimizer:
    """Wrap `base`, or AdamW with a large decay; rows are kept exactly unless a policy is given."""
    base = base or AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return NullSpaceOptimizer(base, model, **{"policy": NumericalRank(), **options})


def train(
    optimizer: Optimizer, model: nn.Module, steps: int = 10, inputs: Any = NEW, targets: Tensor | float = 1.0
) -> float:
    """Take full-batch steps on the mean squared error; return the loss before the last one."""
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).abs().square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def relative_drift(now: Tensor, then: Tensor) -> float:
    """Return `||now - then|| / ||then||` in double precision, also of complex tensors."""
    wide = torch.promote_types(then.dtype, torch.float64)
    now, then = now.detach().to(wide), then.detach().to(wide)
    return float((now - then).norm() / then.norm())
