"""Look ahead: for several policies, what they would keep of a task and how much of a new task's gradient stays free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from math import isfinite, nan

import torch
from torch import Tensor

from ..distributed.communicator import Communicator
from ..errors import ConsolidationError, OptionError
from ..formatting import size, table
from ..model.loader import LoaderPass
from ..model.restore import restored_model
from ..policies.base import Policy
from ..policies.energy import Energy
from ..protection.guard import Guard, size_of
from ..protection.step import LEAST_FREE, free_share
from ..report import ConsolidationReport
from ..settings import Settings
from ..subspace.basis import BasisStore, Capacity
from .consolidate import check_ready, settle
from .describe import describe
from .observe import Observation, observe

THRESHOLDS: tuple[Policy, ...] = (Energy(0.999), Energy(0.99), Energy(0.95), Energy(0.8), Energy(0.5))


@dataclass(frozen=True)
class PreviewLine:
    """One policy: the report of a consolidation with it, the mean share of directions that stays `free` in weights
    that are protected, and the share of the new task's `gradient` in free directions (NaN if no loss was given).
    """

    policy: Policy
    report: ConsolidationReport
    free: float
    gradient: float


@dataclass(frozen=True)
class Preview:
    """Result of `preview`, one line a policy; prints as a table."""

    lines: tuple[PreviewLine, ...]

    def __str__(self) -> str:
        header = ["policy", "free directions", "numbers frozen", "bases", "new gradient free"]
        rows = [
            [
                _named(line.policy),
                f"{line.free:.0%}",
                f"{line.report.still_share:.0%}",
                size(line.report.bytes, 3, "B"),
                f"{line.gradient:.1%}" if isfinite(line.gradient) else "",
            ]
            for line in self.lines
        ]
        told = ["what consolidate() would keep, of which nothing is kept now:", table(header, rows)]
        if any(line.gradient < LEAST_FREE for line in self.lines):
            told.append(f"a gradient that is less than {LEAST_FREE:.0%} free hardly teaches anything")
        return "\n".join(told)


def _named(policy: Policy) -> str:
    """Return `policy` with its first argument and those that are not the default: ``Energy(0.99)``."""
    if not is_dataclass(policy):
        return repr(policy)
    given = [(f.name, getattr(policy, f.name), f.default) for f in fields(policy) if f.repr]
    shown = [f"{name}={value!r}" for name, value, default in given[1:] if value != default]
    return f"{type(policy).__name__}({', '.join([*(repr(value) for _, value, _ in given[:1]), *shown])})"


def preview(
    work: LoaderPass,
    store: BasisStore,
    options: Settings,
    ranks: Communicator,
    policies: Policy | Sequence[Policy],
    loss: Callable[[], Tensor] | None,
) -> Preview:
    """Return one line for each of `policies`: a consolidation with it, of which nothing is kept.

    Raises:
        OptionError: no policies, or a loss that gives no gradient.
        ConsolidationError: several processes, a loader without batches, or what `consolidate` itself would refuse.
    """
    if ranks.size > 1:
        raise ConsolidationError("preview() sees one process only: call it before the processes start")
    policies = (policies,) if isinstance(policies, Policy) else tuple(policies)
    if not policies:
        raise OptionError("preview(policies=[]): expected policies such as Energy(0.99)")
    check_ready(work)
    keys = [_key(replace(options, policy=policy)) for policy in policies]
    if len(set(keys)) > 1 and iter(work.loader) is work.loader:
        raise ConsolidationError("preview() reads its loader several times for these policies: pass a list")
    gradients = {} if loss is None else _gradients(work, loss)
    observed: dict[tuple[object, ...], Observation] = {}
    lines = []
    for policy, key in zip(policies, keys, strict=True):
        chosen = replace(options, policy=policy)
        with restored_model(work.model, work.loader):
            seen = observed[key] = observed.get(key) or observe(work, chosen, ranks)
            grown, rows = settle(work, seen, store, chosen, ranks)
            report = describe(work, chosen, seen, grown, rows, {}, {})
        lines.append(PreviewLine(policy, report, Capacity(grown).mean, _share(work.parameters, grown, gradients)))
    return Preview(tuple(lines))


def _key(options: Settings) -> tuple[object, ...]:
    """Return all that one pass of the loader depends on."""
    return options.dtype, options.policy.batch_frobenius


def _gradients(work: LoaderPass, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the gradient of `loss` by parameter name; `.grad` is not touched."""
    with restored_model(work.model), torch.enable_grad():
        value = loss()
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise OptionError(
                f"preview(loss=...) returned {type(value).__name__}: expected a scalar tensor with a gradient, such as "
                "lambda: F.cross_entropy(model(x), y)"
            )
        found = torch.autograd.grad(value, list(work.parameters.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(work.parameters, found) if g is not None}
    sizes = [float(size_of(g.detach().to_dense())) for g in gradients.values()]
    if not 0 < sum(sizes) < float("inf"):
        raise OptionError(
            f"preview(loss=...) gave {float(value.detach()):g}, with a gradient that is zero or not finite in the "
            f"{len(work.parameters)} trained parameters: nothing can be told from it"
        )
    return gradients


@torch.no_grad()
def _share(parameters: Mapping[str, Tensor], store: BasisStore, gradients: Mapping[str, Tensor]) -> float:
    """Return the share of `gradients` in directions that `store` leaves free, NaN where there are no gradients."""
    found = {n: b for n, b in store.items() if n in gradients and (b.subspaces or b.kept is not None)}
    gradients = {name: gradient.to_dense() for name, gradient in gradients.items()}  # of sparse tables
    with _given(parameters, gradients):
        guards = [Guard(parameters[n], b, parameters[b.bias] if b.bias else None) for n, b in found.items()]
        share = free_share(guards, parameters.values()) if guards or not gradients else 1.0
    return nan if share is None else share


@contextmanager
def _given(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters these gradients inside, and their own again afterwards."""
    own = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.grad = gradients.get(name)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.grad = own[name]
