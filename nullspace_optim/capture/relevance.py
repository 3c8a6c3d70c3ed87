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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ..model.batches import tensors_in
from .dependencies import RULES, Call, Pullback, Reach, anything
from .operators import WITHOUT_READING, Operator, tensors_among

_DROPOUTS = frozenset(("bernoulli", "bernoulli_", "native_dropout", "_fused_dropout"))
_SHAPES = frozenset((*WITHOUT_READING, "_fused_sdp_choice", "is_pinned", "_assert_tensor_metadata", "resize_output"))
_EMPTY = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"))
_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
_OVERWRITES = frozenset(("copy_", "fill_", "zero_"))
# Methods by which the bytes of a tensor leave the sight of PyTorch.
_EXITS = frozenset(
    "numpy __array__ tolist data_ptr __dlpack__ untyped_storage storage _typed_storage __deepcopy__ apply_ map_ map2_ "
    "__cuda_array_interface__".split()
)


class Region(NamedTuple):
    """The elements of a strided tensor in its storage of `elements` numbers."""

    key: int
    elements: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    device: torch.device
    whole: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        """Return the region that `tensor` reads."""
        storage = tensor.untyped_storage()
        elements, offset = storage.nbytes() // tensor.element_size(), int(tensor.storage_offset())
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        whole = tensor.numel() == elements and not offset and _is_dense(size, stride)
        return cls(storage._cdata, elements, size, stride, offset, tensor.device, whole)


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether no two elements share a place and none is left out."""
    step = 1
    for length, stepped in sorted(zip(size, stride, strict=True), key=lambda axis: axis[1]):
        if length != 1 and stepped != step:
            return False
        step *= length
    return True


class ReachedStorages:
    """Which elements of each storage the output depends on, at one moment of the forward pass."""

    def __init__(self) -> None:
        self._masks: dict[int, Reach] = {}

    def mark(self, region: Region, reach: Reach) -> None:
        """Add elements of `region`; `reach` has its shape."""
        held = self._masks.get(region.key, False)
        if held is True or reach is False:
            return
        if reach is True and region.whole:
            self._masks[region.key] = True
            return
        mask = self._flat(region, held)
        if mask is None:
            self._masks[region.key] = True
            return
        doubled = [d for d, (n, s) in enumerate(zip(region.size, region.stride, strict=True)) if n > 1 and not s]
        size = tuple(1 if d in doubled else n for d, n in enumerate(region.size))
        if isinstance(reach, Tensor):
            reach = reach.to(region.device)
            reach = reach.any(doubled, keepdim=True) if doubled else reach
        if _overlaps(size, region.stride):
            if anything(reach):
                self._masks[region.key] = True
            return
        target = mask.as_strided(size, region.stride, region.offset)
        target |= reach
        self._masks[region.key] = True if bool(mask.all()) else mask

    def keep(self, key: int) -> None:
        """Add all elements of a storage."""
        self._masks[key] = True

    def take(self, region: Region) -> Reach:
        """Return the elements of `region`."""
        held = self._masks.get(region.key, False)
        if isinstance(held, bool):
            return held
        mask = self._flat(region, held)
        if mask is None:
            return True
        view = mask.as_strided(region.size, region.stride, region.offset)
        if not bool(view.any()):
            return False
        return True if bool(view.all()) else view.clone()

    def clear(self, region: Region) -> None:
        """Forget the elements of `region`: what they held before was overwritten."""
        held = self._masks.get(region.key, False)
        if held is False or _overlaps(region.size, region.stride):
            return
        mask = None if region.whole else self._flat(region, held)
        if region.whole:
            del self._masks[region.key]
        elif mask is not None:
            mask.as_strided(region.size, region.stride, region.offset).fill_(False)
            self._masks[region.key] = mask

    def _flat(self, region: Region, held: Reach) -> Tensor | None:
        """Return the mask of a storage `[elements]`; `None` where it was written in numbers of another width."""
        if isinstance(held, bool):
            return torch.full((region.elements,), held, dtype=torch.bool, device=region.device)
        return held if held.numel() == region.elements else None


def _overlaps(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether two elements may share a place."""
    reached = 0
    for length, step in sorted(zip(size, stride, strict=True), key=lambda axis: axis[1]):
        if length > 1:
            if step <= reached:
                return True
            reached += step * (length - 1)
    return False


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

    def leave(self, tensor: Tensor, name: str) -> None:
        """Note that the bytes of `tensor` are read where operators cannot be seen."""
        if _key(tensor) in self._activations and not self.refused:
            region = Region.of(tensor)
            self._steps.append(_Step([region._replace(size=(region.elements,), stride=(1,), offset=0, whole=True)]))
            self._say(f"Tensor.{name}", "it reads activations outside PyTorch")

    def follow(
        self, operator: Operator, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Write one operator of the forward pass down."""
        starts, self._starts = self._starts, False
        operands = tensors_among([*args, *kwargs.values()])
        results = tensors_among([output])
        if operator.name in _DROPOUTS:
            self.refuse(f"{operator.label} drops activations at random; call eval() first")
        if self.refused:
            return
        bound = operator.bind(args, kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(operator, bound)
        if operator.name in _SHAPES and operator.native:
            self._create(operator, results, random)
            return
        keys = [_key(tensor) for tensor in operands]
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
        return bool(results) and not operator.writes and all((key := _key(t)) and key in keys for t in results)

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
            if _key(tensor) in self._activations and not self._only_written(operator, position)
        ]
        pullback = self._pullback(operator, func, bound, reads, results, written)
        distinct = list({id(t): t for t in results if _key(t)}.values())
        regions = [Region.of(tensor) for _, tensor in reads]
        self._steps.append(_Step(regions, [Region.of(t) for t in distinct], pullback, starts))
        changed = [*distinct, *(operands if not operator.native else ())]
        for tensor in changed:
            if _key(tensor) not in self._unknown:
                self._remember(self._activations, tensor)

    @staticmethod
    def _only_written(operator: Operator, position: int) -> bool:
        return any(position == i and (i in operator.outs or operator.name in _OVERWRITES) for i, _ in operator.writes)

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
            self._say(operator.label, "relevance does not know what it reads")
        elif any(_key(tensor) is None for tensor in results):
            self._say(operator.label, "its result cannot be followed")
        elif not _is_number(results[0]) and any(_is_number(tensor) for _, tensor in reads):
            self._say(operator.label, "it chooses by the values of activations")
        else:

            def known(argument: Any) -> bool:
                key = _key(argument)
                parameter = isinstance(argument, torch.nn.Parameter) or key is None
                touched = key in self._activations or key in self._unknown or any(argument is t for t in written)
                return not (parameter or touched)

            call = Call(operator, func, bound, reads, results[0], known)
            return RULES["dot"](call) if operator.outs else rule(call)
        return None

    def _say(self, label: str, why: str) -> None:
        self.note = self.note or f"all rows count before {label}: {why}"

    def _create(self, operator: Operator, results: Sequence[Tensor], random: bool) -> None:
        """Note new tensors of random numbers, and those that some operator has yet to fill."""
        if operator.name in _EMPTY or operator.name in _ZEROS:
            for tensor in results:
                if tensor.numel() and (key := _key(tensor)):
                    self._unwritten[key] = StorageWeakRef(tensor.untyped_storage()), operator.name in _ZEROS
        for tensor in results if random else ():
            self._remember(self._unknown, tensor)

    def _check_filled(
        self, operator: Operator, operands: Sequence[Tensor], keys: Sequence[int | None], written: Sequence[Tensor]
    ) -> None:
        """Notice memory that was filled by no operator: a kernel took its address, and may have read any activation."""
        if not self._unwritten or (operator.is_view and not operator.writes):
            return
        for tensor in operands if not operator.native else written:
            self._unwritten.pop(_key(tensor) or 0, None)
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
        key = _key(tensor)
        if key is not None and key not in storages:
            storages[key] = StorageWeakRef(tensor.untyped_storage())

    def trace(self, outputs: Any, held: Sequence[Tensor]) -> Callable[[int], Reach] | None:
        """Follow the dependencies of `outputs` back; return the elements of each step's result that they reach.

        `held` are the tensors that the capture itself keeps alive. `None`: all rows count.
        """
        returned = [tensor for tensor in tensors_in(outputs) if _key(tensor) in self._activations]
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
            key = _key(tensor) or 0
            ours.setdefault(key, set()).add(id(tensor))
            if tensor._base is not None and _base_references(tensor) == self._idle_references:
                ours[key].add(id(tensor._base))
        alive = [key for key, reference in self._activations.items() if not reference.expired()]
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


class ExitWatch(TorchFunctionMode):
    """Sees the methods by which bytes leave the sight of the dispatcher."""

    def __init__(self, relevance: Relevance) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._relevance = relevance

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note an exit, then run the function."""
        if getattr(func, "__name__", "") in _EXITS and args and isinstance(args[0], Tensor):
            with torch._C.DisableTorchFunction():
                self._relevance.leave(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


def _key(tensor: Any) -> int | None:
    """Return the identity of a tensor's storage; `None` for what has none (sparse and nested tensors)."""
    try:
        return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
    except (NotImplementedError, RuntimeError):
        return None


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
