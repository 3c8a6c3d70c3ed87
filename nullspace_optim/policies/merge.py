"""From second moments to bases: the stored basis of one weight's side grows, or is chosen anew, by one task.

Two phases, so that a policy can see all weights before it decides: `examine` diagonalises, `Policy.ranks` decides,
`choose` builds. Shapes: second moments `K` `[g, s, s]`, bases `U` `[g, s, k]`, zero padded where groups differ in
rank.

Appending follows GPM (Saha et al. 2021): the new directions are eigenvectors of the residual
`(I - U U^H) K (I - U U^H)`. They are found in coordinates of the complement `N` of `U`, as those of `N^H K N`, so
they cannot fall back into the span of `U` where the residual is all rounding. Accumulating follows Adam-NSCL and
GNSP: eigenvectors of a sum over tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConsolidationError, ShapeError
from ..linalg import complement, eigh, largest_eigenvalue, polish
from .base import Policy, Spectrum


@dataclass(frozen=True)
class Candidate:
    """Everything that is known of one side of one weight before the policy decides.

    `moment` `[g, s, s]` is the new task's, `covariance` `[g, s, s]` the merged one (accumulate only). `values`
    `[g, s]` are what the policy sees, zero padded; `vectors` are the eigenvectors of each group, `[s, s]`, or in
    coordinates of the complement `frames` `[s, s - kept]` of the stored basis, `[s - kept, s - kept]`.
    """

    name: str
    moment: Tensor
    covariance: Tensor | None
    values: Tensor
    vectors: tuple[Tensor, ...]
    frames: tuple[Tensor, ...] | None
    spectra: tuple[Spectrum, ...]


@dataclass(frozen=True)
class Choice:
    """A side after one more task.

    `basis` `[g, s, k]` float32 (complex64) with `ranks` per group; `spectrum` `[g, s]` the eigenvalues the policy
    saw; `energy` the share of the new task's energy inside `basis`; `dropped` the share of the old directions that is
    no longer in it (0 when appending); `covariance` `[g, s, s]` to hand to the next `examine` (accumulate only).
    """

    basis: Tensor
    ranks: tuple[int, ...]
    spectrum: Tensor
    energy: float
    dropped: float
    covariance: Tensor | None


def examine(
    policy: Policy,
    moment: Tensor,
    rows: Sequence[int],
    basis: Tensor | None = None,
    covariance: Tensor | None = None,
    *,
    name: str = "",
) -> Candidate:
    """Diagonalise the new task's second moment `[g, s, s]` of `rows` `[g]` rows against what is stored.

    `basis` `[g, s, k]` and `covariance` `[g, s, s]` are those of the last `Choice`, `None` for the first task.

    Raises:
        ShapeError: the stored tensors do not fit `moment`.
        ConsolidationError: the second moment is not finite or cannot be diagonalised.
    """
    for stored in (basis, covariance):
        if stored is not None and stored.shape[:2] != moment.shape[:2]:
            raise ShapeError(
                f"'{name}' has stored shape {tuple(stored.shape)} but the new second moment is {tuple(moment.shape)}; "
                "the layer's input size changed: release it or load the matching bases"
            )
    if policy.merge == "accumulate":
        return _examine_sum(moment, policy.accumulated(covariance, moment), rows, name)
    return _examine_residual(moment, rows, basis, name)


def choose(candidate: Candidate, take: Sequence[int], basis: Tensor | None = None) -> Choice:
    """Return the side's new basis from the policy's decision `take`, one number per group.

    Appended columns follow the stored columns `basis` `[g, s, k]`, which stay bitwise as they are.

    Raises:
        ConsolidationError: `take` asks for more directions than are free, or for a negative number.
    """
    for number, spectrum in zip(take, candidate.spectra, strict=True):
        if not 0 <= number <= spectrum.free:
            raise ConsolidationError(
                f"the policy takes {number} directions of '{candidate.name}', expected 0 to "
                f"{spectrum.free}; correct its ranks()"
            )
    ranks = tuple(spectrum.kept + number for spectrum, number in zip(candidate.spectra, take, strict=True))
    grown = _grown(candidate, take, ranks, basis)
    accumulate = candidate.covariance is not None
    return Choice(
        basis=grown,
        ranks=ranks,
        spectrum=candidate.values,
        energy=_energy_inside(candidate.moment, grown) if accumulate else _energy_taken(candidate.spectra, take),
        dropped=_dropped(basis, grown) if accumulate and basis is not None else 0.0,
        covariance=candidate.covariance,
    )


def _examine_sum(moment: Tensor, covariance: Tensor, rows: Sequence[int], name: str) -> Candidate:
    """Diagonalise the merged second moment; nothing counts as covered or kept."""
    values, vectors = eigh(covariance, name=name)
    spectra = tuple(
        Spectrum(value, float(value.double().sum()), float(value[0]), covered=0.0, kept=0, rows=int(count))
        for value, count in zip(values, rows, strict=True)
    )
    return Candidate(name, moment, covariance, values, tuple(vectors), None, spectra)


def _examine_residual(moment: Tensor, rows: Sequence[int], basis: Tensor | None, name: str) -> Candidate:
    """Diagonalise the new task's second moment outside the stored basis, group by group."""
    groups, size = moment.shape[:2]
    kept = (basis != 0).any(dim=1).sum(dim=1).tolist() if basis is not None else [0] * groups
    if basis is None or not any(kept):
        values, whole = eigh(moment, name=name)
        spectra = tuple(_spectrum(moment[i], values[i], float(values[i, 0]), 0, int(rows[i])) for i in range(groups))
        return Candidate(name, moment, None, values, tuple(whole), None, spectra)
    found = []
    for group in range(groups):
        frame = complement(basis[group]).to(moment)
        residual = frame.mH @ moment[group] @ frame
        largest = float(largest_eigenvalue(moment[group]))
        found.append((frame, largest, *eigh(residual, name=name, scale=largest)))
    values = torch.stack([torch.cat([value, value.new_zeros(size - len(value))]) for _, _, value, _ in found])
    spectra = tuple(
        _spectrum(moment[i], values[i], largest, kept[i], int(rows[i])) for i, (_, largest, _, _) in enumerate(found)
    )
    frames, vectors = tuple(item[0] for item in found), tuple(item[3] for item in found)
    return Candidate(name, moment, None, values, vectors, frames, spectra)


