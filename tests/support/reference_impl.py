"""Slow, obvious twins of the fast paths: float64, dense projectors, singular value decompositions, loops.

Nothing here imports `nullspace_optim`. Shapes are those of the library: weights `[g, m, d]`, bases `[g, s, k]`, rows
`[n, s]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def projector(basis: Tensor) -> Tensor:
    """`U U^H` `[g, s, s]`, summed column by column."""
    basis = double(basis)
    dense = torch.zeros(basis.shape[0], basis.shape[1], basis.shape[1], dtype=basis.dtype)
    for group in range(basis.shape[0]):
        for column in range(basis.shape[2]):
            dense[group] += torch.outer(basis[group, :, column], basis[group, :, column].conj())
    return dense


def protected_part(matrix: Tensor, basis: Tensor, side: str, scale: Tensor | None = None) -> Tensor:
    """The part of `[g, m, d]` in the protected span: `M P` (right) or `P M` (left), each group by itself."""
    dense = projector(basis) if scale is None else projector(basis * scale.sqrt()[:, None, :].to(basis.dtype))
    parts = [
        double(matrix)[i] @ dense[i] if side == "right" else dense[i] @ double(matrix)[i] for i in range(len(matrix))
    ]
    return torch.stack(parts)


def moved_within_free_directions(
    weight: Tensor, previous: Tensor, basis: Tensor, side: str, scale: Tensor | None = None
) -> Tensor:
    """`previous + (W - previous) (I - P)` (right) or `previous + (I - P) (W - previous)` (left)."""
    change = double(weight) - double(previous)
    return double(previous) + change - protected_part(change, basis, side, scale)


def gpm_rank(rows: Tensor, basis: Tensor | None, threshold: float) -> int:
    """New directions by GPM (Saha et al. 2021, eq. 8 and 9), on singular values of `R = X^T` `[s, n]`."""
    activations = double(rows).T
    energy = (torch.linalg.svdvals(activations) ** 2).sum()
    residual = activations
    if basis is not None:
        residual = activations - double(basis) @ (double(basis).T @ activations)
    singular = torch.linalg.svdvals(residual)
    reached = float((energy - (singular**2).sum()) / energy)
    if basis is None:
        reached = 0.0
    count = 0
    while reached < threshold and count < len(singular):
        reached += float(singular[count] ** 2 / energy)
        count += 1
    return count


def gpm_basis(tasks: list[Tensor], threshold: float) -> Tensor:
    """The GPM memory `[s, k]` after all tasks' rows `[n, s]`, by a singular value decomposition of each residual."""
    memory: Tensor | None = None
    for rows in tasks:
        count = gpm_rank(rows, memory, threshold)
        activations = double(rows).T
        residual = activations if memory is None else activations - memory @ (memory.T @ activations)
        left = torch.linalg.svd(residual, full_matrices=False)[0][:, :count]
        memory = left if memory is None else torch.linalg.qr(torch.cat([memory, left], dim=1))[0]
    assert memory is not None
    return memory


def sgp(tasks: list[Tensor], threshold: float, alpha: float) -> tuple[Tensor, Tensor]:
    """SGP's memory `[s, k]` and importances `[k]` (Saha and Roy 2023, eq. 5 to 9), by singular value decompositions."""
    memory, importance = torch.zeros(double(tasks[0]).shape[1], 0, dtype=torch.float64), []
    for rows in tasks:
        R = double(rows).T
        count = gpm_rank(rows, memory if memory.shape[1] else None, threshold)
        left, fresh, _ = torch.linalg.svd(R - memory @ (memory.T @ R), full_matrices=False)
        singular = []
        if memory.shape[1]:
            rotated, inside, _ = torch.linalg.svd(memory @ (memory.T @ R), full_matrices=False)
            for j in range(memory.shape[1]):
                energy = sum(float((memory[:, j] @ rotated[:, i]) * inside[i]) ** 2 for i in range(len(inside)))
                singular.append(energy**0.5)
        singular += fresh[:count].tolist()
        new = [(alpha + 1) * value / (alpha * value + max(singular)) for value in singular]
        importance = [min(1.0, a + b) for a, b in zip([*importance, *[0.0] * count], new, strict=True)]
        memory = torch.linalg.qr(torch.cat([memory, left[:, :count]], dim=1))[0] if count else memory
    return memory, torch.tensor(importance, dtype=torch.float64)


def trgp(tasks: list[Tensor], threshold: float) -> tuple[Tensor, list[list[int]]]:
    """TRGP's memory `[s, k]` and, per task, the columns of it that are the task's subspace (Lin et al. 2022)."""
    memory, subspaces = torch.zeros(double(tasks[0]).shape[1], 0, dtype=torch.float64), []
    for rows in tasks:
        R = double(rows).T
        left, fresh, _ = torch.linalg.svd(R - memory @ (memory.T @ R), full_matrices=False)
        energies = [(float((memory[:, j] @ R).square().sum()), j) for j in range(memory.shape[1])]
        energies += [(float(value) ** 2, memory.shape[1] + j) for j, value in enumerate(fresh)]
        reached, chosen = 0.0, []
        for energy, place in sorted(energies, key=lambda item: -item[0]):
            if reached < threshold * float(R.square().sum()):
                reached, chosen = reached + energy, [*chosen, place]
        number = sum(place >= memory.shape[1] for place in chosen)
        subspaces.append(sorted(chosen))
        memory = torch.cat([memory, left[:, :number]], dim=1)
    return memory, subspaces


