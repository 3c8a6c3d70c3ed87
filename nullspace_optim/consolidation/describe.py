"""Report of a consolidation, from what was seen and what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..capture.capture import Capture
from ..distributed.group import local_tensor
from ..model.batches import describe_feed, first_samples, samples_in
from ..model.loader import LoaderPass
from ..protection.guard import Guard, Precision
from ..report import ConsolidationReport, ParameterReport
from ..subspace.basis import BasisStore, Fate
from .notes import (
    coverage_note,
    few_rows_note,
    half_precision_note,
    outside_note,
    sketch_note,
    untrained_note,
    warnings_about,
)
from .options import ConsolidationOptions


@dataclass
class Seen:
    """What a pass saw: the first samples, the numbers of batches and samples (`None`: a batch had no common first
    axis), and how the first batch was fed, with a note where that was a guess.
    """

    first: Any = None
    batches: int = 0
    samples: int | None = 0
    fed: tuple[str, str | None] = ("", None)

    def take(self, work: LoaderPass, batch: Any) -> None:
        """Count one batch."""
        if not self.batches:
            self.first = first_samples(batch)
            self.fed = describe_feed(work.model, work.forward, batch)
        count = samples_in(batch)
        self.samples = None if count is None or self.samples is None else self.samples + count
        self.batches += 1


def describe(
    work: LoaderPass,
    seen: Seen,
    capture: Capture,
    grown: BasisStore,
    rows: Sequence[ParameterReport],
    options: ConsolidationOptions,
) -> ConsolidationReport:
    """Return the report of the last task of `grown`, whose parameters `rows` describe."""
    untrained: Any = grown.tasks[-1]["untrained"]
    dataset = _dataset_length(work)
    warnings = [*filter(None, [seen.fed[1]]), *warnings_about(work.model, work.forward, rows, work.task, grown)]
    notes = [
        coverage_note(work.loader, seen.samples, dataset),
        capture.relevance_note,
        untrained_note(untrained),
        sketch_note(capture.captured),
        few_rows_note(capture.captured, rows),
        half_precision_note(work.parameters),
        outside_note(work.model, work.outside),
    ]
    return ConsolidationReport(
        task=work.task,
        model=type(work.model).__name__,
        policy=repr(options.policy),
        batches=seen.batches,
        parameters=tuple(rows),
        seconds=0.0,
        bytes=stored_bytes(grown),
        transient_bytes=_transient_bytes(work.parameters, grown, options.precision),
        warnings=tuple(warnings),
        notes=tuple(note for note in notes if note),
        samples=seen.samples,
        dataset=dataset,
        fed=seen.fed[0],
    )


def _dataset_length(work: LoaderPass) -> int | None:
    """Return the number of samples of the loader's data set, `None` if it tells none."""
    try:
        return len(work.loader.dataset)  # type: ignore[attr-defined]
    except Exception:  # no data set, or a stream that raises an error of any kind
        return None


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
