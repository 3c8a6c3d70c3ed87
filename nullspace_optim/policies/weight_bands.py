"""Bands of a weight's spectrum, each kept by its share, without data (after the abstract of HDSD, arXiv 2605.07512)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..options import check_number
from .base import Policy, Spectrum

ROUNDING = 1e-12  # of the largest squared singular value: what float32 rounds is no direction of the weight


@dataclass(frozen=True)
class WeightBands(Policy):
    """Keep the singular directions of `W` `[m, d]` on both sides, each band of them by its scale.

    The leading directions up to the share `bands[0]` of `||W||^2` are kept by `scales[0]`, the next up to
    `bands[0] + bands[1]` by `scales[1]`, and so on: `dW <- (I - U D U^T) dW (I - V D V^T)`, `D` the scales. Weights
    are decomposed with the first task that finds them not zero; later ones keep the same. With scales 1 and 0 this is
    `OSF` at that rank.

    HDSD (2026) bounds updates by a scale for each part of the spectrum of CLIP's parameters; only its abstract can be
    read (no formula, no constants, no code), so bands, scales and the two-sided form are ours, and its light module and
    fusion are left out. A step lets the share `1 - scale` through in a band, exactly, on each side (the product where
    bands of both sides meet); nothing is promised for outputs.
    FSDP2 is refused, since soft sides of a weight may not cross ranks; replicas (DDP) are not.
    """

    bands: tuple[float, ...] = (0.5, 0.3, 0.2)
    scales: tuple[float, ...] = (1.0, 0.9, 0.0)
    from_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, values in (("bands", self.bands), ("scales", self.scales)):
            if not isinstance(values, (tuple, list)):
                raise OptionError(f"WeightBands({option}={values!r}): expected a tuple of numbers, one a band")
            for number, value in enumerate(values):
                check_number(self, f"{option}[{number}]", value, 0, 1, closed="low high")
            object.__setattr__(self, option, tuple(map(float, values)))  # equal, hashable, and readable as text
        if not self.bands or len(self.bands) != len(self.scales) or abs(sum(self.bands) - 1) > 1e-6:
            raise OptionError(
                f"WeightBands(bands={self.bands}, scales={self.scales}): expected a scale for each band, and bands "
                "that add up to 1, such as bands=(0.5, 0.5), scales=(1, 0)"
            )

    def rank(self, spectrum: Spectrum) -> int:
        """Return the number of directions up to the last one that is kept; none once there are some."""
        held = self._by_direction(spectrum).nonzero()
        return 0 if spectrum.kept or not len(held) else int(held.max()) + 1

    def scale(self, spectrum: Spectrum, take: int, before: Tensor | None) -> Tensor | None:
        """Return the scale `[kept + take]` of every direction; `None` where all are 1."""
        found = before if spectrum.kept else self._by_direction(spectrum)[:take]
        return None if found is None or bool((found == 1).all()) else found

    def _by_direction(self, spectrum: Spectrum) -> Tensor:
        """Return the scale `[s]` of the band in which each direction lies, float32."""
        ahead = torch.cumsum(spectrum.shares, 0) - spectrum.shares  # share of the energy in the directions before
        ends = torch.cumsum(torch.tensor(self.bands).to(ahead), 0)[:-1] - 1e-6
        found = torch.tensor(self.scales, device=ahead.device)[torch.bucketize(ahead, ends, right=True)]
        found[spectrum.above(ROUNDING * spectrum.largest) :] = 0
        return found