def conceptor(rows: Tensor, aperture: float) -> Tensor:
    """`R (R + aperture^-2 I)^-1` `[s, s]` with `R = X^T X / n` (Jaeger 2014)."""
    R = double(rows).T @ double(rows) / len(rows)
    return R @ torch.linalg.inv(R + aperture**-2 * torch.eye(len(R), dtype=torch.float64))


def conceptor_and(C: Tensor, B: Tensor) -> Tensor:
    """`C and B`: the inverse of `C^+ + B^+ - I` on the intersection of both ranges (Jaeger 2014, section 3.9)."""
    eye = torch.eye(len(C), dtype=torch.float64)
    kernels = [vectors[:, values <= 1e-10] for values, vectors in map(torch.linalg.eigh, (C, B))]
    values, vectors = torch.linalg.eigh(sum(kernel @ kernel.T for kernel in kernels))
    common = vectors[:, values <= 1e-10]
    inverse = torch.linalg.pinv(C, rtol=1e-12, hermitian=True) + torch.linalg.pinv(B, rtol=1e-12, hermitian=True) - eye
    return common @ torch.linalg.inv(common.T @ inverse @ common) @ common.T


def conceptor_or(C: Tensor, B: Tensor) -> Tensor:
    """`not(not C and not B)`."""
    eye = torch.eye(len(C), dtype=torch.float64)
    return eye - conceptor_and(eye - C, eye - B)


def code_cl(tasks: list[Tensor], aperture: float, gain: float, floor: float) -> Tensor:
    """CODE-CL's conceptor `[s, s]` after all tasks: adapted aperture, OR, small singular values cut off."""
    merged: Tensor | None = None
    for rows in tasks:
        wide, C = aperture, conceptor(rows, aperture)
        while float((C @ double(rows).T).norm() / double(rows).norm()) < gain:
            wide *= 1.1
            C = conceptor(rows, wide)
        merged = C if merged is None else conceptor_or(merged, C)
        values, vectors = torch.linalg.eigh((merged + merged.T) / 2)
        merged = (vectors * torch.where(values < floor, 0.0, values)) @ vectors.T
    assert merged is not None
    return merged


def gnsp_moment(tasks: list[list[Tensor]]) -> Tensor:
    """GNSP's merged matrix `[s, s]`: batches of rows and tasks each divided by their Frobenius norm, then summed."""
    merged = 0.0
    for batches in tasks:
        task = 0.0
        for rows in batches:
            gram = double(rows).T @ double(rows)
            task = task + gram / torch.sqrt((gram**2).sum())
        merged = merged + task / torch.sqrt((task**2).sum())
    return merged


def gnsp_rank(moment: Tensor, rho: float) -> int:
    """`min {k: sum_{i >= k} S_i / sum S < rho}` with a loop over singular values."""
    singular = torch.linalg.svdvals(double(moment)).tolist()
    for k in range(len(singular) + 1):
        if sum(singular[k:]) / sum(singular) < rho:
            return k
    raise AssertionError("unreachable: the empty tail is below rho")


def nscl_rank(eigenvalues: list[float], a: float) -> int:
    """Directions outside Adam-NSCL's null space `{l <= a l_min}` (Wang et al. 2021)."""
    smallest = min(eigenvalues)
    return sum(1 for value in eigenvalues if not value <= a * smallest)


def budget_ranks(shares: dict[str, list[float]], budget: int) -> dict[str, int]:
    """One direction at a time from whichever weight holds the most, while the budget lasts."""
    taken = dict.fromkeys(shares, 0)
    for _ in range(budget):
        open_keys = [key for key in sorted(shares) if taken[key] < len(shares[key])]
        if not open_keys:
            break
        best = max(open_keys, key=lambda key: shares[key][taken[key]])
        taken[best] += 1
    return taken


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles, descending, from the cosines' singular values (inexact below 1e-7, which is enough for a twin)."""
    cosines = torch.linalg.svdvals(double(first).mH @ double(second))
    return torch.arccos(cosines.clamp(-1, 1)).sort(descending=True).values


def orthogonality_error(basis: Tensor) -> float:
    """Return `||U^H U - I||_2`, the largest over a stack `[..., s, k]`; zero columns are ignored."""
    if basis.numel() == 0:
        return 0.0
    wide = basis.to(torch.complex128 if basis.is_complex() else torch.float64)
    gram = wide.mH @ wide
    used = (gram.diagonal(dim1=-2, dim2=-1).abs() > 0).to(gram.dtype)
    return float(torch.linalg.matrix_norm(gram - torch.diag_embed(used), ord=2).amax())
