"""A capture of any module, and the sums it must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nullspace_optim.capture.capture import Capture
from nullspace_optim.settings import Settings


def capture(module: nn.Module, *batches: Any, run: Callable[[Any], Any] | None = None, **options: Any) -> Capture:
    """Run `module` on every batch under a capture with all rows, unless told otherwise."""
    observer = Capture(
        dict(module.named_parameters()),
        Settings(**{"rows": "all", **options}),
        buffers=dict(module.named_buffers()),
    )
    with observer:
        for batch in batches:
            observer.batch(lambda batch=batch: (run or module)(batch))
    return observer


def gram(rows: Tensor) -> Tensor:
    """`[..., s]` -> `[s, s]` in float64."""
    rows = rows.detach().reshape(-1, rows.shape[-1]).double()
    return rows.mH.conj() @ rows.conj() if rows.is_complex() else rows.T @ rows


def close(moment: Tensor, expected: Tensor) -> bool:
    return float((moment.double() - expected).norm()) <= 1e-5 * float(expected.norm())


class Holds(nn.Module):
    """Parameters by name and a function of them and `x`."""

    def __init__(self, forward: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: Any) -> Any:
        return self.function(x, **dict(self.named_parameters()))


W = torch.randn
