"""One budget of directions for all weights together. Ours; no paper has this rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..options import check_number
from .base import Policy, Spectrum


@dataclass(frozen=True)
class RankBudget(Policy):
    """Protect at most `share` of all input dimensions, summed over all weights, old directions included.

    New directions are taken greedily, whichever weight they belong to, by the share `l_i / tr K` of their own
    weight's energy that they hold; the free share of the model is then known in advance, where an energy threshold
    only bounds what is lost. Directions within rounding of zero (`l <= s * eps * l_max`) are never taken. Ties: first
    by key, then by position.

    Exact for the kept directions, under any base optimizer; nothing is promised about the energy outside them, which
    the report tells.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_number(self, "share", self.share, 0, 1, closed="high")

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """Return how many leading directions of each spectrum fit into what is left of the budget."""
        budget = int(self.share * sum(s.size for s in spectra.values())) - sum(s.kept for s in spectra.values())
        candidates = [
            (-share, key)
            for key, spectrum in spectra.items()
            for share in spectrum.shares[: self.rank(spectrum)].tolist()
        ]
        taken = dict.fromkeys(spectra, 0)
        for _, key in sorted(candidates)[: max(budget, 0)]:
            taken[key] += 1
        return taken

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many directions of one weight are worth taking at all."""
        eps = torch.finfo(spectrum.values.dtype).eps
        return min(spectrum.above(spectrum.size * eps * spectrum.largest), spectrum.free)
