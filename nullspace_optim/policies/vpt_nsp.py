"""VPT-NSP: prompts whose change old attention cannot see, on both sides (Lu et al. 2024, arXiv 2406.05658)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..options import check_number
from .base import Merge, Policy, Spectrum

SIGMA = 10.0
LONG = 128
TRIMMED = 0.015


@dataclass(frozen=True)
class VPTNSP(Policy):
    """Keep the directions before the elbow of the spectrum, each by the share `eta`, on both sides of a prompt.

    For prompts `P` `[M, d]` old attention stays if `Q W_k dP^T = 0` (right side) and `S_P dP = 0` (left side), with the
    old inputs' queries `Q` and attention `S_P` to the prompts (eq. 9 to 14); `declare_prompt` hands both to
    `consolidate`, which sums them over tasks. The elbow is the largest second difference of the singular values of the
    uncentred covariance `K`, its eigenvalues (not their roots, the singular values of the rows), which are smoothed
    (Gaussian, 10) and trimmed by 1.5 % at each end if there are 128 or more. The projector is
    `eta N N^T + (1 - eta) I` with `N` the free directions, so `1 - eta` leaks. Paper: `eta` 0.94 to 0.98.

    No guarantee for `eta < 1`: a step lets `1 - eta` of its movement through, which is what `verify` checks. With
    `eta=1` the kept directions are exact; old outputs are where they span the old inputs and no norm layer mixes
    prompts with tokens (the paper adds a loss on the norm's statistics, which is not part of a policy).

    The published projector is also divided by its Frobenius norm, which shrinks the learning rate by
    `sqrt(dim N)`; here the rate stays what the user set. Its single-tensor optimizer path raises
    `NotImplementedError`: only ``foreach`` projects.
    """

    eta: float = 0.98
    merge: ClassVar[Merge] = "accumulate"

    def __post_init__(self) -> None:
        check_number(self, "eta", self.eta, 0, 1, closed="high")

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many directions stand before the elbow."""
        values = spectrum.values.double().clamp(min=0)
        if len(values) < 3 or spectrum.total <= 0:
            return min(len(values), spectrum.above(0.0))
        first = 0
        if len(values) >= LONG:
            values = _smoothed(values)
            first = int(TRIMMED * len(values))
            values = values[first : len(values) - first]
        return min(int(values.diff().diff().argmax()) + 1 + first, spectrum.above(0.0))

    def scale(self, spectrum: Spectrum, take: int, before: Tensor | None) -> Tensor | None:
        """Return `eta` for every kept direction (`None`, fully, for 1)."""
        return None if self.eta == 1 else torch.full((take,), self.eta, device=spectrum.values.device)


def _smoothed(values: Tensor) -> Tensor:
    """Return `values` `[s]` under a Gaussian window, mirrored at the ends."""
    radius = int(4 * SIGMA + 0.5)
    place = torch.arange(-radius, radius + 1, dtype=values.dtype, device=values.device)
    window = torch.exp(-0.5 * (place / SIGMA) ** 2)
    mirrored = torch.cat([values[:radius].flip(0), values, values[-radius:].flip(0)])
    smooth: Tensor = torch.nn.functional.conv1d(mirrored[None, None], (window / window.sum())[None, None])[0, 0]
    return smooth
