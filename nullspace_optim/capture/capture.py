"""Capture of the input rows of every weight, operator by operator; the model is left as found.

`Capture` runs forward passes under a `TorchDispatchMode` (`watching`). Whatever module, function or `@` led
there, a product with a parameter ends in one of few operators; the operand that is the parameter is recognised
by its bytes (`aliases`), the side of the weight follows from its strides (`operators`), and rows that no
output can depend on are left out (`relevance`). Rows stream into `SecondMoment`s `[g, s, s]`; weights that
always meet the same rows share one (`StatisticsAccumulator`). Every operator that reads a parameter in another way
gives a reason why it cannot be protected, so the fates of all parameters add up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..covariance.accumulator import ParameterStatistics, StatisticsAccumulator
from ..covariance.all_reduce import reduce_statistics, union_over_ranks
from ..distributed.collectives import all_gather_object
from ..distributed.group import local_tensor
from ..model.batches import detach, tensors_in
from ..model.storage import tensor_key
from ..settings import Settings
from .aliases import AliasTracker
from .bypass import BypassMode
from .dispatch import CaptureMode
from .relevance.relevance import Relevance
from .shared import shared_statistics
from .uses import OperatorHandlers


class Capture:
    """Observes forward passes, one `batch` at a time, and sums up what the parameters met."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        options: Settings,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        untrained: Mapping[str, Tensor] | None = None,
        present: Callable[[], Mapping[str, Tensor]] | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        """Watch `parameters` and `buffers`, by name; note which of the `untrained` parameters are read.

        Of `options` it needs ``rows="relevant"``, which leaves out rows that no output of the model depends on,
        ``bias="joint"``, which extends the rows of a weight by a constant 1 for its bias, and what second moments are
        summed in, normalised and sketched by. `present` returns the tensors that stand for the parameters at this
        moment where a framework swaps them (FSDP2); all ranks then run each batch at the same time. `observe(name,
        output)` is called for every product with a parameter; no sums are kept then, only reasons and order.
        """
        self._observe = observe
        self._names = _unique(parameters)
        distinct = {name: parameters[name] for name in dict.fromkeys(self._names.values())}
        self._memory = AliasTracker(distinct, buffers or {}, untrained or {}, present)
        self._empty_tally: Callable[[], StatisticsAccumulator] = partial(
            StatisticsAccumulator,
            dtype=options.dtype,
            batch_frobenius=options.policy.batch_frobenius,
            statistics=observe is None,
            sketch=options.sketch,
        )
        self._tally = self._empty_tally()
        self._relevance = Relevance() if options.rows == "relevant" else None
        self._joint = options.bias == "joint"
        self._batches = 0
        self._samples: int | None = None
        self._gradients = False

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._memory.forget()
        self._tally.drop_queue()

    @property
    def captured(self) -> dict[str, ParameterStatistics]:
        """Statistics of every parameter after the batches so far."""
        parameters = self._memory.parameters
        found = {name: self._tally.captured(name, p.shape) for name, p in parameters.items()}
        for group in self._memory.shared:
            found.update(shared_statistics({name: (found[name], parameters[name]) for name in group}))
        return {name: found[first] for name, first in self._names.items()}

    @property
    def buffers_read(self) -> set[str]:
        """Names of the buffers that a forward pass has read."""
        return set(self._memory.buffers_read)

    @property
    def untrained_read(self) -> set[str]:
        """Names of the untrained parameters that a forward pass has read."""
        return set(self._memory.untrained_read)

    @property
    def unread(self) -> set[str]:
        """Names of the parameters that nothing was seen to read, and nobody promised to be free to move."""
        return {name for name, seen in self.captured.items() if not seen.met} - self._memory.promised

    @property
    def order(self) -> list[str]:
        """Names of the parameters that were read, in the order of their first use."""
        return list(self._tally.order)

    def reduce(self, device: torch.device) -> None:
        """Join the statistics of all ranks (see `all_reduce`); nothing in one process."""
        reduce_statistics(self._tally, device)
        self._memory.buffers_read = union_over_ranks(self._memory.buffers_read)
        self._memory.untrained_read = union_over_ranks(self._memory.untrained_read)
        self._memory.promised = union_over_ranks(self._memory.promised)
        if self._relevance is not None:
            self._relevance.note = next(filter(None, all_gather_object(self._relevance.note)), None)

    @property
    def relevance_note(self) -> str | None:
        """Reason why all rows count in spite of ``rows="relevant"``, or `None`."""
        return None if self._relevance is None else self._relevance.note

    def batch(self, run: Callable[[], Any], *, counted: bool = True, samples: int | None = None) -> Any:
        """Run one forward pass `run()`, take its rows (unless it is not `counted`), and return its outputs, detached.

        `samples` is their number, by which lookups in an embedding are told apart (`None`: unknown).

        Raises:
            CaptureError: a row was not finite, or a weight was cast where it could not be followed.
        """
        relevance = None if self._relevance is None or self._relevance.refused else self._relevance
        self._samples = samples
        try:
            outputs = self._run(run, relevance, counted)
            with torch.inference_mode(False), torch.no_grad():
                self._tally.end_batch(self._batches)
        finally:
            self._tally.drop_queue()
            self._memory.forget()
            if relevance is not None:
                relevance.forget()
        self._batches += counted
        return outputs

    def _run(self, run: Callable[[], Any], relevance: Relevance | None, counted: bool) -> Any:
        """Run one batch without autograd; again with it where the forward pass itself differentiates, and again where
        `torch.compile` was loaded in the middle of it.
        """
        loaded = "torch._dynamo" in sys.modules
        try:
            return self._forward(run, relevance, counted)
        except Exception as error:
            if isinstance(error, RuntimeError) and "does not require grad" in str(error) and not self._gradients:
                self._gradients = True
                if relevance is not None:
                    relevance.refuse("the forward pass differentiates")
                    relevance = None
            elif loaded or "torch._dynamo" not in sys.modules:
                raise
        self._tally.drop_queue()
        self._memory.forget()
        if not self._batches:  # what an unfinished first run has left
            self._tally = self._empty_tally()
        return self._forward(run, relevance, counted)

    def _forward(self, run: Callable[[], Any], relevance: Relevance | None, counted: bool) -> Any:
        """Run the forward pass, find the rows that count, and hand them to the tally."""
        self._memory.refresh()
        tally = (
            self._tally
            if counted
            else StatisticsAccumulator(dtype=torch.float32, batch_frobenius=False, statistics=False)
        )
        uses = OperatorHandlers(
            *(self._memory, tally, relevance), joint=self._joint, observe=self._observe, samples=self._samples
        )
        watch = CaptureMode(self._memory, tally, relevance, uses)
        loaded = "torch._dynamo" in sys.modules
        if relevance is not None:
            relevance.begin((*self._memory.parameters.values(), *self._memory.untrained.values()))
        with _environment(gradients=self._gradients), watch, BypassMode(watch):
            outputs = run()
        if not loaded and "torch._dynamo" in sys.modules:
            raise _CompilerLoaded
        self._note_returned(outputs)
        with torch.inference_mode(False), torch.no_grad():
            uses.settle(None if relevance is None else relevance.trace(outputs, uses.held()))
            tally.flush()
        return detach(outputs)

    def _note_returned(self, outputs: Any) -> None:
        """A parameter that is itself an output (a logit bias) has been used, although no operator read it."""
        for tensor in tensors_in(outputs):
            if self._memory.knows(tensor):
                self._tally.refuse(self._memory.origin(tensor).names, "returned by the model")

    def refuse(self, name: str, reason: str) -> None:
        """Note why the parameter `name` cannot be protected."""
        self._tally.refuse([self._names[name]], reason)


class _CompilerLoaded(Exception):  # noqa: N818
    """`torch.compile` was imported in the middle of a forward pass, which was not run eagerly from there on."""


def _unique(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Map every name to the first name of the same tensor (tied weights)."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault(tensor_key(held) if (held := local_tensor(tensor)).numel() else name, name)
        for name, tensor in parameters.items()
    }


@contextmanager
def _environment(*, gradients: bool) -> Iterator[None]:
    """Run eagerly, without fast paths that hide weights and without cached casts; restore everything at the end."""
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield
