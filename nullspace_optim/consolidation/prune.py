"""Prune protected directions that carry little energy of any task, within a stated share of every task's energy.

Directions of a basis `U` are orthonormal, so the energy that a task's rows lose with some of them is a plain sum: with
the task's second moment `K` the share of direction `u` is `u^H K u / tr K`. The directions with the smallest shares
(the largest over all tasks counts) are removed for as long as no task loses more than the bound in sum. A basis that
grows by `append` collects such directions: a later task's residual is cut at its own threshold, not at what all need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..covariance.second_moment import SecondMoment
from ..errors import OptionError
from ..formatting import table
from ..subspace.basis import Basis, BasisStore, Fate, Subspace
from ..subspace.projection import exact_products

Moments = Mapping[str, Mapping[str, SecondMoment]]


@dataclass(frozen=True)
class PrunedParameter:
    """One parameter: directions before and after, and the largest share of a task's energy that was given up."""

    name: str
    before: int
    after: int
    lost: float


@dataclass(frozen=True)
class PruneReport:
    """Result of `prune`. `parameters` that lost nothing are listed as well; `left_alone` has reasons."""

    bound: float
    tasks: tuple[str, ...]
    parameters: tuple[PrunedParameter, ...]
    left_alone: dict[str, str]

    @property
    def freed(self) -> int:
        """Directions that later tasks may use again."""
        return sum(row.before - row.after for row in self.parameters)

    @property
    def lost(self) -> float:
        """The largest share of one task's energy at one parameter that is no longer protected."""
        return max((row.lost for row in self.parameters), default=0.0)

    def __str__(self) -> str:
        whole = sum(row.before for row in self.parameters)
        lines = [
            f"gave back {self.freed} of {whole} protected directions; no task lost more than {self.lost:.2e} of its "
            f"energy at any parameter (bound {self.bound:g}, tasks {', '.join(self.tasks)})",
            *(f"left alone: '{name}' ({why})" for name, why in self.left_alone.items()),
            "",
        ]
        rows = [[row.name, str(row.before), str(row.after), f"{row.lost:.2e}"] for row in self.parameters]
        return "\n".join([*lines, table(["parameter", "before", "after", "energy given up"], rows)])


def check_loaders(loaders: Mapping[str, object], store: BasisStore) -> list[str]:
    """Return the names of all consolidated tasks, each of which needs a loader: what is not seen would be given up.

    Raises:
        OptionError: a task is missing or unknown.
    """
    known = [str(task["name"]) for task in store.tasks]
    if set(loaders) != set(known) or not known:
        found = f"prune(loaders with {sorted(loaders)})"
        raise OptionError(f"{found}: expected one loader for each consolidated task, {known}")
    return known


@torch.no_grad()
def prune_store(store: BasisStore, moments: Moments, bound: float) -> tuple[BasisStore, PruneReport]:
    """Return a store without redundant directions and a report; `store` is unchanged.

    Args:
        store: bases of all consolidated tasks.
        moments: for every task the second moment of the rows that met each weight.
        bound: share of every task's energy that may be given up at each parameter, 0..1.
    """
    rest, rows, left_alone = store.copy(), list[PrunedParameter](), dict[str, str]()
    for name, basis in store.items():
        if not basis.subspaces:
            continue
        found = {task: known[name] for task, known in moments.items() if name in known}
        why = _reason(basis, found)
        if why:
            left_alone[name] = why
            continue
        with exact_products(next(iter(basis.subspaces.values())).basis.device):
            smaller, row = _without_redundant(basis, found, bound)
        rest.put(smaller)
        rows.append(row)
    return rest, PruneReport(bound, tuple(moments), tuple(rows), left_alone)


def _reason(basis: Basis, found: Mapping[str, SecondMoment]) -> str:
    """Return the reason why `basis` is not pruned; empty if it is."""
    if len(basis.subspaces) > 1 or "rows" in basis.subspaces:
        return "it is protected on two sides or by rows"
    (subspace,) = basis.subspaces.values()
    if subspace.covariance is not None or subspace.scale is not None or subspace.members is not None:
        return "its policy needs all its directions"
    if not found:
        return "no row of these loaders met it"
    if any(moment.size != subspace.size or moment.groups != len(subspace.ranks) for moment in found.values()):
        return "it is protected together with its bias" if basis.bias else "its rows have another shape"
    return ""


def _without_redundant(basis: Basis, found: Mapping[str, SecondMoment], bound: float) -> tuple[Basis, PrunedParameter]:
    ((side, subspace),) = basis.subspaces.items()
    shares = torch.stack([_shares(subspace.basis, moment.matrix) for moment in found.values()])
    used = (subspace.basis != 0).any(dim=1)
    worst = torch.where(used, shares.amax(dim=0), torch.inf).flatten()
    order = worst.argsort()
    sums = shares.flatten(1)[:, order].cumsum(dim=1).amax(dim=0)
    count = int((sums[: int(used.sum())] <= bound).sum())
    kept = used.flatten().clone()
    kept[order[:count]] = False
    lost = float(sums[count - 1]) if count else 0.0
    smaller = _restricted(subspace, kept.reshape(used.shape), side == "right", lost)
    row = PrunedParameter(basis.name, subspace.rank, smaller.rank, lost)
    if not count:
        return basis, row
    fate = Fate.PROTECTED if basis.fate is Fate.FULL else basis.fate
    history = (*basis.history[:-1], smaller.rank)
    reason = basis.reason if basis.fate is fate else "its inputs are known"
    changed = dataclasses.replace(
        basis,
        fate=fate,
        kept=None,
        reason=reason,
        subspaces={side: smaller},
        history=history,
        energies=tuple(max(0.0, basis.energy(task) - lost) for task in basis.tasks),
    )
    return changed, row


def _shares(basis: Tensor, moment: Tensor) -> Tensor:
    """Return `u^H K u / tr K` for each column of `[g, s, k]`, with the trace over all groups: `[g, k]`, float64."""
    double = torch.complex128 if moment.is_complex() else torch.float64
    columns, moment = basis.to(double), moment.to(basis.device, double)
    energy = (columns.conj() * (moment @ columns)).real.sum(dim=1)
    total = moment.diagonal(dim1=1, dim2=2).real.sum()
    return energy.clamp_min(0) / total if float(total) > 0 else torch.zeros_like(energy)


def _restricted(subspace: Subspace, kept: Tensor, right: bool, lost: float) -> Subspace:
    """Return `subspace` with the columns of the mask `kept` `[g, k]`, packed to the left."""
    ranks = tuple(kept.sum(dim=1).tolist())
    width = max(ranks, default=0)
    groups, size, _ = subspace.basis.shape
    basis = subspace.basis.new_zeros(groups, size, width)
    rows = subspace.anchor.shape[1] if right else subspace.anchor.shape[2]
    anchors = subspace.anchor.new_zeros((groups, rows, width) if right else (groups, width, rows))
    for group, rank in enumerate(ranks):
        columns = kept[group].nonzero().flatten()
        basis[group, :, :rank] = subspace.basis[group][:, columns]
        if right:
            anchors[group, :, :rank] = subspace.anchor[group][:, columns]
        else:
            anchors[group, :rank] = subspace.anchor[group][columns]
    return dataclasses.replace(
        subspace, basis=basis, anchor=anchors, ranks=ranks, energy=max(0.0, subspace.energy - lost)
    )
