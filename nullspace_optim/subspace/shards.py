"""Blocks that one rank holds of a weight's matrices, bases and anchors where FSDP2 shards parameters.

Shapes follow `layout`: a weight is a stack `[g, m, d]`. `fully_shard` cuts parameters along their first dimension (or
another one by `shard_placement_fn`), so a rank holds some groups, some outputs or some inputs of that stack. Bases are
whole on every rank, anchors and kept values only as far as the rank's own block. The correction `W <- W - (W U - A)
U^H` works row by row and is local where outputs or groups are cut. Where the dimension is cut along which `U` is
multiplied, the coordinates `W U` are a sum over ranks: such a side *crosses* ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..distributed.collectives import all_reduce_sum_
from ..distributed.fsdp import Shard, all_gather_uneven, shard_of
from ..distributed.group import local_tensor
from .basis import Basis, BasisStore, Subspace
from .layout import Layout, Side
from .projection import anchor

ALL = slice(None)


@dataclass(frozen=True)
class ShardView:
    """The block `[groups, outputs, inputs]` of the stack `[g, m, d]` that a rank holds.

    Where a block is no such box (channels of a grouped convolution), it is `padded`: the whole stack with zeros in
    place of what other ranks hold; `crossing` lists the sides whose coordinates are sums over ranks.
    """

    shard: Shard | None = None
    groups: slice = field(default_factory=lambda: ALL)
    outputs: slice = field(default_factory=lambda: ALL)
    inputs: slice = field(default_factory=lambda: ALL)
    padded: bool = False
    crossing: tuple[Side, ...] = ()

    def directions(self, basis: Tensor, side: Side) -> Tensor:
        """Return the rows of `U` `[g, s, k]` (or of the row index `[k]`) that belong to this block."""
        if side == "rows":
            first: int = 0 if self.outputs == ALL else self.outputs.start
            rows: Tensor = basis[self.holds(basis)] - first
            return rows
        return basis[self.groups, self.inputs if side == "right" else self.outputs]

    def holds(self, index: Tensor) -> Tensor:
        """Return which of the rows `index` `[k]` lie in this block."""
        if self.outputs == ALL:
            return torch.ones_like(index, dtype=torch.bool)
        held: Tensor = (index >= self.outputs.start) & (index < self.outputs.stop)
        return held

    def ranks(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ranks of the groups in this block."""
        return ranks[self.groups]

    def anchor(self, matrix: Tensor, basis: Tensor, side: Side) -> Tensor:
        """Return this block's anchor: `W U`, `U^H W` or the rows of its own `matrix`; summed where it crosses ranks."""
        found = anchor(matrix, self.directions(basis, side), side)
        if side in self.crossing and self.shard is not None:
            all_reduce_sum_([found], group=self.shard.group)
        return found

    def cut(self, whole: Tensor, subspace: Subspace) -> Tensor:
        """Return this block's share of the whole anchor of `subspace`."""
        if self.shard is None or subspace.side in self.crossing:
            return whole
        if self.padded:
            return whole * self._mine(whole, subspace.side)
        if subspace.side == "rows":
            return whole[self.holds(subspace.basis), self.inputs].clone()
        if subspace.side == "right":
            return whole[self.groups, self.outputs].clone()
        return whole[self.groups, :, self.inputs].clone()

    def joined(self, block: Tensor, side: Side) -> Tensor:
        """Return the whole anchor from the blocks of all ranks."""
        if self.shard is None or side in self.crossing:
            return block
        if self.padded:
            whole = block.clone()
            all_reduce_sum_([whole], group=self.shard.group)
            return whole
        if side == "rows":
            return all_gather_uneven(block, 0 if self.outputs != ALL else 1, self.shard.group)
        if self.groups != ALL:
            return all_gather_uneven(block, 0, self.shard.group)
        return all_gather_uneven(block, 1 if side == "right" else 2, self.shard.group)

    def _mine(self, whole: Tensor, side: Side) -> Tensor:
        """Return a mask over a padded anchor: 1 where the entries come from this rank's channels."""
        assert self.shard is not None
        number = whole.shape[0] * whole.shape[1]
        channels = torch.arange(number, device=whole.device).reshape(whole.shape[0], whole.shape[1], 1)
        mask: Tensor = ((channels >= self.shard.start) & (channels < self.shard.stop)).to(whole.dtype)
        return mask


