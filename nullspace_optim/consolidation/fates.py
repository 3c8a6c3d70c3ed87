"""Fates of all parameters after one more task, and the bases that go with them.

Input: the statistics that `Capture` has of each parameter. A weight whose rows are known grows its basis by what the
policy takes; a parameter that was used in any other way is frozen; one that was not read stays free. Fates only get
stricter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..covariance.accumulator import Moment, ParameterStatistics
from ..covariance.second_moment import SecondMoment
from ..covariance.sketch import FrequentDirections
from ..distributed.communicator import Communicator
from ..distributed.failures import raise_on_all_ranks
from ..distributed.group import local_tensor
from ..errors import ConsolidationError
from ..policies.base import Policy, Spectrum
from ..report import ParameterReport
from ..settings import Settings
from ..subspace.basis import Basis, BasisStore, Fate, Subspace, all_kept
from ..subspace.growth import widen
from ..subspace.layout import Layout, MatrixSide, Side
from ..subspace.matrix import matrix_of
from ..subspace.shards import ShardView, gather_parameter, shard_view
from ..subspace.tables import clear_of_rows, freeze_rows
from .grow import Eigenbasis, GrownBasis, decompose, grow_basis
from .grow_rows import decompose_rows, decompose_sketch

Key = tuple[str, MatrixSide]
Groups = Mapping[Any, list[Key]]


@dataclass(frozen=True)
class Use:
    """One side of one weight: the new task's second moment and the subspace stored before."""

    moment: Moment
    before: Subspace | None
    tasks: int = 0

    @property
    def identity(self) -> tuple[int, ...]:
        """Equal for weights that met the same rows and share one stored basis: their new basis is the same."""
        before = self.before
        return id(self.moment), *((id(before.basis), id(before.scale)) if before else ()), self.tasks


def settle_fates(
    parameters: Mapping[str, Tensor],
    captured: Mapping[str, ParameterStatistics],
    store: BasisStore,
    task: str,
    options: Settings,
    ranks: Communicator,
    *,
    progress: bool = False,
) -> tuple[BasisStore, list[ParameterReport]]:
    """Return a store that protects `task` as well, and one report line a parameter; `store` is unchanged."""
    grown, policy = store.copy(), options.policy
    if policy.from_weights:
        captured = {name: _of_weight(name, parameters, seen) for name, seen in captured.items()}
    before = {name: _widened(store.get(name), captured.get(name), parameters) for name in parameters}
    uses = {
        (name, side): Use(moment, *_before(before[name], side))
        for name, parameter in parameters.items()
        if _grows(captured.get(name), before[name], parameter)
        for side, moment in captured[name].sides.items()
    }
    title = f"directions of {task}" if progress else None
    choices = _choices(policy, uses, next(iter(parameters.values())).device, ranks, title)
    rows = []
    for name, parameter in parameters.items():
        seen, old = captured.get(name), before[name]
        mine = {side: choice for (owner, side), choice in choices.items() if owner == name}
        if seen is not None and _grows(seen, old, parameter):
            bias = parameters[seen.bias] if seen.bias else None
            basis = _protected(name, parameter, bias, seen, old, mine, task, policy, ranks)
        else:
            basis = _settled(name, parameter, seen, old, options.uncovered)
        grown.put(basis)
        rows.append(_line(parameter, basis, old, mine, seen))
    return grown, _freeze_orphaned_biases(parameters, store, grown, rows)


def _of_weight(name: str, parameters: Mapping[str, Tensor], seen: ParameterStatistics) -> ParameterStatistics:
    """Return what was seen of a weight with its own second moments, on both sides, in the place of its rows'."""
    if not seen.sides:
        return seen
    weight, layout = gather_parameter(parameters[name]), seen.layout or Layout()
    bias = gather_parameter(parameters[seen.bias]) if seen.bias else None
    with torch.no_grad(), matrix_of(weight, layout, bias, write=False) as matrix:
        wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
        right = SecondMoment.of(wide.mT @ wide.conj(), wide.shape[1])
        left = SecondMoment.of(wide @ wide.mH, wide.shape[2])
    return replace(seen, sides={"right": right, "left": left})


def _widened(old: Basis | None, seen: ParameterStatistics | None, parameters: Mapping[str, Tensor]) -> Basis | None:
    """Return what is stored of a parameter, for all of it if it has grown and the task read it."""
    if old is None or seen is None or not seen.met:
        return old
    return widen(old, parameters[old.name], parameters.get(old.bias) if old.bias else None)


