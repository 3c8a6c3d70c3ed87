"""Everything the task used, to rounding: old outputs are then exact, at the price of capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..options import check_number
from .base import Policy, Spectrum


@dataclass(frozen=True)
class NumericalRank(Policy):
    """Add every residual direction whose singular value is above `tolerance` times the largest of the new task.

    In eigenvalues: `l > tolerance^2 * l_max(K)`. The default is `s * eps` of float32 for rows of length `s`, the rule
    of `numpy.linalg.matrix_rank` for the rows `X`; second moments are kept in float64, since squaring halves the
    digits.

    Exact for the kept directions, under any base optimizer, and these are all that the task used: old outputs stay to
    rounding.
    """

    tolerance: float | None = None
    precise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            check_number(self, "tolerance", self.tolerance, 0, 1)

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many residual eigenvalues are above the cut."""
        tolerance = self.tolerance if self.tolerance is not None else spectrum.size * torch.finfo(torch.float32).eps
        return spectrum.above(tolerance**2 * spectrum.largest)
