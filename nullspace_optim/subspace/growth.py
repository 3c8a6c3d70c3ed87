"""Weights that have grown since their basis was made: what was there before is their leading block.

A class-incremental head gets rows, a token table gets rows, a layer over more features gets columns; what was there
keeps its place at the front of every axis. A basis goes on protecting that block, and all of the weight from the next
consolidation that reads it. Shapes follow `layout`: a weight is a stack `[g, m, d]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..distributed.group import is_dtensor, local_tensor
from ..errors import ShapeError
from .basis import Basis, Fate, Subspace
from .layout import Layout, Side
from .matrix import matrix_of
from .projection import anchor


def contains(shape: Sequence[int], block: Sequence[int]) -> bool:
    """Return whether a tensor of `shape` has a leading block of the shape `block`."""
    return len(shape) == len(block) and all(now >= then for now, then in zip(shape, block))


def leading_block(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the leading block of `shape`, detached and in the same memory; `tensor` itself if it is all of it."""
    if tensor.shape == shape:
        return tensor
    return tensor.detach()[tuple(slice(size) for size in shape)]


def check_shapes(store: Mapping[str, Basis], parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that cannot hold what their basis keeps, naming both shapes.

    Raises:
        ShapeError: a parameter has another shape than its basis and has not grown from it, or is sharded.
    """
    wrong = [
        f"'{name}' is {tuple(parameters[name].shape)}, its basis was made for {basis.shape}"
        for name, basis in store.items()
        if not _fits(parameters[name], basis)
    ]
    if wrong:
        raise ShapeError(
            f"shapes changed: {'; '.join(wrong[:5])}; use the model the bases were made with, or release() the name"
        )


def _fits(parameter: Tensor, basis: Basis) -> bool:
    if basis.shape == tuple(parameter.shape) or basis.fate is Fate.FREE:
        return True
    return contains(parameter.shape, basis.shape) and not is_dtensor(parameter)


@torch.no_grad()
def widen(basis: Basis, parameter: Tensor, bias: Tensor | None) -> Basis:
    """Return `basis` for all of a `parameter` that has grown (and of the `bias` folded in): what was kept stays so,
    and what is new is kept as it is now.

    A weight without a free direction may have some again. The result keeps the old shape if groups of the weight have
    grown, so that rows belong to other groups than before, or if its bias is gone.
    """
    shape = tuple(parameter.shape)
    nothing = basis.kept is None and not basis.subspaces
    if shape == basis.shape or nothing or (bias is None) != (basis.bias is None):
        return basis
    if not basis.subspaces:
        kept = local_tensor(parameter).clone()
        leading_block(kept, basis.shape).copy_(basis.kept)  # type: ignore[arg-type]
        return replace(basis, shape=shape, kept=kept)
    basis = replace(basis, fate=Fate.PROTECTED, kept=None)
    layout = _grown_layout(basis, shape)
    if layout is None:
        return basis
    groups, rows, columns = layout.matrix_shape(shape)
    inputs = leading_block(torch.arange(columns).reshape(_inputs(layout, shape)), _inputs(basis.layout, basis.shape))
    places = inputs.reshape(-1).to(parameter.device)
    if bias is not None:
        places = torch.cat([places, places.new_tensor([columns])])
    first = torch.arange(basis.layout.matrix_shape(basis.shape)[1], device=parameter.device)
    sides: dict[Side, Subspace] = {}
    with matrix_of(parameter, layout, bias, write=False) as matrix:
        for side, old in basis.subspaces.items():
            if side != "rows":
                wide = _spread(old, groups, *((places, matrix.shape[2]) if side == "right" else (first, rows)))
            else:
                wide = replace(old, size=rows)
            anchors = anchor(matrix, wide.basis, side)
            if side == "right":
                anchors[: len(old.ranks), : len(first)] = old.anchor.to(anchors)
            else:
                anchors[: len(old.ranks) if side == "left" else None, ..., places] = old.anchor.to(anchors)
            sides[side] = replace(wide, anchor=anchors)
    return replace(basis, shape=shape, layout=layout, subspaces=sides)


def _grown_layout(basis: Basis, shape: tuple[int, ...]) -> Layout | None:
    """Return the layout with as many groups as there are now; `None` if groups have grown."""
    layout = basis.layout
    if layout.groups == 1:
        return layout
    each = basis.shape[0] // layout.groups
    return None if shape[0] % each else replace(layout, groups=shape[0] // each)


def _inputs(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that make the columns of the stack."""
    if layout.kind == "batched":
        return shape[2:]
    return (shape[0] // layout.groups, *shape[2:]) if layout.kind == "transposed" else shape[1:]


def _spread(old: Subspace, groups: int, places: Tensor, size: int) -> Subspace:
    """Return a side for `groups` groups and `size` dimensions, in which the old ones have `places` `[s]`; its
    directions are the old ones.
    """

    def spread(tensor: Tensor, axis: int) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = size
        return tensor.new_zeros(shape).index_copy(axis, places.to(tensor.device), tensor)

    def more(tensor: Tensor, axis: int = 0) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = groups - shape[axis]
        return torch.cat([tensor, tensor.new_zeros(shape)], axis)

    return replace(
        old,
        basis=more(spread(old.basis, 1)),
        ranks=(*old.ranks, *[0] * (groups - len(old.ranks))),
        size=size,
        spectrum=more(torch.nn.functional.pad(old.spectrum, (0, size - old.size))),
        covariance=None if old.covariance is None else more(spread(spread(old.covariance, 1), 2)),
        scale=None if old.scale is None else more(old.scale),
        members=None if old.members is None else more(old.members, 1),
    )
