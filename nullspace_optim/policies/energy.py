"""GPM: protect a share of the new task's energy (Saha, Garg and Roy 2021, arXiv 2103.09762, eq. 8 and 9)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..options import check_number
from .base import Policy, Spectrum


@dataclass(frozen=True)
class Energy(Policy):
    """Add the fewest directions that bring the protected share of the new task's energy to `threshold`.

    With `K = X^T X`, stored basis `U` and residual eigenvalues `l_1 >= l_2 >= ...` of `(I - U U^T) K (I - U U^T)`:
    the smallest `r` with `covered + (l_1 + ... + l_r) / tr K >= threshold`, where `covered = tr(U^T K U) / tr K`
    (eq. 9; eq. 8 is the same for the first task, where `covered = 0`). Paper: 0.95 and 0.99 by layer, or 0.97 growing
    by 0.003 a task; 0.99 is our default.

    Exact: kept directions stay under any base optimizer. Old outputs move by what lies outside them, at most
    `1 - threshold` of the energy of each weight's inputs.

    The released GPM code takes one direction fewer on the first task: it counts the directions whose running share is
    still *below* the threshold. ``paper_code=True`` does the same, to reproduce its tables. It also joins new
    directions to the stored ones without making them orthonormal again; here they are. Directions of equal energy are
    taken in the order in which the eigenvalue solver returns them.
    """

    threshold: float = 0.99
    paper_code: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_number(self, "threshold", self.threshold, 0, 1, way_out="for every used direction take NumericalRank()")

    def rank(self, spectrum: Spectrum) -> int:
        """Return the smallest number of new directions that reaches the threshold, 0 if it is reached already."""
        if spectrum.covered >= self.threshold:
            return 0
        reached = spectrum.covered + torch.cumsum(spectrum.shares, 0)
        below = int((reached < self.threshold).sum())
        short = self.paper_code and spectrum.kept == 0
        return min(below if short else below + 1, spectrum.above(0.0))
