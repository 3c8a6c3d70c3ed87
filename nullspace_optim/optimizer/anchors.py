"""Anchors after an edit outside the optimizer: the present values become those to keep."""

from __future__ import annotations

from ..distributed.group import local_tensor
from ..model.names import named_buffers
from ..subspace.growth import check_shapes
from ..subspace.matrix import matrix_of
from .engine import Engine


def accept_anchors(engine: Engine) -> None:
    """Keep the present weights and buffers from now on."""
    engine.follow_replaced()
    check_shapes(engine.store, engine.parameters)
    engine.protection.make_exact()  # what nobody edited has no drift to accept
    for guard in engine.protection.guards.values():
        basis = guard.stored
        weight, bias = guard.blocks()
        if basis.kept is not None:
            basis.kept = local_tensor(weight).clone()
        if basis.subspaces:
            with matrix_of(weight, basis.layout, bias, write=False) as matrix:
                for side, subspace in basis.subspaces.items():
                    subspace.anchor = guard.part.anchor(matrix, subspace.basis, side)
        guard.mark()
    engine.rebuild()
    engine.align()
    store = engine.store
    buffers = named_buffers(engine.owner()) if store.buffers else {}
    store.buffers.update({name: buffers[name].detach().clone() for name in store.buffers.keys() & buffers.keys()})
