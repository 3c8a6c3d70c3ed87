"""One pass over a loader: capture -> second moments -> policy -> bases. All or nothing.

`consolidate` reads the model and returns a new `BasisStore` and a report; nothing is changed until the caller takes
the store over, and the model is left exactly as it was found (see `untouched`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import distributed
from .basis import BasisStore, Fate
from .capture import Capture
from .covariance import SecondMoment
from .diagnostics import allowed_drift
from .discovery import Forward, feeder
from .displacement import Displacement
from .engines import reshard, sharded_modules
from .errors import ConsolidationError, OptionError
from .fates import grow
from .guard import Guard, Precision
from .names import local, named_buffers, named_parameters, present_parameters
from .policies import Energy, Policy
from .policies.sketched import check_sketchable
from .probes import Probe, Recorder, digests_of, first_samples, samples_in
from .projection import exact_products
from .remarks import few_rows_note, half_precision_note, outside_note, sketch_note, untrained_note, warnings_about
from .report import ConsolidationReport
from .sketch import SketchedCovariance
from .untouched import untouched

ENDLESS = 100_000


@dataclass(frozen=True)
class ConsolidationOptions:
    """What is measured and how much of it is protected (see `NullSpaceOptimizer`)."""

    policy: Policy = field(default_factory=Energy)
    rows: Literal["relevant", "all"] = "relevant"
    bias: Literal["freeze", "joint"] = "freeze"
    uncovered: Literal["freeze", "train"] = "freeze"
    on_full: Literal["warn", "raise"] = "warn"
    covariance: Literal["exact"] | SketchedCovariance = "exact"
    precision: Precision = "exact"

    @property
    def sketch(self) -> SketchedCovariance | None:
        """Which second moments are sketched, `None`: none."""
        return self.covariance if isinstance(self.covariance, SketchedCovariance) else None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise OptionError(
                f"policy={self.policy!r}: expected a policy such as Energy(0.999), not {type(self.policy).__name__}"
            )
        if self.covariance != "exact" and self.sketch is None:
            raise OptionError(f"covariance={self.covariance!r}: expected 'exact' or a SketchedCovariance(size, above)")
        if self.sketch is not None:
            check_sketchable(self.policy)
        choices = {
            "rows": ("relevant", "all"),
            "bias": ("freeze", "joint"),
            "uncovered": ("freeze", "train"),
            "on_full": ("warn", "raise"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Pass:
    """What one consolidation looks at: the model, its trainable parameters by name, and how batches reach it.

    `outside` counts the tensors that the optimizer trains and the model does not hold.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    loader: Iterable[Any]
    task: str
    forward: Forward | None = None
    max_batches: int | None = None
    progress: bool = True
    outside: int = 0


def consolidate(
    work: Pass, store: BasisStore, options: ConsolidationOptions, displacement: Displacement
) -> tuple[BasisStore, ConsolidationReport]:
    """Return the bases after one more task and a report; `store` and the model are unchanged.

    Raises:
        ConsolidationError: no batches, a task name used twice, an endless loader, or no free dimension left with
            ``on_full="raise"``.
        CaptureError: non-finite rows or a weight that could not be observed.
    """
    started = time.perf_counter()
    with distributed.together():
        _check(work, store)
    with untouched(work.model, work.loader):
        _share_buffers(work.model)
        capture = _capture(work, options)
        first, batches = _observe(work, capture)
        device = next(iter(work.parameters.values())).device
        capture.reduce(device)
        with exact_products(device):
            grown, rows = grow(work.parameters, capture.captured, store, work.task, options.policy, options.uncovered)
        probe = record_probe(work, first)
        with distributed.together(communicating=True):
            drift, assumed = allowed_drift(work.parameters, grown, displacement, lambda: _runner(work)(first))
        for buffer in sorted(capture.buffers_read - set(grown.buffers)):
            grown.buffers[buffer] = named_buffers(work.model)[buffer].detach().clone()
    grown.probes[work.task] = {"digests": probe.digests, "sketches": probe.sketches, "norms": probe.norms}
    untrained = sorted(capture.untrained_read - set(grown))
    grown.tasks.append(
        {
            "name": work.task,
            "policy": repr(options.policy),
            "batches": batches,
            "layers": list(probe.layers),
            "untrained": untrained,
        }
    )
    report = ConsolidationReport(
        task=work.task,
        model=type(work.model).__name__,
        policy=repr(options.policy),
        batches=batches,
        parameters=tuple(rows),
        drift_allowed=drift,
        assumed_update=assumed,
        seconds=time.perf_counter() - started,
        bytes=stored_bytes(grown),
        transient_bytes=_transient_bytes(work.parameters, grown, options.precision),
        warnings=tuple(warnings_about(work.model, work.forward, rows)),
        notes=tuple(
            filter(
                None,
                [
                    capture.relevance_note,
                    untrained_note(untrained),
                    sketch_note(capture.captured),
                    few_rows_note(capture.captured, rows),
                    half_precision_note(work.parameters),
                    outside_note(work.model, work.outside),
                ],
            )
        ),
    )
    if options.on_full == "raise" and report.of(Fate.FULL):
        raise ConsolidationError(
            f"no free direction is left in '{report.of(Fate.FULL)[0].name}' after task '{work.task}'; "
            "nothing was changed. "
            'Lower the policy\'s threshold, release() the parameter, or use on_full="warn" to freeze it'
        )
    return grown, report


