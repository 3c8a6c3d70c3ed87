"""CODE-CL: protect a task by its conceptor, tasks by Boolean OR (Apolinario, Choudhary and Roy 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import check_number
from ..subspace.linalg import eigh
from .base import Merge, Policy, Spectrum

WIDER = 1.1  # factor by which the aperture grows until the gain is reached
MOST_ADAPTATIONS = 200


@dataclass(frozen=True)
class CODECL(Policy):
    """Scale each eigenvector of `K / n` by `c = l / (l + aperture^-2)`, and merge tasks by the OR of conceptors.

    With `C = K/n (K/n + aperture^-2 I)^-1` (arXiv 2411.15235, eq. 3) the aperture grows by 1.1 until the task's rows
    pass with the share `gain`: `||C X^T||_F / ||X^T||_F >= gain`. Merged are `C or B = not(not C and not B)`, which is
    a sum of odds (see `merge`); directions with `c < floor` after the merge are left free. Paper: `aperture` 6 (split
    CIFAR-100), 8 (mini-ImageNet), 4 (5 datasets); `gain` 0.95 (0.01 for 5 datasets); `floor` 0.2. The aperture has the
    unit of an inverse input: rows twice as large need half of it.

    No guarantee that a direction stays where it is, since `c < 1`: a step lets the share `1 - c` through, which is what
    `verify` checks. OR never loosens: `C or B >= C`.

    The released code measures the gain by the sum of row norms, `sum ||C x|| / sum ||x||`; a second moment tells the
    root of the sum of squares. The optional forward scaling is `ForwardScaling` with `shared_directions`; the released
    code begins its mixing at random (`start=` of `ForwardScaling.begin`) and leaves out linear layers of at most 50
    inputs and convolutions whose patches have at most 80 values.
    """

    aperture: float = 6.0
    gain: float = 0.95
    floor: float = 0.2
    merge: ClassVar[Merge] = "or"

    def __post_init__(self) -> None:
        check_number(self, "aperture", self.aperture, 0, math.inf)
        check_number(self, "gain", self.gain, 0, 1)
        check_number(self, "floor", self.floor, 0, 1, closed="low")

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many directions of the merged conceptor reach the floor."""
        values = spectrum.values.double()
        return int(((values / (1 + values) >= self.floor) & (values > 0)).sum())

    def scale(self, spectrum: Spectrum, take: int, before: Tensor | None) -> Tensor:
        """Return the singular values `[take]` of the merged conceptor."""
        values = spectrum.values[:take].double()
        return (values / (1 + values)).float()

    def odds(self, moment: Tensor, rows: Tensor) -> Tensor:
        """Return `C (I - C)^-1 = a^2 K / n` `[g, s, s]`, float64, with the adapted aperture `a` of each group."""
        mean = moment.double() / rows.clamp(min=1).to(moment.device).view(-1, 1, 1)
        apertures = [self._adapted(eigh(one[None])[0][0]) for one in mean]
        return mean * mean.new_tensor(apertures).square().view(-1, 1, 1)

    def _adapted(self, values: Tensor) -> float:
        """Return the aperture at which the rows with eigenvalues `[s]` pass with the gain."""
        aperture, total = self.aperture, float(values.sum())
        for _ in range(MOST_ADAPTATIONS):
            odds = values * aperture**2
            passed = float((values * (odds / (1 + odds)).square()).sum())
            if passed >= self.gain**2 * total:
                break
            aperture *= WIDER
        return aperture
