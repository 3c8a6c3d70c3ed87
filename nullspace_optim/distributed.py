"""Several processes: the only file that talks to torch.distributed. Everything is a no-op in one process.

The ranks of the default process group are replicas (DDP) or shards (FSDP2) of one training run. Three rules keep them
from waiting for each other for ever: a rank that fails says so before anybody communicates again (`together`), what the
ranks must have in common is compared before it is used (`agree`), and sums are exchanged once a consolidation, in
buckets (`add_up`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import errors
from .errors import ConsolidationError, NullSpaceError, OptionError

BUCKET = 64 * 2**20  # bytes that travel together
SAME_WEIGHTS = 1e-3  # relative difference of norms that ranks with equal weights may show

T = TypeVar("T")
Facts = Iterable[tuple[str, str]]


def ranks() -> int:
    """Return how many processes take part: 1 unless a process group of several is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 if it is alone."""
    return dist.get_rank() if ranks() > 1 else 0


@contextmanager
def together() -> Iterator[None]:
    """Run a block on every rank; if it fails on one, it fails on all of them with the same message.

    The error names the rank; it is of the same class if it is one of this library or an `OSError`, otherwise a
    `ConsolidationError`. Nothing inside the block may communicate unless all ranks do so before they can fail.
    """
    if ranks() == 1:
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    flag = _wired(torch.tensor([float(failure is not None)]))
    dist.all_reduce(flag)
    if not float(flag):
        return
    told = everyone(None if failure is None else _told(failure))
    if failure is not None and not isinstance(failure, Exception):
        raise failure
    number, words = next((number, words) for number, words in enumerate(told) if words is not None)
    raise _retold(number, *words) from failure


def _told(error: BaseException) -> tuple[str, str]:
    """Return the class and the text of `error`, with the notes attached to it."""
    ours = isinstance(error, NullSpaceError)
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return type(error).__name__ if ours else "OSError" if isinstance(error, OSError) else "", text + notes


def _retold(number: int, kind: str, text: str) -> Exception:
    found = OSError if kind == "OSError" else getattr(errors, kind or "ConsolidationError", ConsolidationError)
    error: Exception = found(f"rank {number}: {text}")
    return error


def everyone(value: T) -> list[T]:
    """Return the `value` of every rank, in order (plain objects, pickled between the processes of one run)."""
    if ranks() == 1:
        return [value]
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, value)
    return found


def from_rank(source: int, value: T) -> T:
    """Return the `value` of rank `source` on every rank; tensors in it arrive on the same kind of device."""
    if ranks() == 1:
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
def add_up(tensors: Sequence[Tensor], owner: int | None = None, group: Any = None) -> None:
    """Replace every tensor by its sum over the ranks, in place and a bucket at a time.

    With `owner` only that rank receives the sums; the others' tensors are undefined afterwards.
    """
    if ranks() == 1:
        return
    for bucket in _buckets(tensors):
        flat = _wired(_flat(bucket))
        if owner is None:
            dist.all_reduce(flat, group=group)
        else:
            dist.reduce(flat, dst=owner, group=group)
        if owner is None or owner == rank():
            _unflatten(flat, bucket)


@torch.no_grad()
def gathered(tensor: Tensor, owner: int) -> list[Tensor]:
    """Return the `tensor` of every rank, all of one shape, on rank `owner`; an empty list elsewhere."""
    sent = _wired(tensor.contiguous())
    found = [torch.empty_like(sent) for _ in range(ranks())] if rank() == owner else None
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


def _wired(tensor: Tensor) -> Tensor:
    """Return `tensor` where the process group can send it: NCCL sends from the GPU only."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        return tensor.cuda()
    return tensor


def shared(values: Sequence[T | None], owners: Sequence[int], device: torch.device) -> list[T]:
    """Return the flat dataclasses `values` on every rank; the i-th is known to rank `owners[i]` only.

    Their tensors travel in buckets and arrive on `device`.
    """
    found: list[Any] = list(values)
    for source in sorted(set(owners)) if ranks() > 1 else []:
        mine = [index for index, owner in enumerate(owners) if owner == source]
        bodies = [_body(found[index]) for index in mine] if rank() == source else None
        outlines = from_rank(source, bodies)
        tensors = [t for index in mine for t in _tensors(found[index])] if rank() == source else []
        if rank() != source:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for _, s in outlines or [] for shape, dtype in s]
        for bucket in _buckets(tensors):
            flat = _wired(_flat(bucket))
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


