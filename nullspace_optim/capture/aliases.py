"""Which tensor is which weight, told by the bytes it reads.

A parameter owns a range of bytes in one storage. Every tensor in that range is an *alias* of the parameter,
whatever views led to it, and its strides say which elements it holds. Copies (an autocast cast, `contiguous`)
live in storages of their own; for them the strides in the parameter's element space are carried along from
operator to operator. All recognised storages are held alive until the batch ends, so that a freed and reused
address is never mistaken for a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.group import local_tensor
from ..model.storage import Key, element_range, is_plain, overlapping_groups, storage_pointer, tensor_key


class Kind(Enum):
    """What a tensor depends on."""

    DATA = "data"
    CONSTANT = "constant"
    DERIVED = "derived from parameters"
    ALIAS = "alias of a parameter"


class Geometry(NamedTuple):
    """Where the elements of a strided tensor lie in its parameter, flattened in logical (row-major) order."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def as_meta(self) -> Tensor:
        """Return a tensor without data that has this geometry, to run view operators on."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True) if size)
        return torch.empty(self.offset + extent, device="meta").as_strided(self.size, self.stride, self.offset)

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        """Return the geometry of a tensor in its own storage."""
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


@dataclass(frozen=True)
class Origin:
    """What is known of a tensor: its kind, the parameters it is an alias of, and its geometry where it has one."""

    kind: Kind
    names: tuple[str, ...] = ()
    geometry: Geometry | None = None


DATA = Origin(Kind.DATA)
CONSTANT = Origin(Kind.CONSTANT)
DERIVED = Origin(Kind.DERIVED)


class _Owner(NamedTuple):
    """A parameter or buffer and its bytes `[start, end)` within a storage."""

    name: str
    start: int
    end: int
    tensor: Tensor
    is_parameter: bool


class AliasTracker:
    """The map from storages to parameters, buffers and what was computed from them during the current batch."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        untrained: Mapping[str, Tensor],
        present: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Watch `parameters` and `buffers`, both by name; of `untrained` parameters only note that they were read.

        `present` gives the tensors that stand for them now where a framework swaps them during a forward pass.
        """
        self._present = present
        self.parameters = dict(parameters)
        self.buffers = dict(buffers)
        self.untrained = dict(untrained)
        self.shared = overlapping_groups({name: local_tensor(tensor) for name, tensor in parameters.items()})
        self.buffers_read: set[str] = set()
        self.untrained_read: set[str] = set()
        self.promised: set[str] = set()
        self._untrained: dict[int, list[tuple[int, int, str]]] = {}
        self._owners: dict[int, list[_Owner]] = {}
        self._storages: dict[int, Kind] = {}
        self._holders: dict[int, Tensor] = {}
        self._aliases: dict[Key, Origin] = {}
        self._held: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the storage of every parameter and buffer anew (they move where a framework swaps parameters)."""
        for key in [key for key in self._aliases if key[0] in self._owners]:
            del self._aliases[key]  # the same address and shape may be another parameter now
        self._owners.clear()
        for is_parameter, tensors in ((True, self._now(self.parameters)), (False, self.buffers)):
            for name, tensor in tensors.items():
                pointer = storage_pointer(tensor)
                if pointer and is_plain(tensor):
                    owner = _Owner(name, *element_range(tensor), tensor, is_parameter)
                    self._owners.setdefault(pointer, []).append(owner)
        self._untrained.clear()
        for name, tensor in self._now(self.untrained).items():
            pointer = storage_pointer(tensor)
            if pointer and is_plain(tensor):
                self._untrained.setdefault(pointer, []).append((*element_range(tensor), name))

    def _now(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what stands for `tensors` at this moment; shards, which no forward pass reads, have no storage."""
        if self._present is None:
            return tensors
        there = self._present()
        return {name: there[name] for name in tensors if name in there}

    def promise(self, tensors: Sequence[Tensor]) -> None:
        """Note parameters that a stand-in is computed from: its maker promises that they may move (`declare`)."""
        for tensor in tensors:
            if self.knows(tensor):
                self.promised.update(self.origin(tensor).names)

    def sharing(self, name: str) -> tuple[str, ...]:
        """Return the names of all parameters whose memory overlaps that of `name`; none if it has its own."""
        return next((group for group in self.shared if name in group), ())

    def present(self, name: str) -> Tensor:
        """Return the tensor that stands for the parameter `name` at this moment."""
        return self._now({name: self.parameters[name]})[name]

    def forget(self) -> None:
        """End the batch: let go of everything that was held."""
        self._storages.clear()
        self._holders.clear()
        self._aliases.clear()
        self._held.clear()

    @property
    def held(self) -> list[Tensor]:
        """The tensors that are kept alive until the batch ends."""
        return self._held

    @property
    def owned(self) -> Mapping[int, object]:
        """The storages of parameters and buffers, by address."""
        return self._owners

    def knows(self, tensor: Tensor) -> bool:
        """Return whether the storage of `tensor` is one that is watched or was computed from such."""
        pointer = storage_pointer(tensor)
        if self._present is not None:
            self._look_again(pointer, tensor)
        if pointer in self._untrained:
            start, end = element_range(tensor)
            self.untrained_read.update(n for low, high, n in self._untrained[pointer] if low < end and start < high)
        return pointer in self._owners or pointer in self._storages

    def _look_again(self, pointer: int, tensor: Tensor) -> None:
        """Notice whole parameters that were put in place, or freed, since the storages were last read.

        FSDP2 gathers a parameter before the forward pass of its module and frees it, and its own buffers, afterwards,
        whatever called the module; the address may then serve an activation.
        """
        owners, holder = self._owners.get(pointer), self._holders.get(pointer)
        if holder is not None and storage_pointer(holder) != pointer:
            del self._holders[pointer], self._storages[pointer]
            for key in [key for key in self._aliases if key[0] == pointer]:
                del self._aliases[key]
        if owners is None:
            if isinstance(tensor, torch.nn.Parameter) and pointer not in self._untrained:
                self.refresh()
        elif any(storage_pointer(owner.tensor) != pointer for owner in owners):
            self.refresh()

    def origin(self, tensor: Tensor) -> Origin:
        """Say what `tensor` is. Unseen tensors are data, unless they are scalars."""
        pointer = storage_pointer(tensor)
        if pointer in self._owners:
            return self._owned(pointer, tensor)
        kind = self._storages.get(pointer)
        if kind is None:
            return DATA if tensor.ndim else CONSTANT
        if kind is Kind.ALIAS:
            return self._aliases.get(tensor_key(tensor), DERIVED)
        return DERIVED if kind is Kind.DERIVED else CONSTANT

    def learn(self, tensor: Tensor, origin: Origin) -> None:
        """Remember what `tensor`, the output of an operator, is."""
        pointer = storage_pointer(tensor)
        if self._present is not None:
            self._look_again(pointer, tensor)
        if not pointer or pointer in self._owners:
            return
        if origin.kind is Kind.DATA:
            self._storages.pop(pointer, None)
            self._holders.pop(pointer, None)
            return
        holder = tensor.detach()  # a tensor of our own: relevance tells it from those that the model keeps
        self._storages[pointer], self._holders[pointer] = origin.kind, holder
        self._held.append(holder)
        if origin.kind is Kind.ALIAS:
            self._aliases[tensor_key(tensor)] = origin

    def _owned(self, pointer: int, tensor: Tensor) -> Origin:
        """Return the origin of a tensor that lies in the storage of parameters or buffers."""
        key = tensor_key(tensor)
        known = self._aliases.get(key)
        if known is not None:
            return known
        start, end = element_range(tensor)
        touched = [owner for owner in self._owners[pointer] if owner.start < end and start < owner.end]
        names = tuple(dict.fromkeys(owner.name for owner in touched if owner.is_parameter))
        if not names:
            self.buffers_read.update(owner.name for owner in touched)
            return CONSTANT if touched else DATA
        owner = next(owner for owner in touched if owner.is_parameter)
        alone = len({(o.start, o.end) for o in touched}) == 1 and owner.start <= start and end <= owner.end
        geometry = _logical(tensor, owner.tensor) if alone and tensor.dtype == owner.tensor.dtype else None
        origin = Origin(Kind.ALIAS, names[:1] if alone else names, geometry)
        self._aliases[key] = origin
        self._held.append(tensor)
        return origin


def _logical(tensor: Tensor, parameter: Tensor) -> Geometry | None:
    """Return where the elements of `tensor` lie in the row-major order of `parameter`, or `None` if strides cannot say
    it.
    """
    offset = int(tensor.storage_offset()) - int(parameter.storage_offset())
    if parameter.is_contiguous():
        return Geometry(offset, tuple(tensor.shape), tuple(tensor.stride()))
    logical = _row_major(parameter.shape)
    axes = zip(parameter.stride(), logical, parameter.shape, strict=True)
    dims = [(stride, step) for stride, step, size in axes if size > 1 and stride > 0]
    strides = [_translate(stride, dims, exact=True) for stride in tensor.stride()]
    position = _translate(offset, dims, exact=False)
    dims_seen = dict(zip(parameter.stride(), parameter.shape, strict=True))
    for size, stride, translated in zip(tensor.shape, tensor.stride(), strides, strict=True):
        if size > 1 and (translated is None or size > dims_seen.get(stride, 0)):
            return None
    return Geometry(position or 0, tuple(tensor.shape), tuple(stride or 0 for stride in strides))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _translate(distance: int, dims: Sequence[tuple[int, int]], *, exact: bool) -> int | None:
    """Turn a distance in memory into one in row-major order; `dims` are pairs (stride in memory, row-major stride)."""
    total = 0
    for stride, logical in sorted(dims, reverse=True):
        steps, distance = divmod(distance, stride)
        if exact and steps:
            return logical * steps if distance == 0 else None
        total += steps * logical
    return total