def _before(old: Basis | None, side: MatrixSide) -> tuple[Subspace | None, int]:
    """Return what is stored of one side, and of how many tasks."""
    return (None, 0) if old is None else (old.subspaces.get(side), len(old.tasks))


def _freeze_orphaned_biases(
    parameters: Mapping[str, Tensor], before: BasisStore, grown: BasisStore, rows: list[ParameterReport]
) -> list[ParameterReport]:
    """Freeze joint biases whose weight was protected in `before` and is frozen in `grown`."""
    lost = {old.bias for name, old in before.items() if old.bias and name in grown and grown[name].bias is None}
    for number, row in enumerate(rows):
        basis = grown[row.name]
        if row.name in lost and basis.kept is None:
            reason = "protected together with a weight that is frozen from now on"
            kept = local_tensor(parameters[row.name]).clone()
            frozen = Basis(
                row.name, tuple(parameters[row.name].shape), Fate.FROZEN, reason, tasks=basis.tasks, kept=kept
            )
            grown.put(frozen)
            rows[number] = replace(_line(parameters[row.name], frozen, basis, {}, None), met=row.met)
    return rows


def _grows(seen: ParameterStatistics | None, old: Basis | None, parameter: Tensor) -> bool:
    """Return whether a parameter's basis can grow by what was seen."""
    if seen is None or not seen.met or seen.reasons or (old and old.fate in (Fate.FROZEN, Fate.FULL)):
        return False
    return not _conflict(seen, old, parameter)


def _conflict(seen: ParameterStatistics, old: Basis | None, parameter: Tensor) -> str:
    """Return why this task's use of a weight cannot be joined with its stored basis, or an empty string."""
    if old is None or not old.subspaces:
        return ""
    if old.shape != tuple(parameter.shape):
        return f"grown from {old.shape} otherwise than by whole groups with their bias"
    if seen.layout != old.layout:
        return "used with another layout than in an earlier task"
    if seen.bias != old.bias:
        return "used with another bias than in an earlier task"
    return ""


def _choices(
    policy: Policy, uses: Mapping[Key, Use], device: torch.device, ranks: Communicator, title: str | None
) -> dict[Key, GrownBasis]:
    """Apply the policy; weights that share rows and basis share the result.

    Only a joint policy needs the eigenvectors of all weights at once; otherwise one weight at a time is held. Each rank
    decides on the second moments that it owns; the results are broadcast.
    """
    groups: dict[tuple[int, ...], list[Key]] = {}
    for key, use in uses.items():
        groups.setdefault(use.identity, []).append(key)
    work = _joint_choices if policy.joint else _single_choices
    heads = [members[0] for members in groups.values()]
    chosen = work(policy, {key: uses[key] for key in heads}, groups, ranks, title)
    choices = ranks.broadcast_from_owners(
        [chosen.get(key) for key in heads], [uses[key].moment.owner for key in heads], device
    )
    return {key: choice for members, choice in zip(groups.values(), choices, strict=True) for key in members}


def _mine(uses: Mapping[Key, Use], ranks: Communicator, title: str | None) -> Iterable[tuple[Key, Use]]:
    """Yield the uses whose second moment this rank holds (all in one process), under a bar if it has a `title`."""
    mine = [(key, use) for key, use in uses.items() if use.moment.owner == ranks.rank]
    return tqdm(mine, desc=title, disable=title is None, leave=False)


def _single_choices(
    policy: Policy, uses: Mapping[Key, Use], groups: Groups, ranks: Communicator, title: str | None
) -> dict[Key, GrownBasis]:
    """Decide on one weight after the other: the eigenvectors of one are held at a time."""
    choices: dict[Key, GrownBasis] = {}
    with raise_on_all_ranks():
        for key, use in _mine(uses, ranks, title):
            candidate = _examined(policy, use, key)
            choices[key] = _chosen(candidate, _ranks(policy, {key: candidate.spectra})[key], use)
            del candidate  # before the next one is found
    return choices


