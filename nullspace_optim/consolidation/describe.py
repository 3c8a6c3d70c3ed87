"""Record and report of one consolidation: what later runs compare with, figures, warnings and notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..covariance.accumulator import ParameterStatistics
from ..covariance.sketch import FrequentDirections
from ..distributed.failures import raise_on_all_ranks
from ..distributed.group import local_tensor
from ..model.loader import LoaderPass, make_runner
from ..model.names import named_buffers
from ..protection.guard import Guard
from ..report import ConsolidationReport, ParameterReport
from ..settings import Precision, Settings
from ..subspace.basis import BasisStore, Fate
from ..verification.displacement import Displacement
from ..verification.drift import allowed_drift
from ..verification.probes import record_probe
from .observe import Observation

NEARLY_FULL = 0.9
ENOUGH = 10


def remember_task(work: LoaderPass, options: Settings, seen: Observation, grown: BasisStore) -> None:
    """Add to `grown` the task's record, the probe of its first samples, and the buffers its forward passes read."""
    probe = record_probe(work, seen.first)
    grown.probes[work.task] = {"digests": probe.digests, "sketches": probe.sketches, "norms": probe.norms}
    for buffer in sorted(seen.capture.buffers_read - set(grown.buffers)):
        grown.buffers[buffer] = named_buffers(work.model)[buffer].detach().clone()
    grown.tasks.append(
        {
            "name": work.task,
            "policy": repr(options.policy),
            "batches": seen.batches,
            "layers": list(probe.layers),
            "untrained": _untrained(seen, grown),
        }
    )


def describe(
    work: LoaderPass,
    options: Settings,
    seen: Observation,
    grown: BasisStore,
    rows: Sequence[ParameterReport],
    displacement: Displacement,
) -> ConsolidationReport:
    """Return the report of a consolidation that made `grown`, without its duration."""
    with raise_on_all_ranks(communicating=True):
        drift, assumed = allowed_drift(work.parameters, grown, displacement, lambda: make_runner(work)(seen.first))
    notes = (
        seen.capture.relevance_note,
        _untrained_note(_untrained(seen, grown)),
        _sketch_note(seen.captured),
        _few_rows_note(seen.captured, rows),
        _half_precision_note(work.parameters),
        _outside_note(work.model, work.outside),
    )
    return ConsolidationReport(
        task=work.task,
        model=type(work.model).__name__,
        policy=repr(options.policy),
        batches=seen.batches,
        parameters=tuple(rows),
        drift_allowed=drift,
        assumed_update=assumed,
        seconds=0.0,
        bytes=stored_bytes(grown),
        transient_bytes=_transient_bytes(work.parameters, grown, options.precision),
        warnings=tuple(_warnings(work.model, work.forward, rows)),
        notes=tuple(filter(None, notes)),
    )


def _untrained(seen: Observation, grown: BasisStore) -> list[str]:
    """Return the parameters that forward passes read and that have no basis, as they are not trained."""
    return sorted(seen.capture.untrained_read - set(grown))


def stored_bytes(store: BasisStore) -> int:
    """Return the bytes of all bases, anchors, kept values and stored covariances (shared tensors once)."""
    tensors: dict[int, Tensor] = {}
    for basis in store.values():
        parts = [basis.kept]
        for subspace in basis.subspaces.values():
            parts += [subspace.basis, subspace.anchor, subspace.covariance, subspace.scale]
        tensors.update({part.data_ptr(): part for part in parts if part is not None and part.numel()})
    return sum(tensor.nbytes for tensor in tensors.values())


def _transient_bytes(parameters: Mapping[str, Tensor], store: BasisStore, precision: Precision) -> int:
    kept = ((name, basis) for name, basis in store.items() if basis.fate is Fate.PROTECTED and name in parameters)
    guards = (Guard(parameters[name], basis) for name, basis in kept)
    return sum(local_tensor(guard.parameter).nbytes for guard in guards if guard.wants_difference(precision))


