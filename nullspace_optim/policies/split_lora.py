"""SplitLoRA: a rank that balances stability and plasticity (Qiu et al. 2025, arXiv 2505.22370)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..options import check_number
from .base import Merge, Policy, Spectrum


@dataclass(frozen=True)
class SplitLoRA(Policy):
    """Protect the `k` directions that minimise `t (1 - e_k) - alpha (d - k) / d` after `t` tasks, at least one.

    `e_k` is the share of all tasks' energy in the `k` leading directions: the first term is what later updates may
    break, the second what they may use. So a direction is protected while its share exceeds `alpha / (t d)`, and the
    protected part grows with the number of tasks. Paper: `alpha` 20. All directions are chosen anew from the sum over
    tasks, so old ones may be dropped; the report says what share.

    Exact for the kept directions. As published, a LoRA's `A` is drawn from the free directions and frozen while `B`
    trains (`lora_rows` and `begin_lora`); as a policy of full weights every update stays in the free directions, which
    is the same guarantee.

    The released code drops `max(k - 1, 1) + 1` columns, so it protects at least two directions; ``paper_code=True``
    does the same. Not part of a policy: logits over 30, ten passes an epoch, augmented moments.
    """

    alpha: float = 20.0
    paper_code: bool = field(default=False, kw_only=True)
    merge: ClassVar[Merge] = "accumulate"

    def __post_init__(self) -> None:
        check_number(self, "alpha", self.alpha, 0, math.inf)

    def rank(self, spectrum: Spectrum) -> int:
        """Return the number of directions at the smallest sum of stability loss and negative plasticity gain."""
        if spectrum.total <= 0:
            return 0
        missing = 1 - torch.cat([spectrum.shares.new_zeros(1), spectrum.shares.cumsum(0)])
        number = torch.arange(spectrum.size + 1, dtype=torch.float64, device=missing.device)
        loss = (spectrum.tasks + 1) * missing - self.alpha * (spectrum.size - number) / spectrum.size
        return min(max(int(loss.argmin()), 2 if self.paper_code else 1), spectrum.above(0.0))
