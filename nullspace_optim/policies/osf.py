"""OSF / OSFT: protect what a weight itself has most of, without data (Nayak et al. 2025, arXiv 2504.07097)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..options import check_number
from .base import Policy, Spectrum


@dataclass(frozen=True)
class OSF(Policy):
    """Keep the leading `share * min(m, d)` singular directions of `W` `[m, d]` on both sides.

    With `W = U_h S_h V_h + U_l S_l V_l` an update stays within `U_h`-orthogonal rows and `V_h`-orthogonal columns:
    `dW <- (I - U_h U_h^T) dW (I - V_h^T V_h)`. Each later task decomposes what `W` has outside the kept directions anew
    and keeps `growth * min(m, d)` more. Published code (PEFT) freezes half; rank growth is 4 directions a task in its
    documentation.

    Exact: `U_h^T W` and `W V_h` stay, under any base optimizer. No guarantee for outputs, since no data are looked at:
    old inputs outside `V_h` are not protected. The loader of `consolidate` only shows which weights the model reads;
    one batch is enough.

    Published implementations train the factors `U_l, S_l, V_l`, which needs about three times the memory of the weight;
    here the weight itself is trained, and bases and anchors hold `2 k (m + d)` numbers. The set of reachable weights
    is the same, the path is not. PEFT projects gradients before the optimizer, which leaks under AdamW, and its
    documented `unload()` throws the trained factors away.
    """

    share: float = 0.5
    growth: float = 0.0
    from_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "share", self.share, 0, 1)
        check_number(self, "growth", self.growth, 0, 1, closed="low")

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many new directions complete the share of this task; `rows` is the weight's other dimension."""
        smaller = min(spectrum.size, spectrum.rows)
        wanted = int(min(self.share + self.growth * spectrum.tasks, 1.0) * smaller)
        return min(max(wanted - spectrum.kept, 0), spectrum.above(0.0))
