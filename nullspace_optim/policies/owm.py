"""OWM: the recursive least-squares projector of all inputs seen (Zeng et al. 2019, arXiv 1810.01256)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import check_number
from .base import Merge, Policy, Spectrum

SMALLEST = 1e-6


@dataclass(frozen=True)
class OWM(Policy):
    """Scale every eigenvector of `K` by `l / (l + alpha)`, so that `I - U diag(s) U^T = (I + K / alpha)^-1`.

    That is the projector which the recursion `P <- P - (P r) (P r)^T / (alpha + r^T P r)` reaches from `P = I` after
    all rows `r` (eq. 4 to 6); tasks are merged by going on, `K = K_1 + K_2 + ...`. Paper: `alpha` falls from 1 to 1e-5
    ... 1e-1, by layer; here it is one number, 1 by default. Nearly all directions are stored, softly: `d^2` numbers a
    weight and as many in its anchors, whatever the task; directions with a scale below 1e-6 are not.

    No guarantee below scale 1: a step lets the share `1 - s` through, which is what `verify` checks. Scales only grow.

    The paper feeds the mean row of each training batch (one for each place of a convolution), at every training step;
    here every row of `consolidate` counts, once, in any order. A mean hides what its rows do not share.
    """

    alpha: float = 1.0
    merge: ClassVar[Merge] = "or"
    precise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "alpha", self.alpha, 0, math.inf)

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many directions are kept by more than 1e-6."""
        return spectrum.above(SMALLEST)

    def scale(self, spectrum: Spectrum, take: int, before: Tensor | None) -> Tensor:
        """Return `l / (l + alpha)` `[take]` of all tasks together."""
        values = spectrum.values[:take].double()
        return (values / (1 + values)).float()

    def odds(self, moment: Tensor, rows: Tensor) -> Tensor:
        """Return `K / alpha` `[g, s, s]`, float64."""
        return moment.double() / self.alpha
