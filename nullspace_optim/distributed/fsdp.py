"""FSDP2: sharded blocks and their state; other engines of torch.distributed are refused.

`fully_shard` cuts every parameter along one dimension and gathers it for a forward pass. Engines that flatten matrices,
or step only some of the parameters on a rank, leave nothing that could be corrected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import OptionError
from .group import is_dtensor, to_backend_device, world_size


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
def all_gather_uneven(block: Tensor, dim: int, group: Any) -> Tensor:
    """Return the blocks of all ranks of `group` (None: all), one after the other along `dim` (sizes may differ)."""
    count = dist.get_world_size(group)
    sizes = [to_backend_device(torch.zeros(1, dtype=torch.int64)) for _ in range(count)]
    dist.all_gather(sizes, to_backend_device(torch.tensor([block.shape[dim]])), group=group)
    lengths = [int(size) for size in sizes]
    padded = to_backend_device(block.new_zeros(*block.shape[:dim], max(lengths), *block.shape[dim + 1 :]))
    padded.narrow(dim, 0, block.shape[dim]).copy_(block)
    pieces = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([p.narrow(dim, 0, n) for p, n in zip(pieces, lengths, strict=True)], dim=dim).to(block.device)


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that `fully_shard` was applied to."""
    if world_size() == 1 and not dist.is_initialized():
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
    """Put the shards of FSDP2 back in their places: an evaluation leaves the root's parameters whole, a forward pass
    that failed in the middle those of every module that it had reached.
    """
    for module in sharded_modules(model):
        _forget_pass(module._get_fsdp_state())
        module.reshard()


def _forget_pass(state: Any) -> None:
    """Reset one module of FSDP2 after a forward pass that never ended (torch itself would take the next one for it)."""
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for unit in [state, *filter(None, groups)]:
        if unit._training_state.name == "FORWARD":
            unit._training_state = type(unit._training_state).IDLE
        if getattr(unit, "_all_gather_result", None) is not None:
            unit.wait_for_unshard()
    state._state_ctx.iter_forward_root = None


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
        if kind.__module__.startswith("deepspeed.runtime."):  # deepspeed.ops holds ordinary optimizers
            raise OptionError(
                f"{kind.__name__} of DeepSpeed flattens matrices into one buffer (ZeRO, 16-bit optimizers); use "
                "ZeRO stage 0 with autocast, or torch.distributed.fsdp.fully_shard (FSDP2)"
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
