"""Cost of protection in a training step: with over without, by rank.

    python -m reference.benchmarks.step                      ViT-B/32 on a CPU, ViT-B/16 in bfloat16 on a GPU
    python -m reference.benchmarks.step --shares 1/4,1/2 --blocks 3 --repeats 5

Matrices are `W` `[m, d]`, bases `U` `[d, k]`; `k/d` is the share of protected directions. Operations: see `counting`;
beside the dense `P` of published methods and other packages: `peers`.
"""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.clip import alignment_loss
from reference.benchmarks import outcome, workload
from reference.benchmarks.counting import protection_operations
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.evaluation.tables import reading

RATE = 1e-6


@dataclass(frozen=True)
class Trainer:
    """A model with an optimizer over all its parameters."""

    model: nn.Module
    optimizer: Optimizer
    batch: workload.Batch
    autocast: torch.dtype

    def gradients(self) -> None:
        """Forward and backward."""
        device = self.batch.images.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast != torch.float32):
            loss = alignment_loss(self.model(self.batch.images, self.batch.tokens), smoothing=0.0) / 2
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    def timed_step(self) -> tuple[float, float]:
        """Seconds of one whole training step, and of the optimizer's part of it."""
        before = workload.seconds(self.gradients, self.batch.images.device)
        last = workload.seconds(self.optimizer.step, self.batch.images.device)
        return before + last, last


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    settings = parse(arguments)
    started = time.perf_counter()
    return finish("step", arguments, settings.device, started, [whole_steps(settings)], settings.output)


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line, with the defaults of the device."""
    parser = outcome.parser("step", __doc__)
    parser.add_argument("--model", help="open_clip architecture, or tiny; default: ViT-B-32 (CPU), ViT-B-16 (GPU)")
    parser.add_argument("--blocks", type=int, help="use only so many blocks of each tower; default: all")
    parser.add_argument("--batch", type=int, help="image-text pairs a step; default: 32 (CPU), 64 (GPU)")
    parser.add_argument("--repeats", type=int, help="pairs of steps a figure; default: 2 (CPU), 20 (GPU)")
    parser.add_argument("--shares", default="1/16,1/4,1/2,3/4,15/16", help="k/d of every matrix, fractions")
    parser.add_argument("--autocast", choices=("float32", "bfloat16"), help="default: float32 (CPU), bfloat16 (GPU)")
    options = parser.parse_args(arguments)
    graphic = options.device.type == "cuda"
    options.model = options.model or ("ViT-B-16" if graphic else "ViT-B-32")
    options.batch, options.repeats = options.batch or (64 if graphic else 32), options.repeats or (20 if graphic else 2)
    options.shares = tuple(sorted(Fraction(share) for share in options.shares.split(",")))
    options.autocast = getattr(torch, options.autocast or ("bfloat16" if graphic else "float32"))
    return options


def whole_steps(settings: Namespace) -> Table:
    """Training steps with protection over steps without, for every share and both precisions."""
    with_it = workload.build(settings.model, settings.blocks, settings.device)
    batch = workload.random_batch(with_it, settings.batch, settings.device)
    without = copy.deepcopy(with_it)
    bare = Trainer(without, AdamW(without.parameters(), lr=RATE), batch, settings.autocast)
    with FlopCounterMode(display=False) as counter:  # forward and backward
        bare.gradients()
    operations = float(counter.get_total_flops())
    bare.timed_step()
    base = AdamW(with_it.parameters(), lr=RATE)
    found: dict[tuple[Fraction, str], tuple[str, ...]] = {}
    for precision in ("exact", "fast"):
        optimizer = workload.protected_at_random(base, with_it, precision)
        guarded = Trainer(with_it, optimizer, batch, settings.autocast)
        guarded.gradients()
        for share in settings.shares:
            progress(f"training step, k/d {share}, {precision}")
            workload.fill(optimizer, float(share))
            found[share, precision] = _compare(bare, guarded, settings.repeats, operations, precision)
        optimizer.detach()
    rows = [(str(share), precision, *cells) for (share, precision), cells in sorted(found.items())]
    depth = "" if settings.blocks is None else f", {settings.blocks} blocks a tower"
    kind = str(settings.autocast).removeprefix("torch.")
    return Table(
        f"Training step, {settings.model}{depth}, batch {settings.batch}, both towers, AdamW, {kind}",
        (
            "k/d", "precision", "with / without", "by the optimizer's part", "predicted", "step without (s)",
            "added (s)", "drift",
        ),
        tuple(rows),
        reading("steps", repeats=settings.repeats, giga=operations / 1e9),
    )  # fmt: skip


def _compare(bare: Trainer, guarded: Trainer, repeats: int, operations: float, precision: str) -> tuple[str, ...]:
    """Time pairs of steps without and with protection: the cells of one row."""
    guarded.optimizer.step()  # does not count: it makes workspaces and complements
    pairs = [(bare.timed_step(), guarded.timed_step()) for _ in range(repeats)]
    plain = median(without[0] for without, _ in pairs)
    added = median(with_it[1] for _, with_it in pairs) - median(without[1] for without, _ in pairs)
    assert isinstance(guarded.optimizer, NullSpaceOptimizer)
    extra = protection_operations(guarded.optimizer.bases, precision)
    return (
        f"{workload.ratio([w[0] for _, w in pairs], [b[0] for b, _ in pairs]):.3f}",
        f"{1 + added / plain:.3f}",
        f"{1 + extra / operations:.3f}",
        f"{plain:.3f}",
        f"{added:+.3f}",
        f"{guarded.optimizer.verify().worst:.1e}",
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
