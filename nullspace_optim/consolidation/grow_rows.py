"""Appending from rows, without any matrix `[s, s]`: from all rows where they are few, or from a sketch of them.

The second moment of few rows is `K = A A^H`, with the rows as the columns of `A` `[s, n]`. With `R = (I - U U^H) A` and
eigenpairs `(l, v)` of the small `R^H R` `[n, n]`, the residual has the eigenvalues `l` and the eigenvectors
`R v / sqrt(l)`, and no others with energy. All of it is done in double precision.

Of a sketch `B` `[l, s]` is known that `B^T B <= X^T X` for the rows `X` (see `sketch`). New directions are the right
singular vectors of `B (I - U U^H)`, and every energy that is reported is a lower bound of the true one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError
from ..policies.base import Policy, Spectrum
from ..subspace.linalg import eigh, largest_eigenvalue
from .grow import Eigenbasis


def decompose_rows(
    policy: Policy,
    factor: Tensor,
    rows: Sequence[int],
    basis: Tensor | None = None,
    *,
    tasks: int = 0,
    name: str = "",
) -> Eigenbasis:
    """Return what `decompose` returns for an appending policy, from rows `[g, n, s]`; `rows` `[g]` of them count.

    Raises:
        ShapeError: the stored `basis` `[g, s, k]` does not fit.
        ConsolidationError: the rows are not finite, or no solver converged.
    """
    groups, _, size = factor.shape
    _check_basis(basis, factor, "rows", name)
    wide = torch.complex128 if factor.is_complex() else torch.float64
    values, frames, vectors, spectra = factor.new_zeros(groups, size).abs(), [], [], []
    for group in range(groups):
        columns = factor[group].mT.to(wide)
        stored = columns[:, :0] if basis is None else _columns(basis[group]).to(columns)
        kept, total = stored.shape[1], float(columns.abs().square().sum())
        outside, gram = columns, columns.mH @ columns
        top = float(largest_eigenvalue(gram)) if columns.numel() else 0.0
        if kept:
            for _ in range(2):  # once is not enough in the rounding of a float32 basis
                outside = outside - stored @ (stored.mH @ outside)
            gram = outside.mH @ outside
        found, coordinates = eigh(gram, name=name, scale=top)
        covered = (max(1.0 - float(found.sum()) / total, 0.0) if kept else 0.0) if total > 0 else 1.0
        found[found <= size * torch.finfo(found.dtype).eps * top] = 0
        values[group, : len(found)] = found.to(values)
        energies = (stored.mH @ columns).abs().square().sum(1)
        frames.append(outside)
        vectors.append(coordinates * torch.where(found > 0, found, torch.inf).rsqrt())
        largest = top if kept else float(values[group, 0])
        spectra.append(Spectrum(values[group], total, largest, covered, kept, int(rows[group]), energies, tasks, name))
    return Eigenbasis(name, policy, factor, None, values, tuple(vectors), tuple(frames), tuple(spectra), few=True)


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
    _check_basis(basis, factor, "sketch", name)
    frames, values, spectra = [], factor.new_zeros(groups, size), []
    for group, block in enumerate(factor.double()):
        stored = block.new_zeros(size, 0) if basis is None else _columns(basis[group]).to(block)
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


def _columns(basis: Tensor) -> Tensor:
    """Return the columns of `[s, k]` that are not padding."""
    return basis[:, basis.ne(0).any(0)]


def _check_basis(basis: Tensor | None, factor: Tensor, source: str, name: str) -> None:
    """Refuse a stored `basis` `[g, s, k]` that does not fit the rows `factor` `[g, n, s]`."""
    if basis is not None and basis.shape[:2] != (factor.shape[0], factor.shape[2]):
        raise ShapeError(
            f"'{name}' has a stored basis {tuple(basis.shape)} but its {source} is {tuple(factor.shape)}; "
            "the layer's input size changed: release it or load the matching bases"
        )
