"""Record and report of one consolidation: what later runs compare with, and figures with warnings and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..distributed.group import local_tensor
from ..model.loader import LoaderPass
from ..protection.guard import Guard
from ..report import ConsolidationReport, ParameterReport
from ..settings import Precision, Settings
from ..subspace.basis import BasisStore, Fate
from ..verification.probes import record_probe
from .notes import (
    coverage_note,
    few_rows_note,
    half_precision_note,
    outside_note,
    sketch_note,
    unrun_note,
    untrained_note,
    warnings_about,
    weights_note,
    wide_note,
)
from .observe import Observation


def remember_task(work: LoaderPass, options: Settings, seen: Observation, grown: BasisStore) -> None:
    """Add to `grown` the task's record, the probe of its first samples, and the buffers its forward passes read."""
    probe = record_probe(work, seen.tally.first)
    grown.probes[work.task] = probe.tensors
    for buffer in sorted(seen.capture.buffers_read - set(grown.buffers)):
        grown.buffers[buffer] = seen.buffers[buffer]
    grown.tasks.append(
        {
            "name": work.task,
            "policy": repr(options.policy),
            "batches": seen.tally.batches,
            **probe.record,
            "untrained": _untrained(seen, grown),
        }
    )


def describe(
    work: LoaderPass,
    options: Settings,
    seen: Observation,
    grown: BasisStore,
    rows: Sequence[ParameterReport],
    drift: dict[str, float],
    failed: Mapping[str, str],
) -> ConsolidationReport:
    """Return the report of a consolidation that made `grown`, without duration; `drift` is that of earlier tasks, of
    those that could not be run the error.
    """
    tally, dataset = seen.tally, _dataset_length(work)
    warnings = [tally.fed[1], *warnings_about(work.model, work.forward, rows, work.task, grown, options.policy)]
    of_inputs = [
        coverage_note(work.loader, tally.samples, dataset),
        seen.capture.relevance_note,
        sketch_note(seen.captured),
        wide_note(seen.captured, options) if len(grown.tasks) == 1 else None,
        few_rows_note(seen.captured, rows),
    ]
    notes = [
        *([weights_note(options.policy)] if options.policy.from_weights else of_inputs),
        seen.unknown,
        seen.uncut,
        unrun_note(failed),
        untrained_note(_untrained(seen, grown)),
        half_precision_note(work.parameters),
        outside_note(work.model, work.outside),
    ]
    return ConsolidationReport(
        task=work.task,
        model=type(work.model).__name__,
        policy=repr(options.policy),
        batches=tally.batches,
        parameters=tuple(rows),
        seconds=0.0,
        bytes=stored_bytes(grown),
        transient_bytes=_transient_bytes(work.parameters, grown, options.precision),
        warnings=tuple(filter(None, warnings)),
        notes=tuple(filter(None, notes)),
        samples=tally.samples,
        dataset=dataset,
        fed=tally.fed[0],
        drift=drift,
    )


def _dataset_length(work: LoaderPass) -> int | None:
    """Return the number of samples of the loader's data set, `None` if it has none that tells it."""
    try:
        return len(work.loader.dataset)  # type: ignore[attr-defined]
    except Exception:  # streams raise errors of any kind here
        return None


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
