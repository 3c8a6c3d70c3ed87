"""The process group: its size, this rank, and the local part of a DTensor."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def in_group() -> bool:
    """Return whether a process group is initialised, be it of one process."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return how many processes take part: 1 unless a process group of several is initialised."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """Return the number of this process, 0 if it is alone."""
    return dist.get_rank() if world_size() > 1 else 0


def to_backend_device(tensor: Tensor) -> Tensor:
    """Return `tensor` where the process group can send it: NCCL sends from the GPU only."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        return tensor.cuda()
    return tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor (never before that class is imported)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Any) -> Tensor:
    """Return what this rank holds of a DTensor, detached and in the same memory; any other tensor detached."""
    if not hasattr(tensor, "to_local"):
        plain: Tensor = tensor.detach()
        return plain
    with torch.no_grad():
        block: Tensor = tensor.to_local()
        return block.detach()