WHOLE = ShardView()


def shard_view(parameter: Tensor, layout: Layout, *, joint: bool = False) -> ShardView:
    """Return which part of the matrices of `parameter` this rank holds; with `joint`, a bias is one more input."""
    shard = shard_of(parameter)
    if shard is None:
        return WHOLE
    held = slice(shard.start, shard.stop)
    if layout.kind == "batched":
        return (
            ShardView(shard, groups=held),
            ShardView(shard, outputs=held, crossing=("left",)),
            ShardView(shard, inputs=held, crossing=("right",)),
        )[shard.dim]
    if layout.kind == "matrix" or (layout.kind == "transposed" and layout.groups == 1):
        outputs, inputs = (0, 1) if layout.kind == "matrix" else (1, 0)
        if shard.dim == outputs:
            return ShardView(shard, outputs=held, crossing=("left",))
        if shard.dim == inputs and not joint:
            each = math.prod(parameter.shape[2:])
            return ShardView(shard, inputs=slice(shard.start * each, shard.stop * each), crossing=("right",))
    if layout.kind == "grouped" and shard.dim == 0:
        return ShardView(shard, padded=True, crossing=("left",))
    return ShardView(shard, padded=True, crossing=("right", "left", "rows"))


def gather_parameter(parameter: Tensor) -> Tensor:
    """Return all of `parameter` in the memory of every rank (itself unless it is sharded; then all must call it)."""
    shard = shard_of(parameter)
    return parameter if shard is None else all_gather_uneven(local_tensor(parameter), shard.dim, shard.group)


def padded(parameter: Tensor, shard: Shard) -> Tensor:
    """Return the whole `parameter` with zeros in place of what other ranks hold."""
    block = local_tensor(parameter)
    whole = block.new_zeros(parameter.shape)
    whole.narrow(shard.dim, shard.start, shard.stop - shard.start).copy_(block)
    return whole


def local_basis(basis: Basis, part: ShardView) -> Basis:
    """Return `basis` as this rank's block sees it, without the sides that cross ranks."""
    if part.shard is None:
        return basis
    return replace(basis, subspaces={s: _cut(v, part) for s, v in basis.subspaces.items() if s not in part.crossing})


def crossing_sides(basis: Basis, part: ShardView) -> list[Subspace]:
    """Return the sides of `basis` that cross ranks, with the block's own rows of `U`."""
    return [_cut(v, part) for side, v in basis.subspaces.items() if side in part.crossing and v.rank]


def _cut(subspace: Subspace, part: ShardView) -> Subspace:
    scale = None if subspace.scale is None else subspace.scale[part.groups]
    basis, ranks = part.directions(subspace.basis, subspace.side), part.ranks(subspace.ranks)
    return replace(subspace, basis=basis, ranks=ranks, scale=scale)


def whole_store(store: BasisStore, parameters: Mapping[str, Tensor]) -> BasisStore:
    """Return `store` with the anchors and kept values of all ranks together (itself if nothing is sharded)."""
    return _mapped(store, parameters, cut=False)


def local_store(store: BasisStore, parameters: Mapping[str, Tensor]) -> BasisStore:
    """Return a whole `store` with this rank's blocks of anchors and kept values (itself if nothing is sharded)."""
    return _mapped(store, parameters, cut=True)


def _mapped(store: BasisStore, parameters: Mapping[str, Tensor], *, cut: bool) -> BasisStore:
    twin = store.copy()
    changed = False
    for name, basis in store.items():
        joint = basis.bias is not None
        part = shard_view(parameters[name], basis.layout, joint=joint) if name in parameters else WHOLE
        if part.shard is None:
            continue
        changed = True
        sides: dict[Side, Subspace] = {}
        for side, subspace in basis.subspaces.items():
            move = part.cut(subspace.anchor, subspace) if cut else part.joined(subspace.anchor, side)
            sides[side] = replace(subspace, anchor=move)
        twin.put(replace(basis, subspaces=sides, kept=_kept(basis.kept, part.shard, cut=cut)))
    return twin if changed else store


def _kept(kept: Tensor | None, shard: Shard, *, cut: bool) -> Tensor | None:
    if kept is None:
        return None
    if cut:
        return kept.narrow(shard.dim, shard.start, shard.stop - shard.start).clone()
    return all_gather_uneven(kept, shard.dim, shard.group)
