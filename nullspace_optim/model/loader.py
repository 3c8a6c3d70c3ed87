"""One pass of a loader through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..distributed.fsdp import reshard, sharded_modules
from ..errors import BatchError, ConsolidationError, OptionError
from .batches import Forward, feeder, leading_outputs, outputs_agree, samples_in
from .names import present_parameters
from .restore import fixed_seed

ENDLESS = 100_000


@dataclass(frozen=True)
class LoaderPass:
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

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or not self.task:
            raise OptionError(f"consolidate(name={self.task!r}): expected the task's name, a text that is not empty")


def current_parameters(model: nn.Module) -> Callable[[], Mapping[str, Tensor]] | None:
    """Return what stands for the parameters at a given moment, where FSDP2 swaps them."""
    return present_parameters(model) if sharded_modules(model) else None


def make_runner(work: LoaderPass) -> Forward:
    """Return the function that feeds one batch, `restart`ed, FSDP2 blocks sharded again before each batch."""
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


@contextmanager
def name_batch_in_errors(work: LoaderPass, number: int) -> Iterator[None]:
    """Say in an error which batch it came from."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"while consolidating task '{work.task}', batch {number}; nothing was changed")
        raise


def refuse_single_batch(loader: Any) -> None:
    """Refuse a tensor or an array in the place of a loader: its rows would be taken for batches.

    Raises:
        BatchError: says how to pass one batch; also for what gives no batches at all.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise BatchError(f"{loader!r} was passed where batches are expected: pass a DataLoader or a list of batches")
    if isinstance(loader, (Tensor, np.ndarray)):
        raise BatchError(
            f"a {type(loader).__name__} of shape {tuple(loader.shape)} was passed where batches are expected: pass "
            "[tensor] for one batch, or a DataLoader"
        )


def _length(loader: Any) -> int | None:
    """Return the number of batches, `None` where the loader cannot tell it."""
    try:
        return len(loader)
    except Exception:  # streams raise errors of any kind here
        return None


def bound_batches(work: LoaderPass) -> Iterator[Any]:
    """Yield the batches that have samples, at most `max_batches`, under a progress bar.

    Raises:
        ConsolidationError: a loader without length is endless.
        BatchError: the loader is a single tensor.
    """
    refuse_single_batch(work.loader)
    total = _length(work.loader)
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


def run_apart(run: Forward, samples: Any, within: Sequence[Tensor]) -> bool:
    """Return whether the first samples of a batch can stand alone: `run` gives for them the outputs that it gave
    `within` the batch (see `leading_outputs`).

    They cannot where the first axis is not one of samples: nodes of a graph, steps of time, crops of one image.
    """
    try:
        with torch.no_grad(), fixed_seed():
            alone = leading_outputs(run(samples))
    except Exception:  # shapes that the model cannot work with
        return False
    return outputs_agree(within, alone)
