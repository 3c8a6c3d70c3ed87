"""Anchors after an edit outside the optimizer: the present values become those to keep, or the kept ones come back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..distributed.failures import raise_on_all_ranks
from ..distributed.group import local_tensor
from ..errors import StaleAnchorError
from ..model.names import named_buffers
from ..protection.sharded import correct_across
from ..subspace.matrix import matrix_of
from .engine import Engine


@torch.inference_mode(False)
@torch.no_grad()
def accept_anchors(engine: Engine) -> None:
    """Keep the present weights and buffers from now on."""
    engine.protection.forget_steps()
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
    store, buffers = engine.store, dict(_kept_buffers(engine))
    store.buffers.update({name: buffer.detach().clone() for name, buffer in buffers.items()})


@torch.inference_mode(False)
@torch.no_grad()
def restore_anchors(engine: Engine) -> None:
    """Put everything that is kept back: directions, frozen parameters, buffers, second weights. The rest stays.

    Raises:
        StaleAnchorError: a weight is not finite, so that its anchor cannot restore it; nothing was changed.
    """
    engine.follow_replaced()
    protection = engine.protection
    guards = list(protection.guards.values())
    with raise_on_all_ranks():
        for guard in guards:
            if not guard.immovable and not all(bool(local_tensor(p).isfinite().all()) for p in guard.members):
                raise StaleAnchorError(
                    f"'{guard.basis.name}' holds values that are not finite, which nothing that is kept can replace: "
                    "go back to an earlier checkpoint"
                )
    protection.forget_steps()
    for _ in range(2):  # after a long way the first correction leaves the rounding of that way
        for guard in guards:
            guard.align(guard.members)
        correct_across([(guard, guard.members, True) for guard in guards])
    for guard in guards:
        guard.pending = guard.behind = False
        guard.mark()
    protection.inexact_steps = 0
    engine.align()
    for name, buffer in _kept_buffers(engine):
        buffer.detach().copy_(engine.store.buffers[name])


def _kept_buffers(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of the model that bases rely on."""
    buffers = named_buffers(engine.owner()) if engine.store.buffers else {}
    yield from ((name, buffer) for name, buffer in buffers.items() if name in engine.store.buffers)
