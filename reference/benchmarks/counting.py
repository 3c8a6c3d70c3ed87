"""What the correction of one step must do, counted: operations and bytes, and the least time that these take.

A matrix `W` `[m, d]` keeps `k` of its `d` inputs (side "right"; for `x @ P` of its `m` outputs, side "left"). Anchor
form: `W U` and `R U^T`, `4 m d k` operations; `W` is read and written, `U` and the anchor are read. Difference form:
the same products with the shorter of basis and complement, `4 m d min(k, d - k)`; `W` is copied before the base moves
it, and the copy is read again; every 16th step the anchor form comes on top. A product and a sum are two operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from nullspace_optim import Basis
from reference.benchmarks.timing import seconds

EXACT_EVERY = 16
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: float32 and bfloat16 products (operations), and bytes read or written."""

    name: str
    float32: float
    bfloat16: float
    bandwidth: float


# NVIDIA's data sheet of the H200 SXM: 67 TFLOP/s float32 without tensor cores, 1,979 TFLOP/s bfloat16 with sparsity
# (half of it without), 4.8 TB/s. Peaks that nobody reaches: a floor of floors.
H200 = Rates("H200, published peaks", 67e12, 989.5e12, 4.8e12)


@dataclass(frozen=True)
class Work:
    """Operations in float32 and in bfloat16, and bytes, of one correction."""

    float32: float = 0.0
    bfloat16: float = 0.0
    bytes: float = 0.0

    @property
    def operations(self) -> float:
        """All products."""
        return self.float32 + self.bfloat16

    def __add__(self, other: Work) -> Work:
        return Work(self.float32 + other.float32, self.bfloat16 + other.bfloat16, self.bytes + other.bytes)

    def floor(self, rates: Rates) -> float:
        """Seconds that it takes at least: products or memory, whichever is slower, as if they overlapped fully."""
        return max(self.float32 / rates.float32 + self.bfloat16 / rates.bfloat16, self.bytes / rates.bandwidth)


def correction(bases: Mapping[str, Basis], precision: str) -> Iterator[Work]:
    """The work of each protected side in one step, in the form that the library chooses for it."""
    for basis in bases.values():
        for side, subspace in basis.subspaces.items():
            if side != "rows" and subspace.rank:
                other = subspace.anchor.shape[1] if side == "right" else subspace.anchor.shape[2]
                yield matrix_work(other, subspace.size, max(subspace.ranks), precision, len(subspace.ranks))


def matrix_work(m: int, d: int, k: int, precision: str, groups: int = 1) -> Work:
    """The work of `groups` matrices `[m, d]` with `k` of `d` directions kept; `precision` is that of the optimizer."""
    weight, size = groups * m * d, groups * FLOAT * (m + d)
    anchor = Work(4.0 * weight * k, 0.0, 2.0 * FLOAT * weight + size * k)
    if precision == "exact" and 2 * k <= d:
        return anchor
    short, moved = min(k, d - k), 5.0 * FLOAT * weight  # copy W; read W and the copy, write W
    products = 4.0 * weight * short
    exact, fast = (products, 0.0) if precision == "exact" else (0.0, products)
    return Work(
        exact + anchor.float32 / EXACT_EVERY,
        fast,
        moved + FLOAT * groups * d * short + anchor.bytes / EXACT_EVERY,
    )


def protection_operations(bases: Mapping[str, Basis], precision: str) -> float:
    """Operations of one protected step over all matrices."""
    return sum(work.operations for work in correction(bases, precision))


def measured_rates(device: torch.device, size: int = 0) -> Rates:
    """The rates of `device`: square products of `size` (2,048 on a CPU, 8,192 elsewhere), and a copy of many bytes."""
    size = size or (2048 if device.type == "cpu" else 8192)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        found[dtype] = 2.0 * size**3 / _best(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), device)  # type: ignore[misc]
    source = torch.ones(32 * size * size, device=device)
    target = torch.zeros_like(source)
    copied = 2.0 * source.nbytes / _best(lambda: target.copy_(source), device)
    return Rates("measured here", found[torch.float32], found[torch.bfloat16], copied)


def _best(run: Callable[[], object], device: torch.device, least: float = 1.0) -> float:
    """The shortest run within `least` seconds, three at least."""
    run()
    times, ends = [seconds(run, device)], time.perf_counter() + least
    while len(times) < 3 or time.perf_counter() < ends:
        times.append(seconds(run, device))
    return min(times)