def _spectrum(moment: Tensor, values: Tensor, largest: float, kept: int, rows: int) -> Spectrum:
    """Describe residual eigenvalues `[s]` of one group's second moment `[s, s]`."""
    total = float(moment.diagonal().real.double().sum())
    covered = 1.0 - float(values.double().sum()) / total if total > 0 else 1.0
    return Spectrum(values, total, largest, max(covered, 0.0) if kept or total <= 0 else 0.0, kept, rows)


def _grown(candidate: Candidate, take: Sequence[int], ranks: tuple[int, ...], basis: Tensor | None) -> Tensor:
    """Return the stored columns, if they count as kept, followed by the taken eigenvectors: `[g, s, max(ranks)]`."""
    moment = candidate.moment
    dtype = torch.complex64 if moment.is_complex() else torch.float32
    grown = torch.zeros(*moment.shape[:2], max(ranks, default=0), dtype=dtype, device=moment.device)
    for group, (spectrum, number) in enumerate(zip(candidate.spectra, take, strict=True)):
        stored = grown[group, :, : spectrum.kept]
        if basis is not None:
            stored.copy_(basis[group, :, : spectrum.kept])
        if number:
            frame = candidate.frames[group] if candidate.frames is not None else None
            fresh = _fresh(candidate.vectors[group][:, :number], frame, stored)
            grown[group, :, spectrum.kept : ranks[group]] = fresh
    return grown


def _fresh(vectors: Tensor, frame: Tensor | None, stored: Tensor) -> Tensor:
    """Return taken eigenvectors as orthonormal columns `[s, t]`, orthogonal to the stored ones `[s, k]`."""
    if frame is None:
        return polish(vectors)
    double = torch.complex128 if vectors.is_complex() else torch.float64
    fresh, stored = frame.to(double) @ vectors.to(double), stored.to(double)
    return polish(fresh - stored @ (stored.mH @ fresh))


def _energy_taken(spectra: Sequence[Spectrum], take: Sequence[int]) -> float:
    """Return the share of the new task's energy, over all groups, that is covered or taken (1 if it has none)."""
    total = sum(spectrum.total for spectrum in spectra)
    inside = sum(
        spectrum.covered * spectrum.total + float(spectrum.values[:number].double().sum())
        for spectrum, number in zip(spectra, take, strict=True)
    )
    return min(inside / total, 1.0) if total > 0 else 1.0


def _energy_inside(moment: Tensor, basis: Tensor) -> float:
    """Return `tr(U^H K U) / tr K` over all groups (1 if the task has no energy)."""
    total = float(moment.diagonal(dim1=1, dim2=2).real.double().sum())
    inside = float((basis.to(moment.dtype).conj() * (moment @ basis.to(moment.dtype))).real.double().sum())
    return min(inside / total, 1.0) if total > 0 else 1.0


def _dropped(old: Tensor, new: Tensor) -> float:
    """Return the share of the old directions that the new basis has lost: `1 - ||U_old^H U||_F^2 / k_old`."""
    kept = int((old != 0).any(dim=1).sum())
    return max(0.0, 1.0 - float((old.mH @ new).abs().double().square().sum()) / kept) if kept else 0.0
