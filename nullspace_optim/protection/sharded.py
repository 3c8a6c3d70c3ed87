"""Sides of sharded weights whose coordinates are sums over ranks, and invariants of weights that lie on several ranks.

Parameters that are used as `x @ P` and sharded along their inputs are the common case. All sides that cross ranks share
one all-reduce a step; `shard_placement_fn` of `fully_shard` avoids it (`Shard(1)` for such parameters).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.collectives import all_reduce_sum_
from ..distributed.group import local_tensor
from ..subspace.basis import Subspace
from ..subspace.growth import check_shapes
from ..subspace.matrix import matrix_of
from ..subspace.projection import anchor, subtract_coordinates_
from .guard import Guard

FLOOR = 1e-2  # as in `projection.anchor_drift`


class _Side(NamedTuple):
    """One crossing side and the tensors in the place of its guard's members."""

    guard: Guard
    subspace: Subspace
    weights: Sequence[Tensor]

    def coordinates(self) -> Tensor:
        """Return this rank's summand of `W U` or `U^H W`."""
        weight, *bias = self.weights
        with matrix_of(weight, self.guard.basis.layout, bias[0] if bias else None, write=False) as matrix:
            return anchor(matrix, self.subspace.basis, self.subspace.side).contiguous()

    def yielded(self, residual: Tensor) -> Tensor:
        """Let the anchor follow what a soft side lets through of `residual`; return the rest."""
        scale = self.subspace.scale
        if scale is None:
            return residual
        share = scale.to(residual.dtype).unsqueeze(-2 if self.subspace.side == "right" else -1)
        self.subspace.anchor.add_((residual * (1 - share)).to(self.subspace.anchor.dtype))
        return residual * share

    def subtract(self, coordinates: Tensor) -> None:
        """Take `coordinates` out of this rank's block."""
        weight, *bias = self.weights
        assert self.subspace.side != "rows"
        with matrix_of(weight, self.guard.basis.layout, bias[0] if bias else None) as matrix:
            subtract_coordinates_(matrix, coordinates, self.subspace.basis, self.subspace.side)


@torch.no_grad()
def correct_across(moves: Sequence[tuple[Guard, Sequence[Tensor], bool]], *, softly: bool = False) -> None:
    """Put the crossing sides of guards back with one sum over ranks.

    Each move is a guard, the tensors in the place of its members, and whether they moved here: a side is corrected on
    all ranks if its weight moved on any of them; otherwise it stays bitwise. With `softly`, anchors of soft sides
    follow the share of the movement that is let through (see `projection.yield_anchor_`).
    """
    sides = [_Side(guard, side, weights) for guard, weights, _ in moves for side in guard.across]
    if not sides:
        return
    flags = [moved for guard, _, moved in moves for _ in guard.across]
    sums = [side.coordinates() for side in sides]
    marks = torch.tensor(flags, dtype=sums[0].real.dtype, device=sums[0].device)
    all_reduce_sum_([*sums, marks], group=_group(sides[0].guard))
    for side, found, mark in zip(sides, sums, marks, strict=True):
        residual = torch.where(mark > 0, found - side.subspace.anchor.to(found.dtype), torch.zeros_like(found))
        side.subtract(side.yielded(residual) if softly else residual)
    for guard, weights, _ in moves:
        if guard.across:
            guard.restore_rows(weights)  # whose last bits the sums over ranks have changed


def any_rank(flag: bool, guard: Guard) -> bool:
    """True if `flag` is on any of the ranks that `guard` lies on; all of them must ask."""
    count = torch.full((1,), float(flag), device=local_tensor(guard.parameter).device)
    all_reduce_sum_([count], group=_group(guard))
    return bool(count)


def _group(guard: Guard) -> object:
    return None if guard.part.shard is None else guard.part.shard.group


@torch.no_grad()
def drifts(guards: Mapping[str, Guard]) -> dict[str, float]:
    """Return `Guard.drift` of every guard by name, of sharded weights over all ranks (all of them must ask)."""
    check_shapes({name: g.stored for name, g in guards.items()}, {name: g.parameter for name, g in guards.items()})
    found = {name: guard.drift() for name, guard in guards.items() if guard.part.shard is None}
    shards = {name: guard for name, guard in guards.items() if guard.part.shard is not None}
    if shards:
        keys, rows = [], []
        crossing = [_Side(guard, side, guard.members) for guard in shards.values() for side in guard.across]
        sums = [side.coordinates() for side in crossing]
        group = _group(next(iter(shards.values())))
        all_reduce_sum_(sums, group=group)
        totals = {id(side.subspace): total for side, total in zip(crossing, sums, strict=True)}
        for name, guard in shards.items():
            for row in _squares(guard, totals):
                keys.append(name)
                rows.append(row)
        table = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64)
        all_reduce_sum_([table], group=group)
        for name, (moved, kept, weight) in zip(keys, table.sqrt().tolist(), strict=True):
            size = max(kept, FLOOR * weight)
            drift = moved / size if size else moved
            found[name] = max(found.get(name, 0.0), drift, key=lambda value: (math.isnan(value), value))
    return {name: found.get(name, 0.0) for name in guards}


def _squares(guard: Guard, totals: Mapping[int, Tensor]) -> list[Tensor]:
    """Return this rank's summands of `||W U - A||^2`, `||A||^2` and `||W||^2`, one row `[3]` a side."""
    if guard.basis.kept is not None:
        held = local_tensor(guard.parameter)
        return [_row(held - guard.basis.kept, guard.basis.kept, held * 0)]
    rows = []
    with matrix_of(guard.parameter, guard.basis.layout, guard.bias, write=False) as matrix:
        for side in guard.basis.subspaces.values():
            rows.append(_row(anchor(matrix, side.basis, side.side) - side.anchor, side.anchor, matrix))
        for side in guard.across:
            kept = side.anchor * _share(guard)
            rows.append(_row((totals[id(side)] - side.anchor) * _share(guard), kept, matrix))
    return rows


def _share(guard: Guard) -> float:
    """Return the factor that lets equal norms of all ranks add up to one."""
    shard = guard.part.shard
    assert shard is not None
    return 1.0 / math.sqrt(shard.count)


def _row(*parts: Tensor) -> Tensor:
    return torch.stack([part.abs().double().square().sum() for part in parts]).cpu()
