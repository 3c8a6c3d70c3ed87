"""Dense linear algebra that does not die: eigenvectors of second moments and orthonormal bases.

Shapes: a symmetric matrix is `[..., s, s]`, a basis `U` is `[..., s, k]` with orthonormal columns. Stacks of bases
with different rank are padded with zero columns; every function here leaves zero columns zero. Complex matrices are
Hermitian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import scipy.linalg
import torch
from torch import Tensor

from ..errors import ConsolidationError, ShapeError

_NEGATIVE = 1e-3
_ORTHONORMAL = 1e-7
_NEWTON_STEPS = 8
_POWER_STEPS = 20
_COLUMNS, _NARROWEST = 8, 128
_ORDINARY = (1e-6, 1e12)  # entries between them do not leave the range of float32 in what is done here


def eigh(matrix: Tensor, *, name: str = "", scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return eigenvalues `[..., s]`, descending, and eigenvectors (columns) of a second moment `[..., s, s]`.

    The matrix must be positive semidefinite up to rounding; negative eigenvalues within rounding are returned as 0.
    `scale` is the size of the eigenvalues that rounding is relative to, where that is more than the largest one: a
    residual `(I - U U^H) K (I - U U^H)` is all rounding when `U` covers `K`.

    A solver that fails, or returns a non-finite result, is retried in double precision, on the CPU, and with a little
    jitter on the diagonal.

    Raises:
        ConsolidationError: the matrix is not finite or not positive semidefinite, or every solver failed; names
        `name`. ShapeError: the matrix is not square.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeError(
            f"second moment of '{name}' has shape {tuple(matrix.shape)}, expected square matrices [..., s, s]"
        )
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[:-1]).abs(), matrix.clone()
    if not bool(torch.isfinite(matrix).all()):
        raise ConsolidationError(
            f"second moment of '{name}' is not finite: its rows hold NaN or infinity, or their squares overflow; "
            "check the batches given to consolidate, or capture in float64"
        )
    unit = _unit(matrix)
    values, vectors = _first_finite(matrix if unit == 1 else matrix / unit, name)
    values = values * unit
    lowest, largest = float(values.min()), float(values.max())
    if lowest < -_NEGATIVE * max(largest, scale):
        raise ConsolidationError(
            f"second moment of '{name}' has the eigenvalue {lowest:.3e} beside {max(largest, scale):.3e}, "
            "expected none below 0 beyond rounding; a sum of x x^H has none: "
            "the matrix was not captured from rows"
        )
    return values.clamp_(min=0).flip(-1), vectors.flip(-1)


def _unit(matrix: Tensor) -> float:
    """Return the power of two that the largest entry is near; 1 for matrices of ordinary size."""
    largest = float(matrix.abs().max()) if matrix.numel() and not matrix.is_meta else 0.0
    return 1.0 if largest == 0.0 or _ORDINARY[0] < largest < _ORDINARY[1] else math.ldexp(1.0, math.frexp(largest)[1])


def _first_finite(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the ascending eigenpairs of the first attempt that converges to finite numbers."""
    failures: list[str] = []
    for attempt in _attempts(matrix):
        try:
            values, vectors = _solve(attempt)
        except RuntimeError as error:
            failures.append(str(error).split("\n")[0] or type(error).__name__)
            continue
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            real = matrix.real.dtype if matrix.is_complex() else matrix.dtype
            return values.to(matrix.device, real), vectors.to(matrix.device, matrix.dtype)
        failures.append("the result is not finite")
    raise ConsolidationError(
        f"no eigenvalue solver converged on the second moment of '{name}' {tuple(matrix.shape)}: "
        f"{'; '.join(failures)}; "
        "consolidate on other batches or freeze this parameter"
    )


