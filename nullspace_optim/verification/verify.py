"""Verification of what is kept: weights, buffers, and the outputs of finished tasks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..distributed.collectives import all_gather_object
from ..distributed.failures import raise_on_all_ranks
from ..errors import NullSpaceWarning
from ..model.batches import Forward
from ..model.find import unfinished
from ..model.loader import LoaderPass
from ..model.names import named_buffers
from ..model.restore import restored_model
from ..report import VerifyReport
from ..subspace.basis import BasisStore, Fate
from ..subspace.growth import contains, leading_block
from .probes import Probe, assemble, compare, find_samples, record_probe

RECENT = 3  # tasks whose first samples stay in memory
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
EXACT = 1e-3  # output drift that counts as broken where no energy was cut off
FACTOR = 3.0


class RecentSamples:
    """First samples of the last tasks, in memory alone, so that the drift of their outputs can be measured later."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[Any, Forward | None]] = {}

    def keep(self, task: str, samples: Any, forward: Forward | None) -> None:
        """Keep copies of `samples`; those of the oldest task are dropped."""
        copies = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), samples)
        self._tasks = dict([*self._tasks.items(), (task, (copies, forward))][-RECENT:])

    def drift(self, work: LoaderPass, store: BasisStore) -> tuple[dict[str, float], dict[str, str]]:
        """Return the relative drift of the final output on the samples of each task, by name, and the error for each
        task whose samples the model cannot run any more (its input has grown).

        The model of `work` must be in evaluation mode (`restored_model`).
        """
        known = {str(record["name"]): record for record in store.tasks}
        found, failed = {}, {}
        for task, (samples, forward) in self._tasks.items():
            if task in known:
                before = Probe.of(store.probes[task], known[task])
                try:
                    after = record_probe(replace(work, task=task, forward=forward), samples, before)
                except Exception as error:  # on all ranks alike
                    failed[task] = (str(error).splitlines() or [type(error).__name__])[0]
                else:
                    found[task] = list(compare(before, after).values())[-1]
        return found, failed


def verify(
    work: LoaderPass,
    store: BasisStore,
    held: Mapping[str, Tensor],
    recent: RecentSamples,
    routed: Callable[[str], AbstractContextManager[None]],
    beside: Mapping[str, tuple[float, float]],
    asked: bool,
) -> VerifyReport:
    """Compare the model of `work` with what `store` keeps: its buffers, and its outputs if samples were given.

    Args:
        held: the protected parameters, by name; one that the model holds no longer is lost.
        recent: samples of the last tasks, to tell whether a buffer that moved has moved an output.
        routed: context in which the model runs as it is for a task.
        beside: what else should have stood still, by name: its relative change and the limit of that.
        asked: whether the caller gave a loader.
    """
    outcome, drift = Outcome({}, (), ()), {}
    if store.tasks and (begun := unfinished(work.model)) is not None:
        warnings.warn(begun.format("of which only what lies below is compared"), NullSpaceWarning, stacklevel=3)
    bounds = output_bounds(store)
    lost = lost_parameters(store, held, work.parameters)
    moved = moved_buffers(store, named_buffers(work.model))
    if asked and store.tasks:
        outcome = compare_outputs(work, store, routed, bool(lost or moved))
        drift = {task: list(layers.values())[-1] for task, layers in outcome.layers.items()}
    elif moved:
        with restored_model(work.model):
            drift, _ = recent.drift(work, store)
    harmless = bool(moved and drift) and all(drift[task] <= bounds[task] for task in drift)
    return VerifyReport(
        kept={name: drift for name, (drift, _) in beside.items()},
        limits={name: limit for name, (_, limit) in beside.items()},
        tolerance=0.0,
        buffers=() if harmless else moved,
        harmless=moved if harmless else (),
        layers=outcome.layers,
        missing=outcome.missing,
        foreign=outcome.foreign,
        lost=lost,
        bounds=bounds,
        tasks=tuple(str(record["name"]) for record in store.tasks),
        asked=asked,
    )


@dataclass(frozen=True)
class Outcome:
    """Output drift by task and layer, tasks without samples, tasks that another forward was run for."""

    layers: dict[str, dict[str, float]]
    missing: tuple[str, ...]
    foreign: tuple[str, ...]


