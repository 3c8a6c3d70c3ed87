"""One pass of a loader under `Capture`, in one process, on replicas or on shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.bypass import UNSEEN
from ..capture.capture import Capture
from ..covariance.accumulator import ParameterStatistics
from ..distributed.communicator import Communicator
from ..distributed.failures import raise_on_all_ranks
from ..distributed.fsdp import sharded_modules
from ..errors import ConsolidationError
from ..model.batches import describe_feed, first_samples, leading_outputs, samples_in
from ..model.loader import LoaderPass, bound_batches, current_parameters, make_runner, name_batch_in_errors, run_apart
from ..model.names import named_buffers, named_parameters
from ..settings import Settings
from ..verification.unread import NOT_REPEATABLE, reaching_parameters

Run = Callable[[Any, bool], Any]
"""Runs the model on a batch and returns its outputs; the flag tells whether the batch counts on this rank."""

UNCUT = (
    "the first 32 entries of a batch give other outputs alone than within it (a graph, time steps, crops of an image, "
    "random numbers): verify() and the drift of later reports look at the whole first batch"
)


@dataclass
class Tally:
    """Counts of one rank: the first batch and the `within` of its outputs (see `run_apart`), how it was fed (with a
    note where that was a guess), the number of batches, and of samples (`None`: a batch had no common first axis).
    """

    first: Any = None
    within: Sequence[Tensor] = ()
    fed: tuple[str, str | None] = ("", None)
    batches: int = 0
    samples: int | None = 0

    def take(self, work: LoaderPass, batch: Any, outputs: Any) -> None:
        """Count one batch that gave `outputs`."""
        if not self.batches:
            self.first, self.within = batch, leading_outputs(outputs)
            self.fed = describe_feed(work.model, work.forward, batch)
        count = samples_in(batch)
        self.samples = None if count is None or self.samples is None else self.samples + count
        self.batches += 1


@dataclass(frozen=True)
class Observation:
    """Statistics of all batches of all ranks, their first samples, their number, and `buffers` as they were before.

    `unknown` tells where it could not be found out whether unread parameters reach the outputs, `uncut` that first
    samples are the whole first batch.
    """

    capture: Capture
    buffers: Mapping[str, Tensor]
    device: torch.device
    tally: Tally
    unknown: str | None = None
    uncut: str | None = None

    @property
    def captured(self) -> Mapping[str, ParameterStatistics]:
        """Statistics by parameter name."""
        return self.capture.captured


def observe(work: LoaderPass, options: Settings, ranks: Communicator) -> Observation:
    """Run the model on every batch and return what its parameters met, on all ranks together.

    Raises:
        ConsolidationError: the loaders gave no batches.
    """
    share_buffers(work.model, ranks)
    buffers = {name: buffer.detach().clone() for name, buffer in named_buffers(work.model).items()}
    capture, feed = _capture(work, options), make_runner(work)

    def observed(batch: Any, counted: bool) -> Any:
        return capture.batch(lambda: feed(batch), counted=counted, samples=samples_in(batch))

    with capture:
        tally = run_batches(work, ranks, observed)
    tally, uncut = sum_tallies(work, tally, ranks)
    device = next(iter(work.parameters.values())).device
    capture.reduce(device)
    return Observation(capture, buffers, device, tally, _find_unseen(work, capture, tally.first), uncut)


def _find_unseen(work: LoaderPass, capture: Capture, first: Any) -> str | None:
    """Let `capture` know of parameters that were read past it; return a note where that cannot be found out."""
    unread = {name: work.parameters[name] for name in sorted(capture.unread)}
    with raise_on_all_ranks(communicating=True):
        reaching = reaching_parameters(unread, lambda: make_runner(work)(first))
    for name in reaching or ():
        capture.refuse(name, UNSEEN)
    return NOT_REPEATABLE.format(next(iter(unread))) if reaching is None else None


def run_batches(work: LoaderPass, ranks: Communicator, run: Run) -> Tally:
    """Give every batch of the loader to `run`; return what this rank saw.

    Replicas run through their loaders independently. Ranks that hold shards of one model must run it at the same time:
    one whose loader has ended joins in with samples that do not count.
    """
    return _run_shards(work, ranks, run) if sharded_modules(work.model) else _run_replica(work, run)


def sum_tallies(work: LoaderPass, tally: Tally, ranks: Communicator) -> tuple[Tally, str | None]:
    """Return the counts of all ranks, with the first samples of the first rank that has some, and a note if these
    cannot be cut.
    """
    counts = ranks.all_gather_object((tally.batches, tally.samples))
    batches = [number for number, _ in counts]
    if not any(batches):
        raise ConsolidationError(f"the loader of task '{work.task}' gave no batches; nothing was changed")
    source = [n > 0 for n in batches].index(True)
    few = first_samples(tally.first)
    first, fed, cut = ranks.broadcast_object(source, (few, tally.fed, samples_in(few) != samples_in(tally.first)))
    uncut = None
    if cut:
        apart = run_apart(make_runner(work), first, tally.within)  # on all ranks: they may hold shards of one model
        if not ranks.broadcast_object(source, apart):
            first, uncut = ranks.broadcast_object(source, tally.first), UNCUT
    samples = [number for _, number in counts if number is not None]
    return Tally(first, (), fed, sum(batches), sum(samples) if len(samples) == len(counts) else None), uncut


def share_buffers(model: nn.Module, ranks: Communicator) -> None:
    """Copy the buffers of rank 0 to every rank, as the next forward pass of DDP does."""
    if ranks.size == 1:
        return
    buffers = named_buffers(model)
    kept = ranks.broadcast_object(0, {name: buffer.detach() for name, buffer in buffers.items()})
    for name, buffer in buffers.items():
        buffer.detach().copy_(kept[name])


def _capture(work: LoaderPass, options: Settings) -> Capture:
    return Capture(
        work.parameters,
        options,
        buffers=named_buffers(work.model),
        untrained={n: p for n, p in named_parameters(work.model).items() if n not in work.parameters},
        present=current_parameters(work.model),
    )


def _run_replica(work: LoaderPass, run: Run) -> Tally:
    """Return what this process saw."""
    tally = Tally()
    with raise_on_all_ranks():
        for batch in bound_batches(work):
            with name_batch_in_errors(work, tally.batches):
                outputs = run(batch, True)
            tally.take(work, batch, outputs)
    return tally


def _run_shards(work: LoaderPass, ranks: Communicator, run: Run) -> Tally:
    """Return what this rank saw; all ranks run each batch together."""
    batches, tally = iter(bound_batches(work)), Tally()
    ended, lent = object(), None
    for turn in count():
        with raise_on_all_ranks():
            batch = next(batches, ended)
        having = ranks.all_gather_object(batch is not ended)
        if not any(having):
            break
        if turn == 0:
            lent = ranks.broadcast_object(having.index(True), batch if batch is not ended else None)
        mine = batch is not ended
        samples = batch if mine else lent
        with raise_on_all_ranks(communicating=True), name_batch_in_errors(work, tally.batches):
            outputs = run(samples, mine)
        if mine:
            tally.take(work, batch, outputs)
    return tally
