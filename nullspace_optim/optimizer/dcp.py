"""Model, base optimizers and protection as one `Stateful` of torch.distributed.checkpoint (DCP).

DCP writes weights and optimizer state shard by shard and reads them into any other number of processes. Protection is
whole in the checkpoint (the bytes of a basis file, with its checksums); each rank cuts its own part out. DCP expects
the same entries from every optimizer of a kind, so parameters that never had a gradient (frozen before the first step)
are given the state of a step that moves nothing; they lose it again when the checkpoint is loaded. DCP reads into
tensors that are there; what a mode trains may differ in number and shape, so its optimizer state travels with the
bases.

`get_state_dict(model, opt)` of torch keeps nothing but "state" and "param_groups" of an optimizer; `called_by_torch`
tells `WrappedOptimizer.state_dict` to hand out a state that survives this.
"""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.failures import raise_on_all_ranks
from ..distributed.fsdp import reshard
from ..files import basis_file
from ..model.names import names_by_identity
from .engine import Engine
from .ownership import refuse_without_experts

SOURCE = "the distributed checkpoint"
TORCH = "torch.distributed.checkpoint.state_dict"


def called_by_torch() -> bool:
    """True inside `get_state_dict` of torch.distributed.checkpoint, unless it flattens: flattened groups are written
    once a parameter, and what this library writes in them is not read again.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == TORCH:
            return not getattr(frame.f_locals.get("info"), "flatten_optimizer_state_dict", False)
    return False


@contextmanager
def complete(core: Engine) -> Iterator[list[Tensor]]:
    """Let every trainable parameter have optimizer state; yield those that had none, which lose it on exit."""
    added: list[tuple[Optimizer, Tensor]] = []
    with core.unedited(), core.protection.paused():
        for base in core.bases:
            trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
            missing = [p for p in trained if not base.state.get(p)]
            _take_idle_step(base, trained, missing)
            added += [(base, p) for p in missing]
    try:
        yield [parameter for _, parameter in added]
    finally:
        for base, parameter in added:
            base.state.pop(parameter, None)


def names_of(core: Engine, parameters: Iterable[Tensor]) -> list[str]:
    """Return the names of `parameters` in the model of `core`, sorted; none is looked up where there are none."""
    wanted = list(parameters)
    names = names_by_identity(core.owner()) if wanted else {}
    return sorted(names[id(p)] for p in wanted if id(p) in names)


def drop_state(core: Engine, names: Iterable[str]) -> None:
    """Take the optimizer state of parameters that had none away again."""
    wanted = set(names)
    found = [p for name, p in core.wrapped(core.owner()).items() if name in wanted] if wanted else []
    for base in core.bases:
        for parameter in found:
            base.state.pop(parameter, None)


class Checkpoint:
    """What `NullSpaceOptimizer.checkpoint` returns: `state_dict` and `load_state_dict` as DCP calls them.

    All ranks must take part in both.
    """

    def __init__(self, core: Engine) -> None:
        """Look at everything that `core` holds, and keep its bases alive."""
        refuse_without_experts(core)
        self._core, self._bases = core, core.bases

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the model, of the base optimizers and of the protection."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        core, model = self._core, self._core.owner()
        reshard(model)
        core.protection.finish_interrupted()
        trained = {} if core.mode is None else {"mode": _packed(core.mode.training)}
        with complete(core) as stateless, core.mode_apart():
            weights, bases = get_state_dict(model, core.bases)
        owed, allowed = core.protection.owed, core.protection.allowed
        record = {"owed": owed, "allowed": allowed, "stateless": names_of(core, stateless)}
        protection = {"bases": basis_file.dumps(core.snapshot(), SOURCE), "record": json.dumps(record), **trained}
        return {"model": weights, "optimizer": bases, "protection": protection}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned, in this or any other number of processes.

        Raises:
            BasisFileError, ShapeError: the bases are damaged or belong to another model.
        """
        from torch.distributed.checkpoint.state_dict import set_state_dict

        core = self._core
        with raise_on_all_ranks():
            record = json.loads(state["protection"]["record"])
            store = basis_file.loads(state["protection"]["bases"], SOURCE)
        with core.mode_apart():
            set_state_dict(
                core.owner(), core.bases, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        drop_state(core, record["stateless"])
        core.adopt(core.matching(store))
        if core.mode is not None:
            core.mode.training = torch.load(io.BytesIO(state["protection"]["mode"]), weights_only=True)
        core.protection.owed = record["owed"]
        core.protection.allowed = record["allowed"]


def _packed(value: dict[str, Any]) -> bytes:
    """Return tensors and plain values as bytes, which DCP writes and reads as one."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@torch.no_grad()
def _take_idle_step(base: Optimizer, trained: list[Tensor], missing: list[Tensor]) -> None:
    """Step with zero gradients for `missing` and none for others, at rate 0; everything but their state stays."""
    if not missing:
        return
    gradients, values = [p.grad for p in trained], [p.detach().clone() for p in missing]
    settings = [{key: copy.deepcopy(value) for key, value in g.items() if key != "params"} for g in base.param_groups]
    try:
        for parameter in trained:
            parameter.grad = None
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        for group in base.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        base.step()
    finally:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for group, before in zip(base.param_groups, settings, strict=True):
            group.update(before)
        for parameter, value in zip(missing, values, strict=True):
            parameter.detach().copy_(value)
