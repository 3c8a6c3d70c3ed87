"""Collectives of the default process group; no-ops in one process.

The ranks are replicas (DDP) or shards (FSDP2) of one training run. Three rules prevent deadlocks. A failing rank
announces it before the next collective (`failures.raise_on_all_ranks`). Facts that ranks must share are compared before
they are used (`check_equal_on_all_ranks`). Sums are exchanged once a consolidation, in buckets (`all_reduce_sum_`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ConsolidationError
from .group import is_dtensor, rank, to_backend_device, world_size

BUCKET = 64 * 2**20  # bytes that travel together
SAME_WEIGHTS = 1e-3  # relative difference of norms that ranks with equal weights may show

T = TypeVar("T")
Facts = Iterable[tuple[str, str]]


def all_gather_object(value: T) -> list[T]:
    """Return the `value` of every rank, in order (plain objects, pickled between the processes of one run)."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_object(source: int, value: T) -> T:
    """Return the `value` of rank `source` on every rank; tensors in it arrive on the same kind of device."""
    if world_size() == 1:
        return value
    packed = pytree.tree_map_only(Tensor, lambda tensor: _Sent(tensor.detach().cpu(), tensor.device.type), value)
    box: list[Any] = [packed if rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    if rank() == source:
        return value
    arrived: T = pytree.tree_map_only(_Sent, lambda sent: sent.tensor.to(sent.device), box[0])
    return arrived


@dataclass
class _Sent:
    """A tensor on its way to another rank and the kind of device it belongs on."""

    tensor: Tensor
    device: str


@torch.no_grad()
def all_reduce_sum_(tensors: Sequence[Tensor], owner: int | None = None, group: Any = None) -> None:
    """Replace every tensor by its sum over the ranks, in place and a bucket at a time.

    With `owner` only that rank receives the sums; the others' tensors are undefined afterwards.
    """
    if world_size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = to_backend_device(_flat(bucket))
        if owner is None:
            dist.all_reduce(flat, group=group)
        else:
            dist.reduce(flat, dst=owner, group=group)
        if owner is None or owner == rank():
            _unflatten(flat, bucket)


@torch.no_grad()
def sum_over_ranks(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the sum of each of `values`, shaped `like` these tensors, over the ranks, in place where there is one.

    A value that is missing on some ranks counts as zero there; one that is missing on all stays missing.
    """
    if world_size() == 1 or not values:
        return list(values)
    whole = [torch.zeros_like(one) if value is None else value for value, one in zip(values, like, strict=True)]
    present = torch.tensor([float(value is not None) for value in values], device=whole[0].device)
    all_reduce_sum_([present, *whole])
    if all(value is not None for value in values):
        return list(whole)
    return [value if here else None for value, here in zip(whole, present.tolist(), strict=True)]


@torch.no_grad()
def gather(tensor: Tensor, owner: int) -> list[Tensor]:
    """Return the `tensor` of every rank, all of one shape, on rank `owner`; an empty list elsewhere."""
    sent = to_backend_device(tensor.contiguous())
    found = [torch.empty_like(sent) for _ in range(world_size())] if rank() == owner else None
    dist.gather(sent, found, dst=owner)
    return found or []


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype and device, in order, about `BUCKET` bytes at a time."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size + tensor.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _flat(bucket: Sequence[Tensor]) -> Tensor:
    real = [torch.view_as_real(t) if t.is_complex() else t for t in bucket]
    return torch.cat([t.reshape(-1) for t in real])


def _unflatten(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    start = 0
    for tensor in bucket:
        target = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        target.copy_(flat[start : start + target.numel()].view(target.shape))
        start += target.numel()


def broadcast_from_owners(values: Sequence[T | None], owners: Sequence[int], device: torch.device) -> list[T]:
    """Return the flat dataclasses `values` on every rank; the i-th is known to rank `owners[i]` only.

    Their tensors travel in buckets and arrive on `device`.
    """
    found: list[Any] = list(values)
    for source in sorted(set(owners)) if world_size() > 1 else []:
        mine = [index for index, owner in enumerate(owners) if owner == source]
        bodies = [_body(found[index]) for index in mine] if rank() == source else None
        outlines = broadcast_object(source, bodies)
        tensors = [t for index in mine for t in _tensors(found[index])] if rank() == source else []
        if rank() != source:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for _, s in outlines or [] for shape, dtype in s]
        for bucket in _buckets(tensors):
            flat = to_backend_device(_flat(bucket))
            dist.broadcast(flat, src=source)
            if rank() != source:
                _unflatten(flat, bucket)
        rest = iter(tensors)
        for index, (record, _) in zip(mine, outlines or [], strict=True):
            if rank() != source:
                found[index] = _filled(record, rest)
    return found


def _tensor_fields(record: Any) -> list[str]:
    assert is_dataclass(record)
    return [field.name for field in fields(record) if isinstance(getattr(record, field.name), (Tensor, _Hole))]


class _Hole:
    """Stands for a tensor of a record while the record travels."""


def _tensors(record: Any) -> list[Tensor]:
    return [getattr(record, name).contiguous() for name in _tensor_fields(record)]


def _body(record: Any) -> tuple[Any, list[tuple[torch.Size, torch.dtype]]]:
    names = _tensor_fields(record)
    outline = [(getattr(record, name).shape, getattr(record, name).dtype) for name in names]
    return replace(record, **{name: _Hole() for name in names}), outline


def _filled(record: Any, tensors: Iterator[Tensor]) -> Any:
    return replace(record, **{name: next(tensors) for name in _tensor_fields(record)})


def check_equal_on_all_ranks(facts: Facts, weights: Mapping[str, Tensor]) -> None:
    """Refuse ranks that differ.

    `facts` are pairs (what, value) in an order that all ranks share; `weights` are the parameters by name, of which
    whole ones (not sharded) must be equal.

    Raises:
        ConsolidationError: names the first difference, on every rank.
    """
    if world_size() == 1:
        return
    mine = [(label, re.sub(r" at 0x[0-9a-f]+", "", value)) for label, value in facts]
    told = all_gather_object(mine)
    for number, other in enumerate(told):
        for here, there in zip_longest(told[0], other):
            if here != there:
                raise ConsolidationError(_difference(number, here, there))
    _agree_weights({name: p for name, p in weights.items() if not is_dtensor(p)})


def _difference(number: int, here: tuple[str, str] | None, there: tuple[str, str] | None) -> str:
    advice = "give every rank the same model, options, tasks and basis file; nothing was changed"
    if here is None or there is None or here[0] != there[0]:
        names = [pair[0] if pair else "nothing more" for pair in (here, there)]
        return f"rank {number} differs from rank 0: rank 0 has {names[0]}, rank {number} has {names[1]}; {advice}"
    return (
        f"rank {number} differs from rank 0 in {here[0]}: rank 0 has {here[1]}, rank {number} has {there[1]}; {advice}"
    )


@torch.no_grad()
def _agree_weights(weights: Mapping[str, Tensor]) -> None:
    if not weights:
        return
    marks = [torch.stack([p.detach().double().abs().norm(), p.detach().double().abs().sum()]) for p in weights.values()]
    told = all_gather_object(torch.stack([mark.cpu() for mark in marks]))
    for number, other in enumerate(told):
        apart = (other - told[0]).abs() > SAME_WEIGHTS * told[0].abs()
        if bool(apart.any()):
            index = int(apart.any(dim=1).nonzero()[0])
            raise ConsolidationError(
                f"rank {number} differs from rank 0 in the weights of '{list(weights)[index]}' (norm "
                f"{float(other[index, 0]):.6g} instead of {float(told[0][index, 0]):.6g}): the ranks are not replicas "
                "of one model. Train it with DistributedDataParallel or fully_shard, or run independent models in "
                "process groups of their own"
            )
