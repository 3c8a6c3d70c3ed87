"""SGP: protect each direction in proportion to its importance (Saha and Roy 2023, arXiv 2302.01386)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import check_number
from .base import Spectrum
from .energy import Energy


@dataclass(frozen=True)
class SGP(Energy):
    """GPM's directions, each kept by its importance `(alpha + 1) s / (alpha s + s_max)` instead of fully (eq. 5).

    `s` are singular values of the new task's rows along the directions, `s_max` the largest of them. For a stored
    direction `u` the surrogate `s = sqrt(u^T K u)` stands in (eq. 8), its old importance is added, and the sum is cut
    off at 1 (eq. 9). Paper: `alpha` 10 (split CIFAR-100), 5, 1 or 3 (other image tasks), 25 (control); `threshold` as
    in GPM (0.995 for control).

    No guarantee below importance 1: a step lets the share `1 - importance` of its movement through. What is kept is
    that share exactly, under any base optimizer; `verify` compares each direction with all that the steps so far were
    allowed to change. A direction whose importance has reached 1 is exact, as the leading one always is.

    The released code for control tasks zeroes bias gradients after Adam's first moment has taken them; here biases
    follow `bias=` of the optimizer.
    """

    threshold: float = 0.97
    alpha: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "alpha", self.alpha, 0, math.inf, closed="low", way_out="for full protection take Energy()")

    def scale(self, spectrum: Spectrum, take: int, before: Tensor | None) -> Tensor:
        """Return the importance `[kept + take]` of every direction after the new task."""
        energies = torch.cat([spectrum.stored, spectrum.values[:take].to(spectrum.stored)])
        singular = energies.clamp(min=0).sqrt()
        largest = singular.max() if len(singular) else singular.new_zeros(())
        importance = (self.alpha + 1) * singular / (self.alpha * singular + largest)
        importance = importance.nan_to_num(0.0)
        importance[: spectrum.kept] += 1.0 if before is None else before
        return importance.clamp(max=1.0).float()
