"""Appending from a sketch of the rows: as `decompose` does, without any matrix `[s, s]`.

Of rows `A` only `B` `[l, s]` is known, with `B^T B <= A^T A` (see `sketch`). New directions are the right singular
vectors of `B (I - U U^H)`, and every energy that is reported is a lower bound of the true one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError
from ..policies.base import Policy, Spectrum
from .grow import Eigenbasis


def decompose_sketch(
    policy: Policy,
    factor: Tensor,
    total: Tensor,
    rows: Sequence[int],
    basis: Tensor | None,
    *,
    tasks: int = 0,
    name: str = "",
) -> Eigenbasis:
    """Return the candidate directions of a sketch `B` `[g, l, s]` of rows with the energy `total` `[g]`.

    Raises:
        ShapeError: the stored `basis` `[g, s, k]` does not fit.
    """
    groups, _, size = factor.shape
    if basis is not None and basis.shape[:2] != (groups, size):
        raise ShapeError(f"'{name}' has a stored basis {tuple(basis.shape)} but its sketch is {tuple(factor.shape)}")
    frames, values, spectra = [], factor.new_zeros(groups, size), []
    for group, block in enumerate(factor.double()):
        stored = block.new_zeros(size, 0) if basis is None else basis[group].to(block)
        stored = stored[:, stored.ne(0).any(0)]
        inside = block @ stored
        _, singular, directions = torch.linalg.svd(block - inside @ stored.mH, full_matrices=False)
        largest = float(torch.linalg.matrix_norm(block, 2).square()) if block.numel() else 0.0
        squares = singular.square()
        squares[squares <= size * torch.finfo(factor.dtype).eps * largest] = 0
        values[group, : len(squares)] = squares.to(values)
        energies, energy = inside.square().sum(0), float(total[group])
        covered = float(energies.sum()) / energy if energy > 0 else 1.0
        frames.append(directions.mH.to(factor))
        kept = stored.shape[1]
        spectra.append(
            Spectrum(values[group], energy, largest, min(covered, 1.0), kept, int(rows[group]), energies, tasks, name)
        )
    identity = torch.eye(frames[0].shape[1], dtype=factor.dtype, device=factor.device)
    vectors = tuple(identity for _ in frames)
    return Eigenbasis(name, policy, values[..., None], None, values, vectors, tuple(frames), tuple(spectra))