def agree(facts: Facts, weights: Mapping[str, Tensor]) -> None:
    """Refuse ranks that differ.

    `facts` are pairs (what, value) in an order that all ranks share; `weights` are the parameters by name, of which
    whole ones (not sharded) must be equal.

    Raises:
        ConsolidationError: names the first difference, on every rank.
    """
    if ranks() == 1:
        return
    mine = [(label, re.sub(r" at 0x[0-9a-f]+", "", value)) for label, value in facts]
    told = everyone(mine)
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
    told = everyone(torch.stack([mark.cpu() for mark in marks]))
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


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor (never true before somebody has imported that class)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True)
class Shard:
    """The block `start:stop` of `size` along dimension `dim` that this rank of `count` holds."""

    dim: int
    start: int
    stop: int
    size: int
    group: Any
    count: int


def shard_of(parameter: Any) -> Shard | None:
    """Return which block of a DTensor this rank holds, `None` if it holds all of it.

    Raises:
        OptionError: the parameter is sharded along several mesh dimensions (tensor parallelism).
    """
    if not is_dtensor(parameter):
        return None
    mesh = parameter.device_mesh
    split = [(i, p) for i, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(i) > 1]
    if not split:
        return None
    mesh_dim, place = split[0]
    if len(split) > 1 or not place.is_shard():
        raise OptionError(
            f"a parameter of shape {tuple(parameter.shape)} is placed as {parameter.placements}: tensor parallelism is "
            "not supported; shard with fully_shard alone (or replicate and shard, HSDP)"
        )
    size = parameter.shape[place.dim]
    block = -(-size // mesh.size(mesh_dim))
    start = min(size, block * mesh.get_local_rank(mesh_dim))
    return Shard(place.dim, start, min(size, start + block), size, mesh.get_group(mesh_dim), mesh.size(mesh_dim))


@torch.no_grad()
def joined(block: Tensor, dim: int, shard: Shard) -> Tensor:
    """Return the blocks of all ranks of `shard.group`, one after the other along `dim` (sizes may differ)."""
    count = dist.get_world_size(shard.group)
    sizes = [_wired(torch.zeros(1, dtype=torch.int64)) for _ in range(count)]
    dist.all_gather(sizes, _wired(torch.tensor([block.shape[dim]])), group=shard.group)
    lengths = [int(size) for size in sizes]
    padded = _wired(block.new_zeros(*block.shape[:dim], max(lengths), *block.shape[dim + 1 :]))
    padded.narrow(dim, 0, block.shape[dim]).copy_(block)
    pieces = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(pieces, padded, group=shard.group)
    return torch.cat([p.narrow(dim, 0, n) for p, n in zip(pieces, lengths, strict=True)], dim=dim).to(block.device)


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that `fully_shard` was applied to."""
    if ranks() == 1 and not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def refuse_tensor_parallel(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse DTensors that `fully_shard` did not make.

    Raises:
        OptionError: names the first such parameter.
    """
    spread = [name for name, parameter in parameters.items() if is_dtensor(parameter)]
    if spread and not sharded_modules(model):
        raise OptionError(
            f"'{spread[0]}' is a DTensor outside fully_shard: tensor parallelism is not supported; "
            "shard with torch.distributed.fsdp.fully_shard alone"
        )


def reshard(model: nn.Module) -> None:
    """Put the shards of FSDP2 back in their places (an evaluation leaves the root's parameters whole)."""
    for module in sharded_modules(model):
        module.reshard()


def refuse_unsupported(bases: Iterable[Any]) -> None:
    """Refuse engines that flatten matrices or step only a part of the parameters.

    Raises:
        OptionError: names the engine and the way out.
    """
    for base in bases:
        kind = type(base)
        if any(parent.__name__ == "ZeroRedundancyOptimizer" for parent in kind.__mro__):
            raise OptionError(
                "ZeroRedundancyOptimizer steps a part of the parameters on each rank, so the others would not be "
                "corrected; shard with torch.distributed.fsdp.fully_shard (FSDP2), or use the optimizer inside it"
            )
        if kind.__module__.split(".")[0] == "deepspeed":
            raise OptionError(
                f"{kind.__name__} of DeepSpeed ZeRO flattens matrices into one buffer; use ZeRO stage 0, or "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        for parameter in (p for group in getattr(base, "param_groups", ()) for p in group["params"]):
            _refuse_flat(parameter)


def _refuse_flat(parameter: Any) -> None:
    if getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "FlatParameter":
        raise OptionError(
            "FullyShardedDataParallel (FSDP1) flattens matrices, also with use_orig_params=True; "
            "use torch.distributed.fsdp.fully_shard (FSDP2), which keeps them"
        )
    if hasattr(parameter, "ds_id"):
        raise OptionError(
            "DeepSpeed ZeRO stage 3 flattens matrices; use ZeRO stage 0, or torch.distributed.fsdp.fully_shard (FSDP2)"
        )
