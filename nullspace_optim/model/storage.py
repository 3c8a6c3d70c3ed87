"""Keys of tensors: the device, storage and bytes that they read."""

from __future__ import annotations

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
    return storage_pointer(tensor), int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype
