"""The least that protection can cost, counted first, and what it does cost: measured over floor, by rank.

    python -m reference.benchmarks.floors                               ViT-B/32 and ViT-B/16
    python -m reference.benchmarks.floors --models ViT-L-14 --device cuda

The floor is counted operations over the measured rate of square products, or counted bytes over the measured rate of a
copy, whichever is longer (see `counting`). What is measured is `step` of an optimizer whose base moves nothing: the
correction of every matrix of the model with all its bookkeeping.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from fractions import Fraction
from statistics import mean, median

import torch

from nullspace_optim import NullSpaceOptimizer
from reference.benchmarks.counting import EXACT_EVERY, H200, Rates, Work, correction, measured_rates
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.benchmarks.timing import seconds
from reference.benchmarks.workload import Still, build, fill, matrices, protected_at_random

SHARES = "1/16,1/8,1/4,1/2,3/4,15/16"


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shares = [Fraction(share) for share in options.shares.split(",")]
    started = time.perf_counter()
    progress("rates of products and copies")
    rates = measured_rates(device, options.product)
    tables = [_rates_table((rates, H200))]
    for name in options.models.split(","):
        tables.append(_model_table(name, options.blocks, shares, options.repeats, rates, device))
    return finish("floors", arguments, device, time.perf_counter() - started, tables, options.output)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m reference.benchmarks.floors", description=about)
    parser.add_argument("--models", default="ViT-B-32,ViT-B-16", help="open_clip architectures, or tiny")
    parser.add_argument("--blocks", type=int, help="use only so many blocks of each tower; default: all")
    parser.add_argument("--shares", default=SHARES, help="k/d of every matrix, fractions")
    parser.add_argument("--repeats", type=int, default=3, help="corrections a figure; 0: count only")
    parser.add_argument("--product", type=int, default=0, help="size of the products that tell the rate")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--output", default="", help="folder for floors.md and floors.json")
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
        f"Measured: median of {repeats} steps, of the difference form the mean over {EXACT_EVERY} steps, one of them "
        "exact. Bound by: what the larger part of the floor consists of.",
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
    cells = (f"{work.operations / 1e9:.1f}", f"{work.bytes / 1e9:.2f}", f"{floor:.1f}", bound)
    return (*cells, measured, over, f"{far:.2f}")


def _seconds_a_step(optimizer: NullSpaceOptimizer, repeats: int, periodic: bool, device: torch.device) -> float:
    """Seconds of one correction: of the anchor form the median, of the difference form the mean of a period."""
    optimizer.step()  # does not count: it makes workspaces and complements
    if periodic:
        return mean(seconds(optimizer.step, device) for _ in range(EXACT_EVERY))
    return median(seconds(optimizer.step, device) for _ in range(repeats))


def _rates_table(machines: Sequence[Rates]) -> Table:
    rows = [
        (r.name, f"{r.float32 / 1e9:,.0f}", f"{r.bfloat16 / 1e9:,.0f}", f"{r.bandwidth / 1e9:,.0f}") for r in machines
    ]
    return Table(
        "Rates",
        ("machine", "float32 products (GFLOP/s)", "bfloat16 products (GFLOP/s)", "memory (GB/s)"),
        tuple(rows),
        "Here: the best square product, and the best copy of an array (bytes read and written). H200: the data sheet, "
        "float32 without TF32.",
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