def compare_outputs(
    work: LoaderPass, store: BasisStore, routed: Callable[[str], AbstractContextManager[None]], changed: bool
) -> Outcome:
    """Compare the model's outputs on the samples of every task that the loader of `work` holds, in one pass.

    `routed` runs the model as it is for a task. `changed` tells that parameters or buffers are known to have moved.
    """
    before = {str(record["name"]): Probe.of(store.probes[str(record["name"])], record) for record in store.tasks}
    layers, missing, foreign = {}, [], []
    with restored_model(work.model, work.loader):
        with raise_on_all_ranks():
            mine = find_samples(work.loader, torch.cat([p.digests for p in before.values()]), work.max_batches)
        found = {key: sample for part in reversed(all_gather_object(mine)) for key, sample in part.items()}
        for task, probe in before.items():
            samples = assemble(found, probe.digests)
            if samples is None:
                missing.append(task)
                continue
            with routed(task):
                after = record_probe(replace(work, task=task), samples, probe)
            drift = compare(probe, after)
            if not changed and _ran_otherwise(probe, after, drift):
                foreign.append(task)
            else:
                layers[task] = drift
    return Outcome(layers, tuple(missing), tuple(foreign))


def _ran_otherwise(before: Probe, after: Probe, drift: Mapping[str, float]) -> bool:
    """Return whether outputs differ because another forward was run, not because weights moved.

    Then other layers were read, outputs have other shapes, or no layer moved at all but what was made of them.
    """
    if set(before.layers) - set(after.layers) or (before.shapes and before.shapes[-1] != after.shapes[-1]):
        return True
    *inner, output = drift.values()
    return bool(inner) and max(inner) <= EXACT and output > max(10 * EXACT, 100 * max(inner))


def output_bounds(store: BasisStore) -> dict[str, float]:
    """Return by task the output drift that counts as broken: 1e-3, or three times the root of the energy cut off."""
    bounds = {}
    for record in store.tasks:
        task = str(record["name"])
        bounds[task] = max(EXACT, FACTOR * math.sqrt(max(0.0, 1 - store.energy(task))))
    return bounds


@torch.no_grad()
def rounding_limits(store: BasisStore, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what rounding allows kept directions of half-precision weights: `u ||W_t|| / ||W_0||`.

    `u` is 2^-8 for bfloat16 and 2^-11 for float16; `||W_0||` is taken from the anchor, `||A|| sqrt(d / k)`.
    """
    limits = {}
    for name, basis in store.items():
        parameter = parameters.get(name)
        unit = None if parameter is None else UNIT.get(parameter.dtype)
        if parameter is None or unit is None:
            continue
        block = leading_block(parameter, basis.shape) if contains(parameter.shape, basis.shape) else parameter
        grown = [
            float(block.float().norm()) * math.sqrt(s.rank / s.dimension) / max(float(s.anchor.norm()), 1e-30)
            for s in basis.subspaces.values()
            if s.rank
        ]
        limits[name] = unit * max([1.0, *grown])
    return limits


@torch.no_grad()
def moved_buffers(store: BasisStore, buffers: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of buffers that differ from their value at the last consolidation that read them.

    A buffer that has grown and begins as it was (a table made for longer sequences) has not moved.
    """
    return tuple(name for name, kept in store.buffers.items() if name not in buffers or _differs(buffers[name], kept))


def _differs(buffer: Tensor, kept: Tensor) -> bool:
    if buffer.ndim == kept.ndim and all(n >= old for n, old in zip(buffer.shape, kept.shape)):
        buffer = buffer[tuple(slice(old) for old in kept.shape)]
    return not torch.equal(buffer, kept.to(buffer.device))


def lost_parameters(store: BasisStore, held: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names that are protected and whose tensor, of those `held`, is not `present` in the model, under
    whatever name.
    """
    ids = {id(parameter) for parameter in present.values()}
    kept = (name for name, basis in store.items() if basis.fate is not Fate.FREE and name in held)
    return tuple(name for name in kept if id(held[name]) not in ids)