def _attempts(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the matrix as given, in double precision, on the CPU, and with jitter on its diagonal."""
    yield matrix
    double = _double(matrix)
    yield double
    double = double.cpu()
    yield double
    diagonal = double.diagonal(dim1=-2, dim2=-1)
    jitter = torch.finfo(matrix.dtype).eps * diagonal.abs().mean(-1, keepdim=True)
    yield double + torch.diag_embed(jitter.expand(diagonal.shape))


def _solve(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues and eigenvectors by torch's divide and conquer (LAPACK `syevd` on the CPU)."""
    found = torch.linalg.eigh(matrix)
    return found.eigenvalues, found.eigenvectors


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Return the largest eigenvalue `[...]` of each second moment `[..., s, s]` by power iteration.

    The result is never above the true value and in practice within a few per cent of it, at `O(s^2)` instead of
    `O(s^3)`.
    """
    unit = _unit(matrix)
    matrix = matrix / unit
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[-1], 8, generator=generator).to(matrix)
    vectors = torch.nn.functional.normalize(matrix @ start, dim=-2)
    for _ in range(_POWER_STEPS):
        vectors = torch.nn.functional.normalize(matrix @ vectors, dim=-2)
    norms: Tensor = torch.linalg.vector_norm(matrix @ vectors, dim=-2)
    return norms.amax(-1) * unit


def polish(basis: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the nearest basis `[..., s, k]` with `||U^H U - I||_2 <= 1e-7`, by Newton-Schulz steps.

    One step `U <- U - U E / 2` with `E = U^H U - I` leaves an error of at most `3/4 ||E||^2 + 1/4 ||E||^3`, so that
    float32 `eigh` needs one step and no second look. `E` is taken in float64, where it is small beside `I`; the product
    `U E`, whose relative error it does not feel, in the precision of the result. Zero columns stay zero. The result is
    rounded to `dtype`, float32 (complex64) if none is given.

    Raises:
        ConsolidationError: the columns are so far from orthonormal that the iteration does not converge.
    """
    target = dtype or (torch.complex64 if basis.is_complex() else torch.float32)
    precise = _double(basis)
    for _ in range(_NEWTON_STEPS):
        error = _gram(precise)
        error.diagonal(dim1=-2, dim2=-1).sub_((error.diagonal(dim1=-2, dim2=-1).abs() > 0).to(error.dtype))
        size = float(torch.linalg.matrix_norm(error).amax()) if error.numel() else 0.0
        if size > _ORTHONORMAL:
            moved = precise.to(target) @ error.to(target)
            del error  # a wide basis fills memory
            precise = torch.sub(precise, moved, alpha=0.5, out=None if precise is basis else precise)
        if size**2 <= _ORTHONORMAL:
            return precise.to(target)
    raise ConsolidationError(
        f"a basis {tuple(basis.shape)} is too far from orthonormal to be polished; pass it through orthonormalise first"
    )


def orthonormalise(basis: Tensor) -> Tensor:
    """Return an orthonormal basis `[..., s, k]` of the same span and dtype, by QR in double precision.

    Signs follow the input (`diag(Q^H U) > 0`), so an orthonormal basis comes back unchanged up to rounding; zero
    columns stay zero. Columns must otherwise be linearly independent.
    """
    factor: Tensor
    factor, triangle = torch.linalg.qr(_double(basis))
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    return (factor * torch.sgn(diagonal).unsqueeze(-2)).to(basis.dtype)


def append_directions(basis: Tensor, found: Tensor, *, orthonormal: bool) -> Tensor:
    """Return `[U Q]` `[s, k + j]`: behind the basis `U` `[s, k]`, bit for bit, an orthonormal `Q` of its complement.

    `Q` spans `(I - U U^H) F` for the columns `F` `[s, j]`, the residual append of GPM (Saha et al. 2021).
    Columns that are `orthonormal` up to rounding, and orthogonal to `U`, need no QR decomposition.
    """
    if not found.shape[1]:
        return basis
    if basis.shape[1]:
        stored, found = _double(basis), _double(found)
        found = found - stored @ (stored.mH @ found)
    fresh = polish(found if orthonormal else orthonormalise(_double(found)))
    return torch.cat([basis, fresh.to(basis)], dim=1)


def complement(basis: Tensor) -> Tensor:
    """Return `N` `[..., d, d - k]` such that `[U N]` is orthogonal, for a basis `U` `[..., d, k]` in the same dtype.

    Zero columns of `U` do not count towards `k`; in a stack the complements are zero padded to the largest.
    """
    stack = basis.reshape(math.prod(basis.shape[:-2]), *basis.shape[-2:])
    parts = [_complement(member) for member in stack]
    width = max((part.shape[1] for part in parts), default=0)
    result = basis.new_zeros(len(parts), basis.shape[-2], width)
    for target, part in zip(result, parts, strict=True):
        target[:, : part.shape[1]] = part
    return result.reshape(*basis.shape[:-1], width)


def _complement(basis: Tensor) -> Tensor:
    """Return the complement `[d, d - k]` of one basis `[d, k]`."""
    columns = _double(basis[:, _nonzero(basis)])
    if columns.shape[1] == 0:
        return torch.eye(basis.shape[0], dtype=basis.dtype, device=basis.device)
    factor: Tensor = torch.linalg.qr(columns, mode="complete")[0]
    return factor[:, columns.shape[1] :].to(basis.dtype)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the principal angles `[min(k, l)]` between the spans of two bases `[s, k]` and `[s, l]`.

    In radians, descending, float64. Zero columns are ignored. Björck and Golub 1973, through
    `scipy.linalg.subspace_angles`.

    Raises:
        ShapeError: the bases are not two matrices with the same number of rows.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[0]:
        raise ShapeError(
            f"principal angles need two bases [s, k] and [s, l], found {tuple(first.shape)} and {tuple(second.shape)}; "
            "pass one group of a stack at a time"
        )
    left, right = (_double(basis[:, _nonzero(basis)]).detach().cpu() for basis in (first, second))
    if left.shape[1] == 0 or right.shape[1] == 0:
        return torch.zeros(0, dtype=torch.float64)
    return torch.from_numpy(scipy.linalg.subspace_angles(left.numpy(), right.numpy()).copy())


def random_signs(*shape: int) -> Tensor:
    """Return a random matrix of -1 and 1 (int64, on the CPU), the same one for the same first dimension, its seed.

    For signs `G` `[d, n]`, `E ||D G||_F^2 = n ||D||_F^2` (Johnson-Lindenstrauss).
    """
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(shape[0])) * 2 - 1


def add_lower_product_(target: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of `X^T X` to `target` `[s, s]` in place for rows `X` `[n, s]`, by block columns."""
    size = rows.shape[1]
    width = max(_NARROWEST, math.ceil(size / _COLUMNS))
    for left in range(0, size, width):
        target[left:, left : left + width].addmm_(rows[:, left:].T, rows[:, left : left + width])


def _gram(basis: Tensor) -> Tensor:
    """Return `U^H U` `[..., k, k]`; of a wide real basis on the CPU only half of it is multiplied."""
    if basis.ndim != 2 or basis.is_complex() or basis.device.type != "cpu" or basis.shape[1] < 2 * _NARROWEST:
        return basis.mH @ basis
    gram = basis.new_zeros(basis.shape[1], basis.shape[1])
    add_lower_product_(gram, basis)
    return gram.tril_().add_(gram.tril(-1).mH)


def _nonzero(basis: Tensor) -> Tensor:
    """Return a mask `[k]` of the columns of `[s, k]` that are not all zero."""
    return (basis != 0).any(dim=0)


def _double(matrix: Tensor) -> Tensor:
    """Return the matrix in float64 or complex128."""
    return matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
