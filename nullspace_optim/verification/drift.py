"""Numbers about a protected model: the drift a threshold allows, capacity left, and whether protection holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed.fsdp import shard_of
from ..distributed.group import local_tensor
from ..subspace.basis import Basis, BasisStore, Fate
from ..subspace.matrix import matrix_of
from ..subspace.projection import project_gradient_
from .displacement import Displacement, summed_norm
from .probes import flat_outputs

ASSUMED_UPDATE = 0.01


@torch.no_grad()
def allowed_drift(
    parameters: Mapping[str, Tensor], store: BasisStore, displacement: Displacement, run: Callable[[], Any]
) -> tuple[float, bool]:
    """Return the relative output change under one random update that keeps all protected directions.

    Each protected weight moves by a Gaussian matrix, projected onto its free directions and scaled to the distance
    that the weight moved in the last task (1 % of its norm if it did not move; then the second value is True). The
    weights are restored bitwise. NaN where the shape of the outputs depends on the weights (a detector's boxes).
    """
    free = {
        name: parameters[name] for name, basis in store.items() if basis.fate is Fate.PROTECTED and name in parameters
    }
    if not free:
        return 0.0, False
    sizes = {name: displacement.size(parameter) or 0.0 for name, parameter in free.items()}
    assumed = not any(sizes.values())
    before = flat_outputs(run())
    saved = {name: local_tensor(parameter).clone() for name, parameter in free.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        for name, parameter in free.items():
            size = ASSUMED_UPDATE * summed_norm(local_tensor(parameter), parameter) if assumed else sizes[name]
            _move(parameter, store[name], size, generator)
        after = flat_outputs(run())
    finally:
        for name, parameter in free.items():
            local_tensor(parameter).copy_(saved[name])
    if after.shape != before.shape:
        return float("nan"), assumed
    return float((after - before).norm() / before.norm().clamp_min(1e-30)), assumed


def _move(parameter: Tensor, basis: Basis, size: float, generator: torch.Generator) -> None:
    """Add a random update of norm `size` that lies in the free directions of `basis`."""
    dtype = torch.complex64 if parameter.is_complex() else torch.float32
    update = torch.randn(parameter.shape, generator=generator, dtype=dtype).to(parameter.device)
    with matrix_of(update, basis.layout) as matrix:
        for subspace in basis.subspaces.values():
            if subspace.side == "rows":
                matrix[0].index_fill_(0, subspace.basis, 0.0)
            elif subspace.rank:
                directions = subspace.basis[:, : matrix.shape[2]] if subspace.side == "right" else subspace.basis
                project_gradient_(matrix, directions, subspace.side, subspace.scale)
    update *= size / float(update.norm().clamp_min(1e-30))
    shard = shard_of(parameter)
    if shard is not None:
        update = update.narrow(shard.dim, shard.start, shard.stop - shard.start)
    local_tensor(parameter).add_(update.to(parameter.dtype))


def moved_buffers(store: BasisStore, buffers: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of buffers that differ from their value at the last consolidation that read them."""
    return tuple(
        name
        for name, kept in store.buffers.items()
        if name not in buffers or not torch.equal(buffers[name], kept.to(buffers[name].device))
    )
