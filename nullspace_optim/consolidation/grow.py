"""From second moments to bases: the stored basis of one weight's side grows, or is chosen anew, by one task.

Two phases, so that a policy may decide on all weights together: `decompose` diagonalises, `Policy.ranks` decides,
`grow_basis` builds. Shapes: second moments `K` `[g, s, s]`, bases `U` `[g, s, k]`, zero padded where groups differ in
rank.

Appending follows GPM (Saha et al. 2021): the new directions are eigenvectors of the residual
`(I - U U^H) K (I - U U^H)`. They are found in coordinates of the complement `N` of `U`, as those of `N^H K N`, so
they cannot fall back into the span of `U` where the residual is all rounding. Accumulating follows Adam-NSCL and
GNSP: eigenvectors of a sum over tasks. The Boolean OR of conceptors `C = U diag(s) U^H` (Jaeger 2014) is a sum as well:
`odds(C or B) = odds(C) + odds(B)` with `odds(C) = C (I - C)^-1`, so directions and scales are all that is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConsolidationError, ShapeError
from ..policies.base import Policy, Spectrum
from ..subspace.conceptors import odds_of
from ..subspace.linalg import append_directions, complement, eigh, largest_eigenvalue

_SMALLEST = 1e-8  # share of the largest eigenvalue below which directions found from products are made orthonormal


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors of one side of one weight, from which the policy chooses.

    `moment` `[g, s, s]` is the new task's, `covariance` `[g, s, s]` the merged one (accumulate only). `values`
    `[g, s]` are what the policy sees, zero padded; `vectors` are the eigenvectors of each group, `[s, s]`, or in
    coordinates of the complement `frames` `[s, s - kept]` of the stored basis, `[s - kept, s - kept]`. With `few`,
    `moment` are the rows themselves, `[g, n, s]`, and `frames` their parts outside the stored basis, `[s, n]`.
    """

    name: str
    policy: Policy
    moment: Tensor
    covariance: Tensor | None
    values: Tensor
    vectors: tuple[Tensor, ...]
    frames: tuple[Tensor, ...] | None
    spectra: tuple[Spectrum, ...]
    few: bool = False

    @property
    def trace(self) -> float:
        """Energy of the new task over all groups."""
        parts = self.moment.abs().square() if self.few else self.moment.diagonal(dim1=1, dim2=2).real
        return float(parts.double().sum())

    def along(self, basis: Tensor) -> Tensor:
        """Return the new task's energy `u^H K u` of every column of `basis` `[g, s, k]`, float64 `[g, k]`."""
        if not self.few:
            return _energies(self.moment, basis)
        return (self.moment.conj() @ basis.to(self.moment)).abs().double().square().sum(1)


@dataclass(frozen=True)
class GrownBasis:
    """A side after one more task.

    `basis` `[g, s, k]` float32 (complex64) with `ranks` per group; `spectrum` `[g, s]` the eigenvalues the policy
    saw; `energy` the share of the new task's energy inside `basis`; `dropped` the share of the old directions that is
    no longer in it (0 when appending); `covariance` `[g, s, s]` to hand to the next `decompose` (accumulate only);
    `scale` `[g, k]` the share by which each direction is kept, `None`: fully; `members` `[g, k]` the mask of directions
    that span the new task's own subspace, if the policy has one; `renewed`: stored columns were replaced.
    """

    basis: Tensor
    ranks: tuple[int, ...]
    spectrum: Tensor
    energy: float
    dropped: float
    covariance: Tensor | None
    scale: Tensor | None = None
    members: Tensor | None = None
    renewed: bool = False


