"""Two softly kept subspaces of one weight made into one that keeps at least what either keeps.

A side that keeps the directions `U` by the shares `s` is the matrix `C = U diag(s) U^H` with eigenvalues in 0..1, a
conceptor. Of two the Boolean OR (Jaeger 2014, arXiv 1403.3369, section 3.9) is `M = 1 - ((1 - C)^-1 + (1 - D)^-1 -
1)^-1`: `M >= C` and `M >= D`, and a direction that either keeps fully is kept fully.
"""

from __future__ import annotations

import torch
from torch import Tensor

SOFTEST = 1e-6  # a share below this keeps nothing, one above its complement keeps everything


def conceptor_of(basis: Tensor, scale: Tensor | None, frame: Tensor) -> Tensor:
    """Return `F^H U diag(s) U^H F` `[r, r]`: `U` `[d, k]` with shares `[k]` (`None`: 1) in the frame `F` `[d, r]`."""
    inside = frame.mH @ basis
    share = basis.new_ones(basis.shape[1]) if scale is None else scale.to(basis.dtype)
    return (inside * share) @ inside.mH


def either(first: Tensor, second: Tensor) -> Tensor:
    """Return the Boolean OR `[r, r]` of two conceptors in double precision.

    Directions that either keeps fully make the inverses infinite; on what is left of the space both are finite.
    """
    identity = torch.eye(first.shape[0], dtype=first.dtype, device=first.device)
    inverses, kept = [], []
    for conceptor in (first, second):
        free, vectors = torch.linalg.eigh(identity - conceptor)
        open_ = free > SOFTEST
        kept.append(vectors[:, ~open_])
        inverses.append((vectors[:, open_] / free[open_]) @ vectors[:, open_].mH)
    rest = _complement(torch.cat(kept, dim=1), identity)
    middle = rest.mH @ (inverses[0] + inverses[1]) @ rest - rest.mH @ rest
    both: Tensor = identity - rest @ torch.linalg.inv(middle) @ rest.mH
    return both


def directions_of(conceptor: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors `[r, k]` and shares `[k]` of a conceptor, largest first, without those that keep nothing."""
    shares, vectors = torch.linalg.eigh(conceptor)
    shares, vectors = shares.flip(0).clamp(0, 1), vectors.flip(1)
    used = shares > SOFTEST
    shares = shares[used]
    return vectors[:, used], torch.where(shares > 1 - SOFTEST, torch.ones_like(shares), shares)


def _complement(columns: Tensor, identity: Tensor) -> Tensor:
    """Return an orthonormal basis of what the `columns` `[r, n]` do not span."""
    if not columns.shape[1]:
        return identity
    left, values, _ = torch.linalg.svd(columns)
    rank = int((values > SOFTEST).sum())
    rest: Tensor = left[:, rank:]
    return rest


def odds_of(basis: Tensor, scale: Tensor | None) -> Tensor:
    """Return `U diag(s / (1 - s)) U^H` `[g, s, s]` in double precision; a scale of 1 counts as the largest below it."""
    wide = basis.to(torch.complex128 if basis.is_complex() else torch.float64)
    ones = wide.new_ones(wide.shape[0], wide.shape[2]).real
    share = (ones if scale is None else scale.double()).clamp(max=1 - torch.finfo(torch.float32).eps / 2)
    return (wide * (share / (1 - share)).unsqueeze(1)) @ wide.mH
