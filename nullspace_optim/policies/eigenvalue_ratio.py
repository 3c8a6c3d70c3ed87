"""Adam-NSCL: leave free what is within a factor of the smallest eigenvalue (Wang et al. 2021, arXiv 2103.07113)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..options import check_number
from .base import Merge, Policy, Spectrum


@dataclass(frozen=True)
class EigenvalueRatio(Policy):
    """Protect all directions with `l > a * l_min`; the null space is `{l <= a * l_min}`.

    Paper: `a = 10`, or 30 with 20 tasks. `l` are the eigenvalues of the sum of all tasks' second moments. All
    directions are chosen anew after each task.

    Exact for the kept directions, under any base optimizer. Old outputs move by what lies outside them, at most `a`
    times the smallest eigenvalue along each free direction, and by directions that a later choice drops.

    The rule follows the smallest eigenvalue, which is noise as soon as the spectrum is numerically singular, as in
    most transformers: taken literally it then protects everything, or nothing. Below `eps * l_max` (`eps` of the
    eigenvalues' dtype) the floor `eps * l_max` stands in for `l_min`, so that a singular spectrum keeps what is above
    `a` times rounding; `Energy` or `NumericalRank` say more plainly what they keep.

    The released code averages each batch into one row, so that a linear layer's rank is at most its number of batches;
    here every row counts. It divides each projector by its Frobenius norm, which is a learning rate of its own for
    every matrix; here the rate stays what the user set. With torch 2.0 and newer it skips weights whose gradient
    `zero_grad` has set to None, which is all of them, and trains unprotected without a word.
    """

    a: float = 10.0
    merge: ClassVar[Merge] = "accumulate"

    def __post_init__(self) -> None:
        check_number(self, "a", self.a, 1, math.inf, closed="low")

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many eigenvalues are larger than `a` times the smallest, or than `a` times rounding."""
        values = spectrum.values.double()
        floor = torch.finfo(spectrum.values.dtype).eps * float(values[0])
        return spectrum.above(self.a * max(float(values[-1]), floor))
