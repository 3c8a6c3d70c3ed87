"""Keys of tensors: the device, storage and bytes that they read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Key = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype]


def storage_pointer(tensor: Tensor) -> int:
    """Return the address of the storage of `tensor`; 0 if it has none (sparse, fake or empty tensors).

    Storages on the meta device have no bytes; there the address of the storage object itself tells them apart.
    """
    try:
        storage = tensor.untyped_storage()
        return int(storage._cdata) if tensor.is_meta else storage.data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def tensor_key(tensor: Tensor) -> Key:
    """Return what two tensors share exactly if they hold the same elements in the same order."""
    if not is_plain(tensor):
        return 0, id(tensor), tensor.shape if not tensor.is_nested else torch.Size(), (), tensor.dtype
    return storage_pointer(tensor), int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype


def element_range(tensor: Tensor) -> tuple[int, int]:
    """Return the bytes `[start, end)` of its storage between the first and the last element of `tensor`."""
    extent = 0
    if tensor.numel():
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + extent * tensor.element_size()


def overlapping_groups(tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Return the names of tensors whose bytes overlap, group by group, each in the order of `tensors`."""
    places: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        pointer = storage_pointer(tensor)
        if pointer and is_plain(tensor) and tensor.numel():
            places.setdefault(pointer, []).append((*element_range(tensor), name))
    groups: list[list[str]] = []
    for found in places.values():
        reached = -1
        for start, end, name in sorted(found):
            if start >= reached:
                groups.append([])
            groups[-1].append(name)
            reached = max(reached, end)
    order = {name: number for number, name in enumerate(tensors)}
    return [tuple(sorted(group, key=order.__getitem__)) for group in groups if len(group) > 1]


def with_shared_memory(chosen: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `chosen` and those of `tensors` whose bytes overlap one of them, in the order of `tensors`."""
    names = set(chosen)
    for group in overlapping_groups(tensors):
        if names & set(group):
            names.update(group)
    return {name: tensor for name, tensor in tensors.items() if name in names}


def is_plain(tensor: Tensor) -> bool:
    """Return whether `tensor` is dense memory with strides: not sparse, nested, quantized or of another library."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def as_plain(tensor: Tensor) -> Tensor:
    """Return the values of `tensor` as dense memory: zeros filled in, nested rows one after the other `[n, d]`."""
    if is_plain(tensor):
        return tensor
    if tensor.is_nested:
        parts = [part.reshape(-1, part.shape[-1]) if part.ndim else part.reshape(1, 1) for part in tensor.unbind()]
        return torch.cat(parts) if parts else torch.zeros(0)
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return dense tensors that hold what `tensor` holds, without filling in the zeros of a sparse one."""
    if is_plain(tensor):
        return [tensor]
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.int_repr() if tensor.is_quantized else tensor.to_dense()]