def _warnings(model: nn.Module, forward: Any, rows: Sequence[ParameterReport]) -> Iterator[str]:
    """Yield warnings to act on: nothing protected, one tower only, parameters that are full or nearly so."""
    free = [row for row in rows if row.fate is Fate.FREE]
    silent = [row.name for row in free if row.reason.startswith("not read")]
    if len(silent) == len(rows):
        yield (
            "nothing is protected: the forward pass read none of the trained parameters "
            "(another copy of the model, or weights that were copied before?)"
        )
    clip_towers = hasattr(model, "encode_image") and hasattr(model, "encode_text")
    if silent and clip_towers and forward is None:
        yield (
            f"only one tower was run: {len(silent)} parameters are free and old image-text logits are not protected; "
            "pass forward=clip_forward(model, tokens)"
        )
    if any("uncovered" in row.reason for row in free):
        yield 'parameters that are used but cannot be protected are trained (uncovered="train"): old outputs may move'
    for row in rows:
        if row.fate is Fate.FULL:
            yield f"'{row.name}' has no free direction left and is frozen from now on"
        elif row.dimension and row.dimension - row.free >= NEARLY_FULL * row.dimension:
            yield f"'{row.name}' is nearly full: {row.rank} of {row.dimension} directions are protected"


def _untrained_note(names: Sequence[str]) -> str | None:
    """Return the note that parameters were read which have no basis, because nothing trains them so far."""
    if not names:
        return None
    return (
        f"{len(names)} parameters were read but are not trained, so they have no basis ('{names[0]}', ...): "
        "make them trainable before this consolidation if a later task shall train them"
    )


def _few_rows_note(captured: Mapping[str, ParameterStatistics], rows: Sequence[ParameterReport]) -> str | None:
    """Return the note that a task gave fewer than ten rows for each direction it keeps."""
    seen = {name: [int(moment.rows.sum()) for moment in found.sides.values()] for name, found in captured.items()}
    few = [(row, min(seen[row.name])) for row in rows if seen.get(row.name)]
    few = [(row, count) for row, count in few if count < ENOUGH * row.rank]
    if not few:
        return None
    row, count = few[0]
    return (
        f"{len(few)} parameters met fewer than {ENOUGH} rows for each kept direction ('{row.name}': {count} rows, "
        f"rank {row.rank}, ...): other inputs of this task may lie outside; consolidate more of its data"
    )


def _sketch_note(captured: Mapping[str, ParameterStatistics]) -> str | None:
    """Return the note on the error of second moments of wide weights, by the bound of their sketches."""
    bounds = [
        (float(moment.bound.max()), name, moment.kept)
        for name, found in captured.items()
        for moment in found.sides.values()
        if isinstance(moment, FrequentDirections)
    ]
    if not bounds:
        return None
    bound, name, kept = max(bounds)
    return (
        f"{len(bounds)} wide weights were measured by sketches of {kept} rows: the second moment of no direction is "
        f"off by more than {bound:.2e} of its weight's energy ('{name}'; Frequent Directions, Ghashami et al. 2016, "
        "Theorem 1.1), and the energies kept are lower bounds"
    )


def _half_precision_note(parameters: Mapping[str, Tensor]) -> str | None:
    """Return the note on the rounding of half-precision parameters, and the way out."""
    coarse = [name for name, p in parameters.items() if p.dtype in (torch.bfloat16, torch.float16)]
    if not coarse:
        return None
    return (
        f"{len(coarse)} parameters are in half precision ('{coarse[0]}', ...): kept directions hold up to its "
        "rounding (relative drift 0.4 % in bfloat16, 0.05 % in float16); float32 parameters under autocast hold 1e-5"
    )


def _outside_note(model: nn.Module, count: int) -> str | None:
    """Return the note that the optimizer trains tensors which the model does not hold."""
    return (
        f"{count} tensors of the optimizer are not in {type(model).__name__}: they are not protected" if count else None
    )