def _check(work: Pass, store: BasisStore) -> None:
    if any(task["name"] == work.task for task in store.tasks):
        raise ConsolidationError(f"task '{work.task}' has been consolidated already; give this one another name=")
    if not work.parameters:
        raise ConsolidationError(
            f"{type(work.model).__name__} holds no trainable parameter of the wrapped optimizer; "
            "pass the model that is trained"
        )
    _refuse_unready(work.parameters)


def _refuse_unready(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters without values, and parameters several elements of which are one place in memory."""
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ConsolidationError(
                f"'{name}' is on the meta device and has no values yet: materialise the model and build the optimizer "
                "from its parameters before consolidating"
            )
        if any(size > 1 and step == 0 for size, step in zip(parameter.shape, parameter.stride())):
            raise ConsolidationError(
                f"'{name}' {tuple(parameter.shape)} is an expanded tensor with strides {parameter.stride()}: several "
                "elements share one place in memory and cannot be corrected apart; make it a parameter of its clone()"
            )


def _share_buffers(model: nn.Module) -> None:
    """Let every rank measure with the buffers of rank 0, as the next forward pass of DDP does."""
    if distributed.ranks() > 1:
        buffers = named_buffers(model)
        kept = distributed.from_rank(0, {name: buffer.detach() for name, buffer in buffers.items()})
        for name, buffer in buffers.items():
            buffer.detach().copy_(kept[name])


def _present(model: nn.Module) -> Callable[[], Mapping[str, Tensor]] | None:
    """Return what stands for the parameters at a given moment, where FSDP2 swaps them."""
    return present_parameters(model) if sharded_modules(model) else None


def measure(work: Pass, options: ConsolidationOptions) -> dict[str, SecondMoment]:
    """Return the second moment of every parameter that met rows, as `consolidate` would see it; nothing is kept.

    Of a parameter that met rows on both sides it is that of the right one. In one process only.

    Raises:
        ConsolidationError: no batches, or several processes.
    """
    if options.sketch is not None:
        raise ConsolidationError('measure() returns whole second moments: use covariance="exact"')
    if distributed.ranks() > 1:
        raise ConsolidationError("measure() sees the batches of one process only; measure before the processes start")
    with untouched(work.model, work.loader):
        capture = _capture(work, options)
        _observe(work, capture)
    sides = {name: seen.sides for name, seen in capture.captured.items() if seen.sides and not seen.reasons}
    chosen = {name: found.get("right") or next(iter(found.values())) for name, found in sides.items()}
    return {name: moment for name, moment in chosen.items() if isinstance(moment, SecondMoment)}


def _capture(work: Pass, options: ConsolidationOptions) -> Capture:
    return Capture(
        work.parameters,
        buffers=named_buffers(work.model),
        untrained={n: p for n, p in named_parameters(work.model).items() if n not in work.parameters},
        rows=options.rows,
        bias=options.bias,
        dtype=torch.float64 if options.policy.precise else torch.float32,
        batch_frobenius=options.policy.batch_frobenius,
        sketch=options.sketch,
        present=_present(work.model),
        in_step=bool(sharded_modules(work.model)),
    )


def _runner(work: Pass) -> Forward:
    restart = getattr(work.forward, "restart", None)
    if restart is not None:
        restart()
    run = feeder(work.model, work.forward)
    if not sharded_modules(work.model):
        return run

    def run_resharded(batch: Any) -> Any:
        reshard(work.model)
        return run(batch)

    return run_resharded


def _observe(work: Pass, capture: Capture) -> tuple[Any, int]:
    """Run the model on every batch under `capture`; return the first samples and the number of batches, of all ranks.

    Replicas run through their loaders independently. Ranks that hold shards of one model must run it at the same time:
    one whose loader has ended joins in with samples that do not count.
    """
    observe = _observe_shards if sharded_modules(work.model) else _observe_replica
    with capture:
        first, number = observe(work, capture)
    numbers = distributed.everyone(number)
    if not any(numbers):
        raise ConsolidationError(f"the loader of task '{work.task}' gave no batches; nothing was changed")
    return distributed.from_rank([n > 0 for n in numbers].index(True), first), sum(numbers)


def _observe_replica(work: Pass, capture: Capture) -> tuple[Any, int]:
    first, number, run = None, 0, _runner(work)
    with distributed.together():
        for batch in _bounded(work):
            if not number:
                first = first_samples(batch)
            with _located(work, number):
                capture.batch(lambda batch=batch: run(batch))  # type: ignore[misc]
            number += 1
    return first, number


def _observe_shards(work: Pass, capture: Capture) -> tuple[Any, int]:
    batches, first, number, run = iter(_bounded(work)), None, 0, _runner(work)
    ended, lent = object(), None
    for turn in count():
        with distributed.together():
            batch = next(batches, ended)
            if turn == 0 and batch is not ended:
                first = first_samples(batch)
        having = distributed.everyone(batch is not ended)
        if not any(having):
            break
        if turn == 0:
            lent = distributed.from_rank(having.index(True), first)
        mine = batch is not ended
        samples = batch if mine else lent
        with distributed.together(communicating=True), _located(work, number):
            capture.batch(lambda samples=samples: run(samples), counted=mine)  # type: ignore[misc]
        number += mine
    return first, number


@contextmanager
def _located(work: Pass, number: int) -> Iterator[None]:
    """Say in an error which batch it came from."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"while consolidating task '{work.task}', batch {number}; nothing was changed")
        raise


def _bounded(work: Pass) -> Iterator[Any]:
    try:
        total: int | None = len(work.loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    if work.max_batches is not None:
        total = work.max_batches if total is None else min(total, work.max_batches)
    limit = work.max_batches if work.max_batches is not None else (ENDLESS if total is None else None)
    batches = islice(iter(work.loader), limit)
    for number, batch in enumerate(
        tqdm(batches, total=total, desc=f"consolidate {work.task}", disable=not work.progress, leave=False)
    ):
        if samples_in(batch) != 0:
            yield batch
        if total is None and number + 1 == ENDLESS:
            raise ConsolidationError(
                f"the loader of task '{work.task}' has no length and gave {ENDLESS} batches; pass max_batches="
            )


def observe(work: Pass) -> tuple[Any, int]:
    """Run the model on every batch and watch nothing; return the first samples and the number of batches.

    Raises:
        ConsolidationError: the loader gave no batches or is endless.
    """
    run, first, number = _runner(work), None, 0
    with torch.no_grad():
        for number, batch in enumerate(_bounded(work), 1):
            first = first_samples(batch) if number == 1 else first
            run(batch)
    if not number:
        raise ConsolidationError(f"the loader of task '{work.task}' gave no batches; nothing was changed")
    return first, number


def record_probe(work: Pass, samples: Any) -> Probe:
    """Run the model on `samples` and return the probe of its layers and outputs."""
    recorder = Recorder()
    capture = Capture(work.parameters, rows="all", statistics=False, present=_present(work.model))
    capture.observe = recorder.observe
    run = _runner(work)
    with distributed.together(communicating=True), capture:
        outputs = capture.batch(lambda: run(samples))
    return recorder.finish(outputs, digests_of(samples))


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
    return sum(local(guard.parameter).nbytes for guard in guards if guard.wants_difference(precision))