def decompose(
    policy: Policy,
    moment: Tensor,
    rows: Sequence[int],
    basis: Tensor | None = None,
    covariance: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    tasks: int = 0,
    name: str = "",
) -> Eigenbasis:
    """Diagonalise the new task's second moment `[g, s, s]` of `rows` `[g]` rows against what is stored.

    `basis` `[g, s, k]`, `covariance` `[g, s, s]` and `scale` `[g, k]` are those of the last `GrownBasis`, `None`
    for the first task; `tasks` counts the tasks before.

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
    if policy.merge == "append":
        return _examine_residual(policy, moment, rows, basis, tasks, name)
    if policy.merge == "accumulate":
        return _examine_sum(policy, moment, policy.accumulated(covariance, moment), rows, tasks, name)
    odds = policy.odds(moment, torch.as_tensor(rows))
    return _examine_sum(
        policy, moment, odds if basis is None else odds + odds_of(basis, scale).to(odds), rows, tasks, name
    )


def grow_basis(
    candidate: Eigenbasis, take: Sequence[int], basis: Tensor | None = None, scale: Tensor | None = None
) -> GrownBasis:
    """Return the side's new basis from the policy's decision `take`, one number per group.

    Appended columns follow the stored columns `basis` `[g, s, k]`, which stay bitwise as they are; `scale` `[g, k]`
    are the shares by which they were kept.

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
    renewed = candidate.policy.merge != "append"
    scales = _scales(candidate, take, grown, None if renewed else scale)
    exact = not renewed and scales is None
    return GrownBasis(
        basis=grown,
        ranks=ranks,
        spectrum=candidate.values,
        energy=_energy_taken(candidate.spectra, take) if exact else _energy_inside(candidate, grown, scales),
        dropped=_dropped(basis, grown) if renewed and basis is not None else 0.0,
        covariance=candidate.covariance,
        scale=scales,
        members=_members(candidate, take, grown),
        renewed=renewed,
    )


def _scales(candidate: Eigenbasis, take: Sequence[int], grown: Tensor, before: Tensor | None) -> Tensor | None:
    """Return the scales `[g, k]` of all directions, zero padded like the basis; `None` if all are kept fully."""
    found = []
    for group, (spectrum, number) in enumerate(zip(candidate.spectra, take, strict=True)):
        old = None if before is None else before[group, : spectrum.kept]
        share = candidate.policy.scale(spectrum, number, old)
        if share is None and old is not None:
            share = torch.cat([old, old.new_ones(number)])
        found.append(share)
    if all(share is None for share in found):
        return None
    scales = torch.zeros(grown.shape[0], grown.shape[2], device=grown.device)
    for target, share, spectrum, number in zip(scales, found, candidate.spectra, take, strict=True):
        target[: spectrum.kept + number] = 1.0 if share is None else share.clamp(0, 1)
    return scales


def _members(candidate: Eigenbasis, take: Sequence[int], grown: Tensor) -> Tensor | None:
    """Return the mask `[g, k]` of directions that span the new task's own subspace; `None` for policies without one."""
    found = [candidate.policy.members(s, number) for s, number in zip(candidate.spectra, take, strict=True)]
    if any(mask is None for mask in found):
        return None
    members = torch.zeros(grown.shape[0], grown.shape[2], dtype=torch.bool, device=grown.device)
    for target, mask in zip(members, found, strict=True):
        assert mask is not None
        target[: len(mask)] = mask
    return members


def _examine_sum(
    policy: Policy, moment: Tensor, merged: Tensor, rows: Sequence[int], tasks: int, name: str
) -> Eigenbasis:
    """Diagonalise the merged second moment (or odds); nothing counts as covered or kept."""
    values, vectors = eigh(merged, name=name)
    spectra = tuple(
        Spectrum(value, float(value.double().sum()), float(value[0]), 0.0, 0, int(count), tasks=tasks, name=name)
        for value, count in zip(values, rows, strict=True)
    )
    covariance = merged if policy.merge == "accumulate" else None
    return Eigenbasis(name, policy, moment, covariance, values, tuple(vectors), None, spectra)


def _examine_residual(
    policy: Policy, moment: Tensor, rows: Sequence[int], basis: Tensor | None, tasks: int, name: str
) -> Eigenbasis:
    """Diagonalise the new task's second moment outside the stored basis, group by group."""
    groups, size = moment.shape[:2]
    kept = (basis != 0).any(dim=1).sum(dim=1).tolist() if basis is not None else [0] * groups
    if basis is None or not any(kept):
        values, whole = eigh(moment, name=name)
        spectra = tuple(
            _spectrum(moment[i], values[i], float(values[i, 0]), int(rows[i]), tasks, name) for i in range(groups)
        )
        return Eigenbasis(name, policy, moment, None, values, tuple(whole), None, spectra)
    found = []
    for group in range(groups):
        frame = complement(basis[group]).to(moment)
        residual = frame.mH @ moment[group] @ frame
        top = float(largest_eigenvalue(moment[group]))
        found.append((frame, top, *eigh(residual, name=name, scale=top)))
    values = torch.stack([torch.cat([value, value.new_zeros(size - len(value))]) for _, _, value, _ in found])
    spectra = tuple(
        _spectrum(moment[i], values[i], top, int(rows[i]), tasks, name, basis[i, :, : kept[i]])
        for i, (_, top, _, _) in enumerate(found)
    )
    frames, vectors = tuple(item[0] for item in found), tuple(item[3] for item in found)
    return Eigenbasis(name, policy, moment, None, values, vectors, frames, spectra)


