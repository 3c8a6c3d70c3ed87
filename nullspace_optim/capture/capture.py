"""Which input rows met which weight, watched operator by operator, with the model left as found.

`Capture` runs forward passes under a `TorchDispatchMode` (`watching`). Whatever module, function or `@` led
there, a product with a parameter ends in one of few operators; the operand that is the parameter is recognised
by its bytes (`recognise`), the side of the weight follows from its strides (`operators`), and rows that no
output can depend on are left out (`relevance`). Rows stream into `SecondMoment`s `[g, s, s]`; weights that
always meet the same rows share one (`tally`). Every operator that reads a parameter in another way gives a
reason why it cannot be protected, so the fates of all parameters add up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from ..covariance.accumulator import ParameterStatistics, StatisticsAccumulator
from ..covariance.all_reduce import reduce_statistics, union_over_ranks
from ..covariance.sketch import SketchedCovariance
from ..distributed.collectives import all_gather_object
from ..distributed.group import local_tensor
from ..errors import OptionError
from ..model.batches import detach, tensors_in
from ..model.storage import tensor_key
from .aliases import AliasTracker
from .bypass import UNSEEN, BypassMode, graph_leaves
from .dispatch import CaptureMode
from .relevance import Relevance
from .shared import shared_statistics
from .uses import OperatorHandlers


class Capture:
    """Observes forward passes, one `batch` at a time, and sums up what the parameters met."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        untrained: Mapping[str, Tensor] | None = None,
        rows: Literal["relevant", "all"] = "relevant",
        bias: Literal["freeze", "joint"] = "freeze",
        dtype: torch.dtype = torch.float32,
        batch_frobenius: bool = False,
        statistics: bool = True,
        present: Callable[[], Mapping[str, Tensor]] | None = None,
        in_step: bool = False,
        sketch: SketchedCovariance | None = None,
    ) -> None:
        """Watch `parameters` and `buffers`, by name; note which of the `untrained` parameters are read.

        ``rows="relevant"`` leaves out rows that no output of the model depends on; ``bias="joint"`` extends the
        rows of a weight by a constant 1 for its bias; `dtype` is what second moments are summed in;
        `batch_frobenius` normalises each batch's Gram matrix (GNSP); without `statistics` no sums are kept,
        only reasons, order and `observe`. `present` gives the tensors that stand for the parameters at this moment
        where a framework swaps them (FSDP2); with `in_step`, all ranks run each batch at the same time.
        `sketch` says which second moments are sketched.

        Raises:
            OptionError: an unknown value of `rows` or `bias`.
        """
        if rows not in ("relevant", "all"):
            raise OptionError(f'rows is "relevant" or "all", not {rows!r}')
        if bias not in ("freeze", "joint"):
            raise OptionError(f'bias is "freeze" or "joint", not {bias!r}')
        self.observe: Callable[[str, Tensor], None] | None = None
        self._names = _unique(parameters)
        distinct = {name: parameters[name] for name in dict.fromkeys(self._names.values())}
        self._memory = AliasTracker(distinct, buffers or {}, untrained or {}, present)
        self._in_step = in_step
        self._empty_tally: Callable[[], StatisticsAccumulator] = partial(
            StatisticsAccumulator,
            dtype=dtype,
            batch_frobenius=batch_frobenius,
            statistics=statistics,
            sketch=sketch,
        )
        self._tally = self._empty_tally()
        self._relevance = Relevance() if rows == "relevant" else None
        self._joint = bias == "joint"
        self._batches = 0

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._memory.forget()
        self._tally.drop_queue()

    @property
    def captured(self) -> dict[str, ParameterStatistics]:
        """What is known of every parameter after the batches so far."""
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
        """Join what all ranks have captured (see `reduction`); nothing in one process."""
        reduce_statistics(self._tally, device)
        self._memory.buffers_read = union_over_ranks(self._memory.buffers_read)
        self._memory.untrained_read = union_over_ranks(self._memory.untrained_read)
        self._memory.promised = union_over_ranks(self._memory.promised)
        if self._relevance is not None:
            self._relevance.note = next(filter(None, all_gather_object(self._relevance.note)), None)

    @property
    def relevance_note(self) -> str | None:
        """Why all rows count although ``rows="relevant"`` was asked for, or `None`."""
        return None if self._relevance is None else self._relevance.note

    def batch(self, run: Callable[[], Any], *, counted: bool = True) -> Any:
        """Run one forward pass `run()`, take its rows (unless it is not `counted`), and return its outputs, detached.

        Raises:
            CaptureError: a row was not finite, or a weight was cast where it could not be followed.
        """
        active = self._relevance if self._relevance is not None and self._relevance.note is None else None
        try:
            outputs = self._forward(run, active, counted)
            with torch.inference_mode(False), torch.no_grad():
                self._tally.end_batch(self._batches)
        except _RunAgain:
            if not self._batches:  # what an unfinished first run has left
                self._tally = self._empty_tally()
            return self.batch(run, counted=counted)
        finally:
            self._tally.drop_queue()
            self._memory.forget()
            if active is not None:
                active.forget()
        self._batches += counted
        return outputs

    def _forward(self, run: Callable[[], Any], relevance: Relevance | None, counted: bool) -> Any:
        """Run the forward pass and, for relevance, the probe; hand the rows to the tally."""
        self._memory.refresh()
        tally = (
            self._tally
            if counted
            else StatisticsAccumulator(dtype=torch.float32, batch_frobenius=False, statistics=False)
        )
        uses = OperatorHandlers(self._memory, tally, relevance, joint=self._joint, observe=self.observe)
        watch = CaptureMode(self._memory, tally, relevance, uses)
        with _environment(gradients=relevance is not None), watch:
            outputs = self._run(run, watch)
            self._note_returned(outputs)
            reached = list(graph_leaves(outputs))
            probed = self._agree_on_probe(bool(uses.wanted()))
            gradients: list[Tensor | None] | None = None
            wanted = uses.wanted() if probed else []
            if relevance is not None and relevance.note is None and wanted:
                watch.probing = True
                gradients = relevance.probe(outputs, wanted)
        with torch.inference_mode(False), torch.no_grad():
            uses.settle(gradients)
            tally.flush()
        self._note_reached(reached, tally)
        return detach(outputs)

    def _run(self, run: Callable[[], Any], watch: CaptureMode) -> Any:
        """Run the forward pass, again without gradients where it does not run with them, or as `torch.compile` was
        loaded in the middle of it.
        """
        loaded, relevance = "torch._dynamo" in sys.modules, watch.relevance
        try:
            with BypassMode(watch):
                outputs = run()
        except Exception as error:
            if not loaded and "torch._dynamo" in sys.modules:
                raise _RunAgain from error
            if relevance is not None and isinstance(error, RuntimeError) and any(w in str(error) for w in _NO_GRADIENT):
                relevance.refuse(f"the model does not run with gradients ({str(error).splitlines()[0]})")
                raise _RunAgain from error
            raise
        if not loaded and "torch._dynamo" in sys.modules:
            raise _RunAgain
        return outputs

    def _agree_on_probe(self, wanted: bool) -> bool:
        """Where ranks run in step, all of them or none run the probe: its backward pass communicates."""
        if not self._in_step or self._relevance is None:
            return wanted
        told = all_gather_object((self._relevance.note, wanted))
        self._relevance.note = next((note for note, _ in told if note), None)
        return all(also for _, also in told)

    def _note_returned(self, outputs: Any) -> None:
        """A parameter that is itself an output (a logit bias) has been used, although no operator read it."""
        for tensor in tensors_in(outputs):
            if self._memory.knows(tensor):
                self._tally.refuse(self._memory.origin(tensor).names, "returned by the model")

    def _note_reached(self, leaves: Sequence[tuple[Tensor, str]], tally: StatisticsAccumulator) -> None:
        """A parameter in the graph of the outputs that no operator was seen to read was read by somebody else."""
        names = {id(self._memory.present(name)): name for name in self._memory.parameters}
        for variable, user in leaves:
            name = names.get(id(variable))
            if name is None or name in self._memory.promised:
                continue
            if not tally.order.keys() & {name, *self._memory.sharing(name)}:
                tally.refuse([name], f"{UNSEEN} ({user})")

    def refuse(self, name: str, reason: str) -> None:
        """Note why the parameter `name` cannot be protected."""
        self._tally.refuse([self._names[name]], reason)


class _RunAgain(Exception):  # noqa: N818
    """A batch has to be run again, without autograd or eagerly."""


_NO_GRADIENT = ("nference tensor", "grad", "backward", "derivative", "differentia")


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
