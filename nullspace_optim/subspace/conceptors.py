"""Softly kept subspaces as conceptors `C = U diag(s) U^H`, eigenvalues in 0..1 (Jaeger 2014, arXiv 1403.3369)."""

from __future__ import annotations

import torch
from torch import Tensor


def odds_of(basis: Tensor, scale: Tensor | None) -> Tensor:
    """Return `U diag(s / (1 - s)) U^H` `[g, s, s]` in double precision; a scale of 1 counts as the largest below it."""
    wide = basis.to(torch.complex128 if basis.is_complex() else torch.float64)
    ones = wide.new_ones(wide.shape[0], wide.shape[2]).real
    share = (ones if scale is None else scale.double()).clamp(max=1 - torch.finfo(torch.float32).eps / 2)
    return (wide * (share / (1 - share)).unsqueeze(1)) @ wide.mH
