"""GPM: protect a share of the new task's energy (Saha, Garg and Roy 2021, arXiv 2103.09762, eq. 8 and 9)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

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

    Rows of an embedding: the input is one-hot, so its energy is how often each row is read (by samples). The rows that
    are read most are kept, until `threshold` of the reads is reached; rows read equally often are treated alike.

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

    def rows(self, counts: Tensor, kept: Tensor) -> Tensor:
        """Return the rows that are read most and, with those that are `kept`, reach the threshold."""
        new = counts.masked_fill(kept, 0)
        missing = self.threshold * float(counts.sum()) - float(counts[kept].sum())
        if missing <= 0:
            return torch.zeros_like(kept)
        order = new.sort(descending=True).values
        below = int((order.cumsum(0) < missing).sum())
        return new >= order[min(below, len(order) - 1)].clamp_min(1)
