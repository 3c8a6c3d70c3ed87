"""A parameter as a stack of matrices `[g, m, d]`, read and written back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..distributed.fsdp import shard_of
from ..distributed.group import local_tensor
from .layout import Layout
from .shards import padded, shard_view


@contextmanager
def matrix_of(parameter: Tensor, layout: Layout, bias: Tensor | None = None, *, write: bool = True) -> Iterator[Tensor]:
    """Give `parameter` as a stack `[g, m, d]` in at least float32; with `write`, changes are written back on exit.

    With `bias` the matrix is `[W b]`, `[g, m, d + 1]`. Pass ``write=False`` for read-only access: any in-place write
    invalidates autograd graphs still waiting for backward. Of a sharded parameter it is this rank's block of the stack
    (see `shards`).
    """
    fill = hasattr(parameter, "to_local") and shard_view(parameter, layout, joint=bias is not None).padded
    weight = _block(parameter, fill=fill)
    added = None if bias is None else _block(bias, fill=fill)
    matrix = layout.to_matrix(weight)
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    if added is not None:
        matrix = torch.cat([matrix, added.to(matrix.dtype).reshape(*matrix.shape[:2], 1)], dim=2)
    yield matrix
    if not write:
        return
    if bias is not None and added is not None:
        added.copy_(matrix[:, :, -1].reshape(-1))
        matrix = matrix[:, :, :-1]
    if matrix.data_ptr() != weight.data_ptr() or matrix.dtype != weight.dtype:
        weight.copy_(layout.from_matrix(matrix, weight.shape))
    if fill:
        _write_block(parameter, weight)
        if bias is not None and added is not None:
            _write_block(bias, added)


def _block(parameter: Tensor, *, fill: bool) -> Tensor:
    """Return this rank's block of `parameter`, in its own memory unless it is to be filled up with zeros."""
    if not hasattr(parameter, "to_local"):
        return parameter.detach()
    shard = shard_of(parameter) if fill else None
    return local_tensor(parameter) if shard is None else padded(parameter, shard)


def _write_block(parameter: Tensor, block: Tensor) -> None:
    """Write a block that was filled up with zeros back into its parameter."""
    held = local_tensor(parameter)
    if block.data_ptr() != held.data_ptr():
        shard = shard_of(parameter)
        assert shard is not None
        held.copy_(block.narrow(shard.dim, shard.start, shard.stop - shard.start))


def relative(now: Tensor, then: Tensor) -> float:
    """Return `||now - then|| / ||then||` (absolute if `then` is zero)."""
    then = then.to(device=now.device)
    now, then = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (now, then))
    norm = float(then.norm())
    return float((now - then).norm()) / (norm or 1.0)
