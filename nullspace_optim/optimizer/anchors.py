"""Anchors and weights that are edited on purpose: accept the present values, or go part of the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed.group import local_tensor
from ..errors import OptionError, ShapeError
from ..model.names import named_buffers, named_parameters
from ..protection.sharded import correct_across
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


@torch.no_grad()
def blend_weights(engine: Engine, before: Mapping[str, Tensor], share: float) -> None:
    """Move parameters and running statistics by `share` of the way back to `before`; what is kept stays kept.

    Raises:
        OptionError: `before` names nothing of the model, or holds its present tensors.
        ShapeError: a tensor of `before` has another shape.
    """
    engine.follow_replaced()
    engine.protection.make_exact()
    model, guards = engine.owner(), engine.protection.guards.values()
    held = {name: b for name, b in named_buffers(model).items() if name not in engine.store.buffers}
    present = {**held, **named_parameters(model)}
    named = {name: present[name] for name in before if name in present and present[name].is_floating_point()}
    if not named:
        raise OptionError(
            f"blend(before, ...): none of its names is in {type(model).__name__}; pass a state_dict() of it"
        )
    pairs = [(name, local_tensor(now), local_tensor(before[name].detach())) for name, now in named.items()]
    for name, now, then in pairs:
        if now.shape != then.shape:
            raise ShapeError(f"blend: '{name}' is {list(now.shape)} here, in `before` {list(then.shape)}")
        if now.numel() and now.data_ptr() == then.data_ptr():
            raise OptionError(
                f"blend: `before` holds '{name}' itself, not its earlier values; clone() the state_dict()"
            )
    with engine.protection.exactly(), engine.evaluated() as moment:
        for _, now, then in pairs:
            now.lerp_(then.to(now), share)
        for guard in guards:
            if guard.immovable or not guard.soft:
                guard.correct()
            else:
                guard.yield_softly()
        correct_across([(guard, guard.members, True) for guard in guards], softly=True)
        engine.align()
        moment.keep_changes = True
    engine.protection.mark()
