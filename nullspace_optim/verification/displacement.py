"""Distance that each weight has moved since a moment, without a copy of the weights.

For a random-sign matrix `G` `[d, 8]`, `E ||D G||_F^2 = 8 ||D||_F^2`: keeping `W G` `[m, 8]` is enough to estimate
`||W_t - W_0||_F` (within a few per cent for `m` in the hundreds).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..distributed.collectives import all_reduce_sum_
from ..distributed.fsdp import shard_of
from ..distributed.group import local_tensor
from ..subspace.linalg import random_signs
from ..subspace.projection import exact_products

PROBES = 8


class Displacement:
    """Sketches of weights at the first step after a consolidation."""

    def __init__(self) -> None:
        self._sketches: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Start over: the next `remember` defines the new origin."""
        self._sketches.clear()

    @torch.no_grad()
    def remember(self, parameters: Iterable[Tensor]) -> None:
        """Take the present value of every matrix-like parameter as origin, unless it has one already."""
        for parameter in parameters:
            if parameter.ndim >= 2 and id(parameter) not in self._sketches:
                self._sketches[id(parameter)] = _sketch(parameter)

    @torch.no_grad()
    def size(self, parameter: Tensor) -> float | None:
        """Return the estimated Frobenius norm of the movement, None if the parameter has no origin.

        All ranks that hold shards of it must call it.
        """
        origin = self._sketches.get(id(parameter))
        if origin is None:
            return None
        return summed_norm((_sketch(parameter) - origin), parameter) / math.sqrt(PROBES)


def _sketch(parameter: Tensor) -> Tensor:
    matrix = local_tensor(parameter).flatten(1)
    matrix = matrix.to(torch.float32) if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    signs = random_signs(matrix.shape[1], PROBES)
    with exact_products(matrix.device):
        return matrix @ signs.to(device=matrix.device, dtype=matrix.dtype)


def summed_norm(block: Tensor, parameter: Tensor) -> float:
    """Return the Frobenius norm of a tensor of which each rank has a `block`, as it has of `parameter`."""
    shard = shard_of(parameter)
    if shard is None:
        return float(block.norm())
    square = block.detach().double().square().sum()[None]
    all_reduce_sum_([square], group=shard.group)
    return float(square.sqrt())
