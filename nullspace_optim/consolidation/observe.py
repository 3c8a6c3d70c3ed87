"""One pass of a loader under `Capture`, in one process, on replicas or on shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from ..capture.capture import Capture
from ..covariance.accumulator import ParameterStatistics
from ..distributed.communicator import Communicator
from ..distributed.failures import raise_on_all_ranks
from ..distributed.fsdp import sharded_modules
from ..errors import ConsolidationError
from ..model.batches import first_samples
from ..model.loader import LoaderPass, bound_batches, current_parameters, make_runner, name_batch_in_errors
from ..model.names import named_buffers, named_parameters
from ..settings import Settings


@dataclass(frozen=True)
class Observation:
    """Statistics of all batches of all ranks, their first samples and their number."""

    capture: Capture
    first: Any
    batches: int
    device: torch.device

    @property
    def captured(self) -> Mapping[str, ParameterStatistics]:
        """Statistics by parameter name."""
        return self.capture.captured


def observe(work: LoaderPass, options: Settings, ranks: Communicator) -> Observation:
    """Run the model on every batch and return what its parameters met, on all ranks together.

    Replicas run through their loaders independently. Ranks that hold shards of one model must run it at the same time:
    one whose loader has ended joins in with samples that do not count.

    Raises:
        ConsolidationError: the loader gave no batches.
    """
    _share_buffers(work.model, ranks)
    capture = _capture(work, options)
    with capture:
        if sharded_modules(work.model):
            first, number = _observe_shards(work, capture, ranks)
        else:
            first, number = _observe_replica(work, capture)
    numbers = ranks.all_gather_object(number)
    if not any(numbers):
        raise ConsolidationError(f"the loader of task '{work.task}' gave no batches; nothing was changed")
    first = ranks.broadcast_object([n > 0 for n in numbers].index(True), first)
    device = next(iter(work.parameters.values())).device
    capture.reduce(device)
    return Observation(capture, first, sum(numbers), device)


def _share_buffers(model: nn.Module, ranks: Communicator) -> None:
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


def _observe_replica(work: LoaderPass, capture: Capture) -> tuple[Any, int]:
    """Return the first samples and the number of batches of this process."""
    first, number, run = None, 0, make_runner(work)
    with raise_on_all_ranks():
        for batch in bound_batches(work):
            if not number:
                first = first_samples(batch)
            with name_batch_in_errors(work, number):
                capture.batch(lambda batch=batch: run(batch))  # type: ignore[misc]
            number += 1
    return first, number


def _observe_shards(work: LoaderPass, capture: Capture, ranks: Communicator) -> tuple[Any, int]:
    """Return the first samples and the number of batches of this rank; all ranks run each batch together."""
    batches, first, number, run = iter(bound_batches(work)), None, 0, make_runner(work)
    ended, lent = object(), None
    for turn in count():
        with raise_on_all_ranks():
            batch = next(batches, ended)
            if turn == 0 and batch is not ended:
                first = first_samples(batch)
        having = ranks.all_gather_object(batch is not ended)
        if not any(having):
            break
        if turn == 0:
            lent = ranks.broadcast_object(having.index(True), first)
        mine = batch is not ended
        samples = batch if mine else lent
        with raise_on_all_ranks(communicating=True), name_batch_in_errors(work, number):
            capture.batch(lambda samples=samples: run(samples), counted=mine)  # type: ignore[misc]
        number += mine
    return first, number
