"""Elements of storages that the model's output depends on, at one moment of the forward pass.

Storages are told apart by identity, not by address: a weak reference keeps the identity from being used again and lets
the bytes go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# All elements of a tensor, none of them, or those of a mask of its shape.
Reach = bool | Tensor


def storage_identity(tensor: Any) -> int | None:
    """Return the identity of a tensor's storage; `None` for what has none (sparse and nested tensors)."""
    try:
        plain = tensor.layout == torch.strided and not tensor.is_nested
        return int(tensor.untyped_storage()._cdata) if plain else None
    except (NotImplementedError, RuntimeError):
        return None


def storage_reference(tensor: Tensor) -> StorageWeakRef:
    """Return a weak reference to the storage of `tensor`; its `cdata` is the identity."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def anything(reach: Reach) -> bool:
    """Return whether `reach` holds any element."""
    return reach if isinstance(reach, bool) else bool(reach.any())


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
