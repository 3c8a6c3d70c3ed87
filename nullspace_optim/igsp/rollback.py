"""All or nothing: after an error experts, parameter group, optimizer state and bases are what they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def all_or_nothing(mode: Any) -> Iterator[None]:
    """Run the block; on any error put everything that a mode changes back, object by object, and raise it again."""
    bank, trainees, host = mode.experts, mode.trainees, mode.host
    modules = [(module, _contents(module)) for module in bank.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in bank.parameters()]
    group, state = list(trainees.group["params"]), {p: trainees.base.state.get(p) for p in trainees.parameters}
    scope, store, parameters = dict(bank.scope.__dict__), host.store.copy(), dict(host.parameters)
    scope["tasks"] = list(bank.scope.tasks)
    own = {key: value for key, value in mode.__dict__.items() if key not in ("host", "bank", "trainees")}
    own["counts"], own["phase_steps"] = list(mode.counts), list(mode.phase_steps)
    try:
        yield
    except BaseException:
        for module, contents in modules:
            module.__dict__.clear()
            module.__dict__.update(contents)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in trainees.parameters:
            trainees.base.state.pop(parameter, None)
        trainees.group["params"][:] = group
        trainees.base.state.update({p: s for p, s in state.items() if s is not None})
        bank.scope.__dict__.update(scope)
        mode.__dict__.update(own)
        host.take(store, parameters)
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module with copies of its tables and lists."""
    contents = dict(module.__dict__)
    contents.update({name: contents[name].copy() for name in TABLES})
    return {name: list(value) if isinstance(value, list) else value for name, value in contents.items()}
