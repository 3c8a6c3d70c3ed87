"""Operations and bytes of one step's correction, counted; the least time they take, and the time measured, by rank.

    python -m reference.benchmarks.counting                               ViT-B/32 and ViT-B/16
    python -m reference.benchmarks.counting --models ViT-L-14 --device cuda

A matrix `W` `[m, d]` keeps `k` of its `d` inputs (side "right"; for `x @ P` of its `m` outputs, side "left"). Anchor
form: `W U` and `R U^T`, `4 m d k` operations; `W` is read and written, `U` and the anchor are read. Difference form:
the same products with the shorter of basis and complement, `4 m d min(k, d - k)`; `W` is copied before the base moves
it, and the copy is read again; every 16th step the anchor form comes on top. A product and a sum are two operations.

The floor is counted operations over the measured rate of square products, or counted bytes over the measured rate of a
copy, whichever is longer. What is measured is `step` of an optimizer whose base moves nothing: the correction of every
matrix of the model with all its bookkeeping.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import mean, median

import torch
from torch.utils.benchmark import Timer

from nullspace_optim import Basis, NullSpaceOptimizer
from reference.benchmarks import outcome
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.benchmarks.workload import Still, build, fill, matrices, protected_at_random, seconds
from reference.evaluation.tables import reading

EXACT_EVERY = 16
SHARES = "1/16,1/8,1/4,1/2,3/4,15/16"
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Rates:
    """Rates of a machine, per second: float32 and bfloat16 products (operations), and bytes read or written."""

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
        exact + anchor.float32 / EXACT_EVERY, fast, moved + FLOAT * groups * d * short + anchor.bytes / EXACT_EVERY
    )


def protection_operations(bases: Mapping[str, Basis], precision: str) -> float:
    """Operations of one protected step over all matrices."""
    return sum(work.float32 + work.bfloat16 for work in correction(bases, precision))


def measured_rates(device: torch.device, size: int = 0) -> Rates:
    """The rates of `device`: square products of `size` (2,048 on a CPU, 8,192 elsewhere), and a copy of many bytes."""
    size = size or (2048 if device.type == "cpu" else 8192)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        found[dtype] = 2.0 * size**3 / _best(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))  # type: ignore[misc]
    source = torch.ones(32 * size * size, device=device)
    target = torch.zeros_like(source)
    copied = 2.0 * source.nbytes / _best(lambda: target.copy_(source))
    return Rates("measured here", found[torch.float32], found[torch.bfloat16], copied)


def _best(run: Callable[[], object]) -> float:
    """Seconds of the shortest run within a second or more."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=1.0).times)


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    options = parse(arguments)
    device, started = options.device, time.perf_counter()
    shares = [Fraction(share) for share in options.shares.split(",")]
    progress("rates of products and copies")
    rates = measured_rates(device, options.product)
    header = ("machine", "float32 products (GFLOP/s)", "bfloat16 products (GFLOP/s)", "memory (GB/s)")
    known = [(r.name, *(f"{rate / 1e9:,.0f}" for rate in (r.float32, r.bfloat16, r.bandwidth))) for r in (rates, H200)]
    tables = [Table("Rates", header, tuple(known), reading("rates"))]
    for name in options.models.split(","):
        tables.append(_model_table(name, options.blocks, shares, options.repeats, rates, device))
    return finish("reference.benchmarks.counting", arguments, device, started, tables, options.output)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = outcome.parser("counting", __doc__)
    parser.add_argument("--models", default="ViT-B-32,ViT-B-16", help="open_clip architectures, or tiny")
    parser.add_argument("--blocks", type=int, help="use only so many blocks of each tower; default: all")
    parser.add_argument("--shares", default=SHARES, help="k/d of every matrix, fractions")
    parser.add_argument("--repeats", type=int, default=3, help="corrections a figure; 0: count only")
    parser.add_argument("--product", type=int, default=0, help="size of the products that tell the rate")
    return parser.parse_args(arguments)


def _model_table(
    name: str, blocks: int | None, shares: Sequence[Fraction], repeats: int, rates: Rates, device: torch.device
) -> Table:
    model = build(name, blocks, device)
    weights = matrices(model)
    rows: list[tuple[str, ...]] = []
    for precision in ("exact", "fast"):
        gc.collect()  # hooks and optimizers refer to each other: bases of the last curve would stay
        optimizer = protected_at_random(Still(weights.values()), model, precision)
        for share in shares:
            progress(f"{name}, k/d {share}, {precision}")
            fill(optimizer, float(share))
            rows.append((str(share), precision, *_row(optimizer, precision, float(share), repeats, rates, device)))
        optimizer.detach()
    size = sum(weight.numel() for weight in weights.values())
    return Table(
        f"Floor of the correction, {name}, {len(weights)} matrices, {size / 1e6:.1f} million weights, float32",
        (
            "k/d", "precision", "GFLOP", "GB moved", "floor here (ms)", "bound by", "measured (ms)", "measured / floor",
            "floor on an H200 (ms)",
        ),
        tuple(rows),
        reading("floors", repeats=repeats, period=EXACT_EVERY),
    )  # fmt: skip


def _row(
    optimizer: NullSpaceOptimizer, precision: str, share: float, repeats: int, rates: Rates, device: torch.device
) -> tuple[str, ...]:
    parts = list(correction(optimizer.bases, precision))
    work = sum(parts, Work())
    floor, far = (1e3 * sum(part.floor(machine) for part in parts) for machine in (rates, H200))
    memory = 1e3 * work.bytes / rates.bandwidth
    measured, over = "", ""
    if repeats:
        took = 1e3 * _seconds_a_step(optimizer, repeats, precision == "fast" or 2 * share > 1, device)
        measured, over = f"{took:.1f}", f"{took / floor:.2f}"
    bound = "memory" if memory > 0.99 * floor else "products"
    cells = (f"{(work.float32 + work.bfloat16) / 1e9:.1f}", f"{work.bytes / 1e9:.2f}", f"{floor:.1f}", bound)
    return (*cells, measured, over, f"{far:.2f}")


def _seconds_a_step(optimizer: NullSpaceOptimizer, repeats: int, periodic: bool, device: torch.device) -> float:
    """Seconds of one correction: of the anchor form the median, of the difference form the mean of a period."""
    optimizer.step()  # does not count: it makes workspaces and complements
    if periodic:
        return mean(seconds(optimizer.step, device) for _ in range(EXACT_EVERY))
    return median(seconds(optimizer.step, device) for _ in range(repeats))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
