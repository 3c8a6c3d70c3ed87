"""One pass over a loader: capture -> second moments -> policy -> bases. All or nothing.

`consolidate` reads the model and returns a new `BasisStore` and a report; nothing is changed until the caller takes
the store over, and the model is left exactly as it was found (see `restored_model`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.bypass import UNSEEN
from ..capture.capture import Capture
from ..covariance.second_moment import SecondMoment
from ..distributed import collectives, failures, group
from ..distributed.fsdp import sharded_modules
from ..distributed.group import local_tensor
from ..errors import ConsolidationError
from ..model.batches import first_samples
from ..model.loader import LoaderPass, bound_batches, current_parameters, make_runner, name_batch_in_errors
from ..model.names import named_buffers, named_parameters
from ..model.restore import restored_model
from ..model.storage import is_plain
from ..protection.guard import Guard, Precision
from ..report import ConsolidationReport
from ..subspace.basis import BasisStore, Fate
from ..subspace.projection import exact_products
from ..verification.displacement import Displacement
from ..verification.drift import allowed_drift
from ..verification.probes import record_probe
from ..verification.unread import NOT_REPEATABLE, reaching_parameters
from .fates import settle_fates
from .notes import few_rows_note, half_precision_note, outside_note, sketch_note, untrained_note, warnings_about
from .options import ConsolidationOptions


def consolidate(
    work: LoaderPass, store: BasisStore, options: ConsolidationOptions, displacement: Displacement
) -> tuple[BasisStore, ConsolidationReport]:
    """Return the bases after one more task and a report; `store` and the model are unchanged.

    Raises:
        ConsolidationError: no batches, a task name used twice, an endless loader, or no free dimension left with
            ``on_full="raise"``.
        CaptureError: non-finite rows or a weight that could not be observed.
    """
    started = time.perf_counter()
    with failures.raise_on_all_ranks():
        _check(work, store)
    with restored_model(work.model, work.loader):
        _share_buffers(work.model)
        capture = _capture(work, options)
        first, batches = _observe(work, capture)
        device = next(iter(work.parameters.values())).device
        capture.reduce(device)
        unknown = _find_unseen(work, capture, first)
        with exact_products(device):
            grown, rows = settle_fates(
                work.parameters, capture.captured, store, work.task, options.policy, options.uncovered
            )
        probe = record_probe(work, first)
        with failures.raise_on_all_ranks(communicating=True):
            drift, assumed = allowed_drift(work.parameters, grown, displacement, lambda: make_runner(work)(first))
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
                    unknown,
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


def _check(work: LoaderPass, store: BasisStore) -> None:
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
        if not is_plain(parameter):
            raise ConsolidationError(
                f"'{name}' is a {str(parameter.layout).removeprefix('torch.')} tensor, of which kept directions cannot "
                "be corrected: make it a dense parameter (to_dense()), or give it requires_grad=False"
            )
        if any(size > 1 and step == 0 for size, step in zip(parameter.shape, parameter.stride())):
            raise ConsolidationError(
                f"'{name}' {tuple(parameter.shape)} is an expanded tensor with strides {parameter.stride()}: several "
                "elements share one place in memory and cannot be corrected apart; make it a parameter of its clone()"
            )


def _share_buffers(model: nn.Module) -> None:
    """Let every rank measure with the buffers of rank 0, as the next forward pass of DDP does."""
    if group.world_size() > 1:
        buffers = named_buffers(model)
        kept = collectives.broadcast_object(0, {name: buffer.detach() for name, buffer in buffers.items()})
        for name, buffer in buffers.items():
            buffer.detach().copy_(kept[name])


def measure(work: LoaderPass, options: ConsolidationOptions) -> dict[str, SecondMoment]:
    """Return the second moment of every parameter that met rows, as `consolidate` would see it; nothing is kept.

    Of a parameter that met rows on both sides it is that of the right one. In one process only.

    Raises:
        ConsolidationError: no batches, or several processes.
    """
    if options.sketch is not None:
        raise ConsolidationError('measure() returns whole second moments: use covariance="exact"')
    if group.world_size() > 1:
        raise ConsolidationError("measure() sees the batches of one process only; measure before the processes start")
    with restored_model(work.model, work.loader):
        capture = _capture(work, options)
        _observe(work, capture)
    sides = {name: seen.sides for name, seen in capture.captured.items() if seen.sides and not seen.reasons}
    chosen = {name: found.get("right") or next(iter(found.values())) for name, found in sides.items()}
    return {name: moment for name, moment in chosen.items() if isinstance(moment, SecondMoment)}


def _capture(work: LoaderPass, options: ConsolidationOptions) -> Capture:
    return Capture(
        work.parameters,
        buffers=named_buffers(work.model),
        untrained={n: p for n, p in named_parameters(work.model).items() if n not in work.parameters},
        rows=options.rows,
        bias=options.bias,
        dtype=torch.float64 if options.policy.precise else torch.float32,
        batch_frobenius=options.policy.batch_frobenius,
        sketch=options.sketch,
        present=current_parameters(work.model),
        in_step=bool(sharded_modules(work.model)),
    )


def _observe(work: LoaderPass, capture: Capture) -> tuple[Any, int]:
    """Run the model on every batch under `capture`; return the first samples and the number of batches, of all ranks.

    Replicas run through their loaders independently. Ranks that hold shards of one model must run it at the same time:
    one whose loader has ended joins in with samples that do not count.
    """
    observe = _observe_shards if sharded_modules(work.model) else _observe_replica
    with capture:
        first, number = observe(work, capture)
    numbers = collectives.all_gather_object(number)
    if not any(numbers):
        raise ConsolidationError(f"the loader of task '{work.task}' gave no batches; nothing was changed")
    return collectives.broadcast_object([n > 0 for n in numbers].index(True), first), sum(numbers)


def _observe_replica(work: LoaderPass, capture: Capture) -> tuple[Any, int]:
    first, number, run = None, 0, make_runner(work)
    with failures.raise_on_all_ranks():
        for batch in bound_batches(work):
            if not number:
                first = first_samples(batch)
            with name_batch_in_errors(work, number):
                capture.batch(lambda batch=batch: run(batch))  # type: ignore[misc]
            number += 1
    return first, number


def _observe_shards(work: LoaderPass, capture: Capture) -> tuple[Any, int]:
    batches, first, number, run = iter(bound_batches(work)), None, 0, make_runner(work)
    ended, lent = object(), None
    for turn in count():
        with failures.raise_on_all_ranks():
            batch = next(batches, ended)
            if turn == 0 and batch is not ended:
                first = first_samples(batch)
        having = collectives.all_gather_object(batch is not ended)
        if not any(having):
            break
        if turn == 0:
            lent = collectives.broadcast_object(having.index(True), first)
        mine = batch is not ended
        samples = batch if mine else lent
        with failures.raise_on_all_ranks(communicating=True), name_batch_in_errors(work, number):
            capture.batch(lambda samples=samples: run(samples), counted=mine)  # type: ignore[misc]
        number += mine
    return first, number


def _find_unseen(work: LoaderPass, capture: Capture, first: Any) -> str | None:
    """Let `capture` know of parameters that were read past it; return a note where that cannot be found out."""
    unread = {name: work.parameters[name] for name in sorted(capture.unread)}
    with failures.raise_on_all_ranks(communicating=True):
        reaching = reaching_parameters(unread, lambda: make_runner(work)(first))
    for name in reaching or ():
        capture.refuse(name, UNSEEN)
    return NOT_REPEATABLE.format(next(iter(unread))) if reaching is None else None


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
