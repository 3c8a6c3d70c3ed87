"""Anchors and weights that are edited on purpose: accept the present values, put the kept ones back, or go part of the
way back to earlier weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..distributed.failures import raise_on_all_ranks
from ..distributed.group import local_tensor
from ..errors import OptionError, ShapeError, StaleAnchorError
from ..model.find import unfinished
from ..model.names import canonical_name, canonical_names, named_buffers
from ..model.norm_stats import statistics
from ..protection.averaged_weights import second_weights
from ..protection.sharded import correct_across
from ..subspace.growth import check_shapes
from ..subspace.matrix import matrix_of
from .engine import Engine
from .ownership import check_ownership


@torch.inference_mode(False)
@torch.no_grad()
def accept_anchors(engine: Engine) -> None:
    """Keep the present weights and buffers from now on."""
    check_ownership(engine)
    engine.protection.forget_steps()
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
    store, buffers = engine.store, dict(_kept_buffers(engine))
    store.buffers.update({name: buffer.detach().clone() for name, buffer in buffers.items()})
    if engine.mode is not None:
        engine.mode.reanchor()


@torch.inference_mode(False)
@torch.no_grad()
def restore_anchors(engine: Engine) -> None:
    """Put everything that is kept back: directions, frozen parameters, buffers, second weights. The rest stays.

    Raises:
        StaleAnchorError: a weight is not finite, so that its anchor cannot restore it; nothing was changed.
    """
    check_ownership(engine)
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
            guard.correct()
        correct_across([(guard, guard.members, True) for guard in guards])
    for guard in guards:
        guard.pending = guard.behind = False
        guard.mark()
    protection.inexact_steps = 0
    engine.align()
    for name, buffer in _held_buffers(engine):
        buffer.detach().copy_(engine.store.buffers[name])


def _kept_buffers(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of the model that bases rely on."""
    buffers = named_buffers(engine.owner()) if engine.store.buffers else {}
    yield from ((name, buffer) for name, buffer in buffers.items() if name in engine.store.buffers)


def _held_buffers(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield those that stay as they are: without running statistics under ``norm_stats="train"``."""
    free = statistics(engine.owner(), set(engine.store.buffers)) if engine.options.norm_stats == "train" else {}
    yield from ((name, buffer) for name, buffer in _kept_buffers(engine) if name not in free)


@torch.inference_mode(False)
@torch.no_grad()
def blend_weights(engine: Engine, before: Mapping[str, Tensor], share: float) -> None:
    """Move parameters and running statistics by `share` of the way back to `before`; what is kept stays kept.

    Raises:
        OptionError: `share` is out of range, `before` is no state dict of the model's earlier values, an addition to a
            weight is not merged, or another optimizer has taken the bases over.
        ShapeError: a tensor of `before` has another shape.
    """
    if not (isinstance(share, (int, float)) and 0.0 <= share <= 1.0 and isinstance(before, Mapping)):
        found = f"blend({type(before).__name__}, share={share!r})"
        raise OptionError(f"{found}: expected a state dict and a number in [0, 1]")
    check_ownership(engine)
    if (begun := unfinished(engine.owner())) is not None:
        raise OptionError(f"blend: {begun.format('which would not go back with it')}")
    engine.follow_replaced()
    engine.protection.make_exact()
    pairs = _pairs(engine, before)
    if not share:
        return
    with engine.protection.exactly(), engine.evaluated() as moment:
        for now, then in pairs:
            local_tensor(now).lerp_(then, share)
            for base in engine.bases:
                for (beside,) in second_weights(base, [now]):
                    local_tensor(beside).lerp_(then.to(beside), share)
        guards = engine.protection.guards.values()
        for guard in guards:
            if guard.immovable or not guard.soft:
                guard.correct()
            else:
                guard.yield_softly()
        correct_across([(guard, guard.members, True) for guard in guards], softly=True)
        engine.align()
        moment.keep_changes = True
    engine.protection.mark()


def _pairs(engine: Engine, before: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor of the model that may move and is named in `before`, with its block of the value there."""
    model, kept = engine.owner(), {id(buffer) for _, buffer in _held_buffers(engine)}
    every: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    every.update(model.named_parameters(remove_duplicate=False))
    every = {**{short: every[full] for full, short in canonical_names(every).items()}, **every}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    before = {key: value for key, value in before.items() if not key.endswith("_extra_state")}
    unknown = [key for key in before if key not in every and canonical_name(key) not in every]
    if unknown or not before:
        raise OptionError(
            f"blend: {', '.join(map(repr, unknown[:3])) or 'nothing'} in `before` is not in {type(model).__name__}; "
            "pass a copy of an earlier state_dict() of this model"
        )
    for key, value in before.items():
        now = every[key] if key in every else every[canonical_name(key)]
        if not (now.is_floating_point() or now.is_complex()) or id(now) in kept:
            continue
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise OptionError(f"blend: '{key}' in `before` is no dense tensor with values")
        then = local_tensor(value.detach())
        if local_tensor(now).shape != then.shape:
            raise ShapeError(
                f"blend: '{key}' is {list(now.shape)} here, in `before` {list(value.shape)}: leave it out of `before`"
            )
        if then.numel() and local_tensor(now).data_ptr() == then.data_ptr():
            raise OptionError(f"blend: `before` holds '{key}' itself, not its earlier values; clone() the state_dict()")
        if not bool(then.isfinite().all()) or then.is_complex() != now.is_complex():
            raise OptionError(f"blend: '{key}' in `before` holds values that are not finite, or not of this kind")
        found[id(now)] = now, then.to(local_tensor(now))
    return list(found.values())
