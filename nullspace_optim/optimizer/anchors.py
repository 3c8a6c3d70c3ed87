"""Anchors after an edit outside the optimizer: the present values become those to keep."""

from __future__ import annotations

from ..distributed.group import local_tensor
from ..model.names import named_buffers
from ..subspace.matrix import matrix_of
from .engine import Engine


def accept_anchors(engine: Engine) -> None:
    """Keep the present weights and buffers from now on."""
    engine.follow_replaced()
    engine.protection.make_exact()  # what nobody edited has no drift to accept
    for guard in engine.protection.guards.values():
        basis = guard.stored
        if basis.kept is not None:
            basis.kept = local_tensor(guard.parameter).clone()
        if basis.subspaces:
            with matrix_of(guard.parameter, basis.layout, guard.bias, write=False) as matrix:
                for side, subspace in basis.subspaces.items():
                    subspace.anchor = guard.part.anchor(matrix, subspace.basis, side)
        guard.mark()
    engine.rebuild()
    engine.align()
    store = engine.store
    buffers = named_buffers(engine.owner()) if store.buffers else {}
    store.buffers.update({name: buffers[name].detach().clone() for name in store.buffers.keys() & buffers.keys()})
