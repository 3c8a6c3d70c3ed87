"""A fixed number of directions for every weight, as in low-rank baselines and controls."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError
from .base import Policy, Spectrum


@dataclass(frozen=True)
class FixedRank(Policy):
    """Add the leading residual directions until `k` are protected in total (per group), or all that hold energy.

    Exact for the kept directions, under any base optimizer; nothing is promised about the energy outside them, which
    the report tells.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise OptionError(f"FixedRank(k={self.k!r}): expected a whole number in [1, inf)")

    def rank(self, spectrum: Spectrum) -> int:
        """Return `k` less what is stored, at most the number of directions with a positive eigenvalue."""
        return min(max(self.k - spectrum.kept, 0), spectrum.above(0.0))