def _spectrum(
    moment: Tensor, values: Tensor, largest: float, rows: int, tasks: int, name: str, basis: Tensor | None = None
) -> Spectrum:
    """Describe residual eigenvalues `[s]` of one group's second moment `[s, s]` outside the stored `basis` `[s, k]`."""
    total = float(moment.diagonal().real.double().sum())
    covered = 1.0 - float(values.double().sum()) / total if total > 0 else 1.0
    covered = max(covered, 0.0) if basis is not None or total <= 0 else 0.0
    stored = _energies(moment, basis) if basis is not None else moment.new_zeros(0).real.double()
    return Spectrum(values, total, largest, covered, len(stored), rows, stored, tasks, name)


def _energies(moment: Tensor, basis: Tensor) -> Tensor:
    """Return `u^H K u` of every column of `basis` `[..., s, k]`, float64 `[..., k]`."""
    basis = basis.to(moment.dtype)
    return (basis.conj() * (moment @ basis)).real.double().sum(-2)


def _grown(candidate: Eigenbasis, take: Sequence[int], ranks: tuple[int, ...], basis: Tensor | None) -> Tensor:
    """Return the stored columns, if they count as kept, followed by the taken eigenvectors: `[g, s, max(ranks)]`."""
    moment = candidate.moment
    dtype, double = (torch.complex64, torch.complex128) if moment.is_complex() else (torch.float32, torch.float64)
    grown = torch.zeros(*candidate.values.shape, max(ranks, default=0), dtype=dtype, device=moment.device)
    for group, (spectrum, number) in enumerate(zip(candidate.spectra, take, strict=True)):
        stored = grown[group, :, : spectrum.kept]
        if basis is not None:
            stored.copy_(basis[group, :, : spectrum.kept])
        if number:
            known = min(number, spectrum.above(0.0)) if candidate.few else number
            found = candidate.vectors[group][:, :known]
            if candidate.frames is not None:
                found = candidate.frames[group].to(double) @ found.to(double)
            joined = append_directions(stored, found, orthonormal=not candidate.few or _well_apart(spectrum, known))
            grown[group, :, : joined.shape[1]] = joined
            if known < number:  # a rule that takes directions without energy
                grown[group, :, joined.shape[1] : ranks[group]] = complement(joined)[:, : number - known]
    return grown


def _well_apart(spectrum: Spectrum, number: int) -> bool:
    """Return whether rounding leaves the `number` leading directions, found from products of rows, orthonormal."""
    return number == 0 or float(spectrum.values[number - 1]) > _SMALLEST * spectrum.largest


def _energy_taken(spectra: Sequence[Spectrum], take: Sequence[int]) -> float:
    """Return the share of the new task's energy, over all groups, that is covered or taken (1 if it has none)."""
    total = sum(spectrum.total for spectrum in spectra)
    inside = sum(
        spectrum.covered * spectrum.total + float(spectrum.values[:number].double().sum())
        for spectrum, number in zip(spectra, take, strict=True)
    )
    return min(inside / total, 1.0) if total > 0 else 1.0


def _energy_inside(candidate: Eigenbasis, basis: Tensor, scale: Tensor | None) -> float:
    """Return `tr(diag(s) U^H K U) / tr K` over all groups (1 if the task has no energy)."""
    total, energies = candidate.trace, candidate.along(basis)
    inside = float((energies if scale is None else energies * scale).sum())
    return min(inside / total, 1.0) if total > 0 else 1.0


def _dropped(old: Tensor, new: Tensor) -> float:
    """Return the share of the old directions that the new basis has lost: `1 - ||U_old^H U||_F^2 / k_old`."""
    kept = int((old != 0).any(dim=1).sum())
    return max(0.0, 1.0 - float((old.mH @ new).abs().double().square().sum()) / kept) if kept else 0.0