def _joint_choices(
    policy: Policy, uses: Mapping[Key, Use], groups: Groups, ranks: Communicator, title: str | None
) -> dict[Key, GrownBasis]:
    """Decide on the spectra of all weights at once."""
    with raise_on_all_ranks():
        candidates = {key: _examined(policy, use, key) for key, use in _mine(uses, ranks, title)}
    known = ranks.all_gather_object({key: candidate.spectra for key, candidate in candidates.items()})
    spectra = {key: found for part in known for key, found in part.items()}
    with raise_on_all_ranks():
        taken = _ranks(policy, {member: spectra[members[0]] for members in groups.values() for member in members})
        return {key: _chosen(candidate, taken[key], uses[key]) for key, candidate in candidates.items()}


def _examined(policy: Policy, use: Use, key: Key) -> Eigenbasis:
    before = use.before
    stored = (before.basis, before.covariance) if before else (None, None)
    scale = before.scale if before else None
    rows = use.moment.rows.tolist()
    if isinstance(use.moment, FrequentDirections):
        return decompose_sketch(
            policy, use.moment.factor, use.moment.trace(), rows, stored[0], tasks=use.tasks, name=key[0]
        )
    few = use.moment.factor if policy.merge == "append" else None
    if few is not None:
        return decompose_rows(policy, few, rows, stored[0], tasks=use.tasks, name=key[0])
    return decompose(policy, use.moment.matrix, rows, *stored, scale=scale, tasks=use.tasks, name=key[0])


def _chosen(candidate: Eigenbasis, ranks: tuple[int, ...], use: Use) -> GrownBasis:
    before = use.before
    if isinstance(use.moment, FrequentDirections):  # more directions than it has are not known
        ranks = tuple(min(rank, spectrum.above(0.0)) for rank, spectrum in zip(ranks, candidate.spectra, strict=True))
    return grow_basis(candidate, ranks, *((before.basis, before.scale) if before else (None, None)))


def _ranks(policy: Policy, spectra: Mapping[Key, tuple[Spectrum, ...]]) -> dict[Key, tuple[int, ...]]:
    named = {
        f"{name}/{side}/{group}": spectrum
        for (name, side), found in spectra.items()
        for group, spectrum in enumerate(found)
    }
    ranks = policy.ranks(named)
    return {
        (name, side): tuple(ranks[f"{name}/{side}/{group}"] for group in range(len(found)))
        for (name, side), found in spectra.items()
    }


def _settled(
    name: str, parameter: Tensor, seen: ParameterStatistics | None, old: Basis | None, uncovered: str
) -> Basis:
    """Return the basis of a parameter that does not grow: as it was, free, or frozen."""
    if old is not None and old.fate in (Fate.FROZEN, Fate.FULL):
        return old
    shape = tuple(parameter.shape)
    if seen is None or not seen.met:
        return old or Basis(name, shape, Fate.FREE, "not read by any consolidated forward pass")
    reason = "; ".join(seen.reasons) or _conflict(seen, old, parameter)
    if uncovered == "train":
        text = f'{reason}; trained all the same (uncovered="train"): old outputs may move'
        return old if old is not None and old.subspaces else Basis(name, shape, Fate.FREE, text)
    return Basis(name, shape, Fate.FROZEN, reason, kept=local_tensor(parameter).clone())


def _protected(
    name: str,
    parameter: Tensor,
    bias: Tensor | None,
    seen: ParameterStatistics,
    old: Basis | None,
    choices: Mapping[MatrixSide, GrownBasis],
    task: str,
    policy: Policy,
    ranks: Communicator,
) -> Basis:
    """Return the grown basis with its anchors."""
    layout = seen.layout or Layout()
    subspaces: dict[Side, Subspace] = dict(old.subspaces) if old else {}
    part = shard_view(parameter, layout, joint=bias is not None)
    with torch.no_grad(), matrix_of(parameter, layout, bias, write=False) as matrix:
        for side, choice in choices.items():
            tasks = len(old.tasks) if old else 0
            subspaces[side] = _anchored(matrix, part, side, choice, subspaces.get(side), tasks)
        if seen.row_counts is not None:
            counts = seen.row_counts.to(matrix.device)
            chosen = _chosen_rows(counts, policy, subspaces.get("rows"))
            subspaces["rows"] = freeze_rows(matrix, part, counts, chosen, subspaces.get("rows"))
        if {"rows", "left"} <= set(subspaces):
            subspaces["left"] = clear_of_rows(matrix, part, subspaces["left"], subspaces["rows"], name, ranks)
    if set(part.crossing) & set(subspaces) and any(s.scale is not None for s in subspaces.values()):
        _refuse_soft_crossing(name, subspaces)
    full = all_kept(subspaces)
    basis = Basis(
        name=name,
        shape=tuple(parameter.shape),
        fate=Fate.FULL if full else Fate.PROTECTED,
        reason=_why(full, bool(subspaces), task),
        layout=layout,
        subspaces=subspaces,
        tasks=(*(old.tasks if old else ()), task),
        bias=seen.bias,
        kept=local_tensor(parameter).clone() if full and bias is None else None,
    )
    basis.history = (*(old.history if old else ()), basis.rank)
    basis.energies = (*(old.energy(name) for name in old.tasks), basis.energy(task)) if old else (basis.energy(task),)
    return basis


