"""Which rows can reach the model's output: told by the structure of the forward pass, never by values.

`Relevance` writes down every operator that reads an *activation* (a tensor that depends on rows that met a trained
weight), with the bytes it read and wrote. From the outputs back it then follows which elements of each activation the
output depends on: `dependencies` gives the rule of each operator. A row counts unless it was cut off by position
(indexing, slicing, a mask). Zeros cut nothing off: weights, gates and units that are switched off today may be switched
on by a later task.

Bytes are followed, not tensors: views, writes in place and `detach` need no rule. An operator without a rule, or one
whose result is no floating-point number, reads all that its operands depend on; `note` names the first one. The same
holds for what leaves the sight of PyTorch (NumPy, kernels that take addresses), and for activations that are still
alive after the forward pass although the model did not return them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...model.batches import tensors_in
from ..operators import WITHOUT_READING, Operator, tensors_among
from .dependencies import RULES, Call, Pullback
from .reach import Reach, ReachedStorages, Region, storage_identity, storage_reference

_DROPOUTS = frozenset(("bernoulli", "bernoulli_", "native_dropout", "_fused_dropout"))
_SHAPES = frozenset((*WITHOUT_READING, "_fused_sdp_choice", "is_pinned", "_assert_tensor_metadata", "resize_output"))
_EMPTY = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"))
_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))


@dataclass(eq=False)
class _Step:
    """One operator that read activations; without a pullback it depends on all of them, whatever is reached."""

    reads: list[Region]
    results: list[Region] = field(default_factory=list)
    pullback: Pullback | None = None
    starts: bool = False


class Relevance:
    """Writes a forward pass down, then says which rows of each use reach the output."""

    def __init__(self) -> None:
        self.note: str | None = None
        self.refused = False
        self._tried_collecting = False
        self._idle_count = _use_count(torch.empty(1)) - 1
        self._idle_references = _base_references(torch.empty(1)[:])
        self.forget()

    def forget(self) -> None:
        """End the batch."""
        self._steps: list[_Step] = []
        self._activations: dict[int, StorageWeakRef] = {}
        self._unknown: dict[int, StorageWeakRef] = {}
        self._unwritten: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._all_before = 0
        self._starts = False

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """Start a batch; what depends on `parameters` is no mask."""
        self.forget()
        for parameter in parameters:
            self._remember(self._unknown, parameter)

    def refuse(self, reason: str) -> None:
        """Give up on relevance for the rest of the capture."""
        self.note = self.note or f"all rows count: {reason}"
        self.refused = True

    def start(self) -> int:
        """Let the result of the present operator be activations; return the number of its step."""
        self._starts = True
        return len(self._steps)

    def receive_shards(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that a framework fills with parameters."""
        for tensor in tensors:
            self._unwritten.pop(storage_identity(tensor) or 0, None)
            self._remember(self._unknown, tensor)

    def leave(self, tensor: Tensor, name: str) -> None:
        """Note that the bytes of `tensor` are read where operators cannot be seen."""
        if storage_identity(tensor) in self._activations and not self.refused:
            region = Region.of(tensor)
            self._steps.append(_Step([region._replace(size=(region.elements,), stride=(1,), offset=0, whole=True)]))
            self._say(f"Tensor.{name}", "the bytes of an activation are read outside PyTorch")

    def follow(
        self, operator: Operator, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Write one operator of the forward pass down."""
        starts, self._starts = self._starts, False
        operands = tensors_among([*args, *kwargs.values()])
        results = tensors_among([output])
        if operator.name in _DROPOUTS:
            self.refuse(f"{operator.label} drops activations at random; call eval() first")
        if any(tensor.is_nested and tensor.layout == torch.strided for tensor in (*operands, *results)):
            self.refuse(f"{operator.label} works on nested tensors, whose rows have no place of their own")
        if self.refused:
            return
        bound = operator.bind(args, kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(operator, bound)
        if operator.name in _SHAPES and operator.native:
            self._create(operator, results, random)
            return
        keys = [storage_identity(tensor) for tensor in operands]
        written = [bound[i] for i, _ in operator.writes if isinstance(bound[i], Tensor)]
        self._check_filled(operator, operands, keys, written)
        if starts or any(key in self._activations for key in keys):
            if random:
                self.refuse(f"{operator.label} draws at random; call eval() first")
            elif not (operator.native and self._is_view(operator, keys, results)):
                self._record(operator, func, bound, operands, [*results, *written], written, starts)
            return
        self._create(operator, results, False)
        if random or any(key in self._unknown or isinstance(t, torch.nn.Parameter) for key, t in zip(keys, operands)):
            for tensor in (*results, *written):
                self._remember(self._unknown, tensor)

    @staticmethod
    def _is_view(operator: Operator, keys: Sequence[int | None], results: Sequence[Tensor]) -> bool:
        """Return whether an operator moved no numbers; the numbers of a storage are followed whatever views it has."""
        return (
            bool(results) and not operator.writes and all((key := storage_identity(t)) and key in keys for t in results)
        )

    def _record(
        self,
        operator: Operator,
        func: Any,
        bound: Sequence[Any],
        operands: Sequence[Tensor],
        results: Sequence[Tensor],
        written: Sequence[Tensor],
        starts: bool,
    ) -> None:
        """Add a step for an operator that reads activations, or makes the first ones."""
        reads = [
            (position, tensor)
            for position, argument in enumerate(bound)
            for tensor in tensors_among([argument])
            if storage_identity(tensor) in self._activations and position not in operator.overwrites
        ]
        pullback = self._pullback(operator, func, bound, reads, results, written)
        distinct = list({id(t): t for t in results if storage_identity(t)}.values())
        regions = [Region.of(tensor) for _, tensor in reads]
        self._steps.append(_Step(regions, [Region.of(t) for t in distinct], pullback, starts))
        changed = [*distinct, *(operands if not operator.native else ())]
        for tensor in changed:
            if storage_identity(tensor) not in self._unknown:
                self._remember(self._activations, tensor)

    def _pullback(
        self,
        operator: Operator,
        func: Any,
        bound: Sequence[Any],
        reads: Sequence[tuple[int, Tensor]],
        results: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> Pullback | None:
        """Return the rule's pullback, or say why there is none."""
        if not reads:
            return lambda reach: []
        rule = RULES.get(operator.name.rstrip("_")) if operator.native else None
        if rule is None or not results:
            self._say(operator.label, "it is not among the operators whose structure is known")
        elif any(storage_identity(tensor) is None for tensor in results):
            self._say(operator.label, "its result has no strided memory")
        elif not _is_number(results[0]) and any(_is_number(tensor) for _, tensor in reads):
            self._say(operator.label, "its result is no floating-point number")
        else:

            def known(argument: Any) -> bool:
                key = storage_identity(argument)
                parameter = isinstance(argument, torch.nn.Parameter) or key is None
                touched = key in self._activations or key in self._unknown or any(argument is t for t in written)
                return not (parameter or touched)

            call = Call(operator, func, bound, reads, results[0], known)
            into = operator.overwrites and not operator.name.endswith("_")
            return RULES["dot"](call) if into else rule(call)
        return None

    def _say(self, label: str, why: str) -> None:
        self.note = self.note or f"all rows count before {label}: {why}"

    def _create(self, operator: Operator, results: Sequence[Tensor], random: bool) -> None:
        """Note new tensors of random numbers, and those that some operator has yet to fill."""
        if operator.name in _EMPTY or operator.name in _ZEROS:
            for tensor in results:
                if tensor.numel() and (key := storage_identity(tensor)):
                    self._unwritten[key] = storage_reference(tensor), operator.name in _ZEROS
        for tensor in results if random else ():
            self._remember(self._unknown, tensor)

    def _check_filled(
        self, operator: Operator, operands: Sequence[Tensor], keys: Sequence[int | None], written: Sequence[Tensor]
    ) -> None:
        """Notice memory that was filled by no operator: a kernel took its address, and may have read any activation."""
        if not self._unwritten or (operator.is_view and not operator.writes):
            return
        for tensor in operands if not operator.native else written:
            self._unwritten.pop(storage_identity(tensor) or 0, None)
        for tensor, key in zip(operands, keys, strict=True):
            if key not in self._unwritten or isinstance(tensor, torch.nn.Parameter):
                continue
            _, zeros = self._unwritten[key]
            if (not zeros or bool(tensor.any())) and self._activations:
                del self._unwritten[key]
                self._all_before = len(self._steps)
                self._say(operator.label, "it reads memory that was filled outside PyTorch")

    def _remember(self, storages: dict[int, StorageWeakRef], tensor: Tensor) -> None:
        """Keep the identity of the storage of `tensor`, not its bytes."""
        key = storage_identity(tensor)
        if key is not None and key not in storages:
            storages[key] = storage_reference(tensor)

    def trace(self, outputs: Any, held: Sequence[Tensor]) -> Callable[[int], Reach] | None:
        """Follow the dependencies of `outputs` back; return the elements of each step's result that they reach.

        `held` are the tensors that the capture itself keeps alive. `None`: all rows count.
        """
        returned = [tensor for tensor in tensors_in(outputs) if storage_identity(tensor) in self._activations]
        reached = self._alive(returned, held)
        if self.refused:
            return None
        for tensor in returned:
            reached.mark(Region.of(tensor), True)
        first = min((i for i, step in enumerate(self._steps) if step.starts), default=len(self._steps))
        found: dict[int, Reach] = {}
        for number in range(len(self._steps) - 1, first - 1, -1):
            step = self._steps[number]
            reaches = [reached.take(region) for region in step.results]
            for region in step.results:
                reached.clear(region)
            if step.starts:
                found[number] = True if number < self._all_before else reaches[0]
            for region, reach in zip(step.reads, _pulled(step, reaches), strict=True):
                reached.mark(region, reach)
        return found.__getitem__

    def _alive(self, returned: Sequence[Tensor], held: Sequence[Tensor]) -> ReachedStorages:
        """Mark the activations that somebody keeps although the model did not return them."""
        hidden = self._hidden(returned, held)
        if hidden and not self._tried_collecting:
            self._tried_collecting = True
            gc.collect()
            hidden = self._hidden(returned, held)
        reached = ReachedStorages()
        for key in hidden:
            reached.keep(key)
        if hidden:
            self._say("an activation that is kept after the forward pass", "a hook or a cache may read it later")
        return reached

    def _hidden(self, returned: Sequence[Tensor], held: Sequence[Tensor]) -> list[int]:
        """Return the storages of activations that more tensors hold than those returned, their bases and ours."""
        ours: dict[int, set[int]] = {}
        for tensor in (*returned, *held):
            key = storage_identity(tensor) or 0
            ours.setdefault(key, set()).add(id(tensor))
            if tensor._base is not None and _base_references(tensor) == self._idle_references:
                ours[key].add(id(tensor._base))
        alive = [key for key, reference in self._activations.items() if not reference.expired()]  # type: ignore[no-untyped-call]
        return [key for key in alive if _count(key) - self._idle_count > len(ours.get(key, ()))]


def _pulled(step: _Step, reaches: Sequence[Reach]) -> Sequence[Reach]:
    """Return what each operand of `step` is reached by."""
    if step.pullback is None:
        return [True] * len(step.reads)
    if not any(reach is not False for reach in reaches):
        return [False] * len(step.reads)
    first, *others = reaches
    for reach, region in zip(others, step.results[1:], strict=True):
        if reach is False or first is True:
            continue
        if region.size != step.results[0].size:
            return [True] * len(step.reads)
        first = reach if isinstance(first, bool) or reach is True else first | reach
    return step.pullback(first)


def _count(key: int) -> int:
    """Return how many tensors hold a living storage."""
    return int(torch._C._storage_Use_Count(key))


def _base_references(view: Tensor) -> int:
    """Return how many references Python holds to the tensor that `view` is a view of."""
    return sys.getrefcount(view._base)


def _use_count(tensor: Tensor) -> int:
    return _count(tensor.untyped_storage()._cdata)


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _without_dropout(operator: Operator, bound: Sequence[Any]) -> bool:
    """Return whether an operator that can drop at random was told not to."""
    return "dropout_p" in operator.arguments and bound[operator.arguments.index("dropout_p")] == 0
