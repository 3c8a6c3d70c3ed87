"""GNSP: leave free the directions that hold the last share of all tasks' energy (arXiv 2507.19839)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..options import check_number
from .base import Merge, Policy, Spectrum


@dataclass(frozen=True)
class TailEnergy(Policy):
    """Protect the smallest `k` whose tail `(l_{k+1} + ... + l_s) / (l_1 + ... + l_s)` is below `rho`.

    `l` are the eigenvalues of a sum of Frobenius-normalised second moments: each batch's `X^T X` is divided by its
    Frobenius norm, the sum over a task likewise, and tasks are merged by `M <- M + M_new / ||M_new||_F`. Paper:
    `rho = 0.15`. All directions are chosen anew after each task, so old ones may be dropped; the report says what
    share.

    Exact for the kept directions, under any base optimizer. Old outputs move by what lies outside them: up to `rho` of
    the normalised energy, and what was dropped.

    The released code projects the gradient before AdamW, whose step then leaves the free directions, and does not
    project decoupled weight decay (0 in its runs); `project="gradient"` does the same. It halves older tasks at each
    merge for `visual.proj` alone; here all weights follow the sum.
    """

    rho: float = 0.15
    merge: ClassVar[Merge] = "accumulate"
    batch_frobenius: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "rho", self.rho, 0, 1, way_out="for every used direction take NumericalRank()")

    def rank(self, spectrum: Spectrum) -> int:
        """Return the smallest number of directions that leaves less than `rho` of the energy in the rest."""
        shares = spectrum.shares
        beyond = torch.flip(torch.cumsum(torch.flip(shares, (0,)), 0), (0,))
        return int((beyond >= self.rho * shares.sum()).sum()) if spectrum.total > 0 else 0

    def accumulated(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return `old + new / ||new||_F` `[g, s, s]`, each group by its own norm; a zero moment stays zero."""
        norm = torch.linalg.matrix_norm(new)[:, None, None]
        return super().accumulated(old, new / norm.clamp(min=torch.finfo(new.dtype).tiny))