def _refuse_soft_crossing(name: str, subspaces: Mapping[Side, Subspace]) -> None:
    if len(subspaces) > 1:
        raise ConsolidationError(
            f"'{name}' is kept softly on the sides {' and '.join(subspaces)}, one of which crosses ranks: shard it "
            "along its other dimension (shard_placement_fn of fully_shard), or use a policy that is not soft"
        )


def _why(full: bool, own: bool, task: str) -> str:
    if not own:
        return "protected together with the weight it is added to"
    return f"no free direction left after task '{task}'" if full else "its inputs are known"


def _anchored(
    matrix: Tensor, part: ShardView, side: MatrixSide, choice: GrownBasis, old: Subspace | None, tasks: int
) -> Subspace:
    """Anchor a grown basis; columns that were protected before keep the anchor they had."""
    anchors = part.anchor(matrix, choice.basis, side)
    if old is not None and not choice.renewed:
        for group, rank in enumerate(part.ranks(old.ranks)):
            kept = (group, slice(None), slice(rank)) if side == "right" else (group, slice(rank))
            anchors[kept] = old.anchor[kept].to(anchors)
    return Subspace(
        side=side,
        basis=choice.basis,
        anchor=anchors,
        ranks=choice.ranks,
        size=choice.basis.shape[1],
        spectrum=choice.spectrum,
        energy=choice.energy,
        covariance=choice.covariance,
        scale=choice.scale,
        members=_member_rows(choice, old, tasks),
    )


def _member_rows(choice: GrownBasis, old: Subspace | None, tasks: int) -> Tensor | None:
    """Return which directions span which task's own subspace, `[tasks + 1, g, k]`, or `None` without members."""
    if choice.members is None:
        return None
    members = choice.members.new_zeros(tasks + 1, *choice.members.shape)
    if old is not None and old.members is not None:
        members[:tasks, :, : old.members.shape[2]] = old.members
    members[tasks] = choice.members
    return members


def _chosen_rows(counts: Tensor, policy: Policy, old: Subspace | None) -> Tensor:
    """Return the mask `[n]` of the rows that `policy` chooses by `counts` `[n]`, and of those that were kept before."""
    kept = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    if old is not None:
        kept[old.basis] = True
    mask = policy.rows(counts, kept)
    if mask.dtype != torch.bool or mask.shape != counts.shape:
        found = f"{type(policy).__name__}.rows() returned {mask.dtype} {list(mask.shape)}"
        raise ConsolidationError(f"{found}, expected a mask, torch.bool [{len(counts)}]")
    return kept | mask


def _line(
    parameter: Tensor,
    basis: Basis,
    old: Basis | None,
    choices: Mapping[MatrixSide, GrownBasis],
    seen: ParameterStatistics | None,
) -> ParameterReport:
    """Return the report's line of one parameter."""
    met = seen is not None and seen.met
    line = ParameterReport(basis.name, basis.fate, basis.reason, numbers=parameter.numel(), still=basis.still, met=met)
    if not basis.subspaces:
        return line
    return replace(
        line,
        side="+".join(basis.subspaces),
        rank=basis.rank,
        dimension=basis.dimension,
        added=basis.rank - (old.rank if old else 0),
        energy=min(subspace.energy for subspace in basis.subspaces.values()),
        dropped=max((choice.dropped for choice in choices.values()), default=0.0),
        held=basis.held if basis.held < basis.rank else None,
        leading=max((_leading(choice.spectrum) for choice in choices.values()), default=float("nan")),
    )


def _leading(spectrum: Tensor) -> float:
    """Return the largest share of its group's energy that one of the eigenvalues `[g, s]` has."""
    values = spectrum.double().clamp_min(0)
    return float((values.amax(-1) / values.sum(-1).clamp_min(1e-300)).max()) if values.numel() else float("nan")
