"""Cost of a consolidation: over a forward-only pass, part by part.

    python -m reference.benchmarks.consolidate --model DIR --model ViT-B-32

A consolidation is a forward pass under observation, second moments `K = X^T X` `[d, d]` of the rows `X` `[n, d]` of
every weight, for `rows="relevant"` a backward pass that finds the rows that matter, one eigen-decomposition a moment,
and a probe for `verify`. The first three grow with the data, the last two do not. Beside the SVDs of others: `peers`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from cProfile import Profile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pstats import Stats
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD

from nullspace_optim import NullSpaceOptimizer, clip_forward
from reference.benchmarks import outcome
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.benchmarks.workload import build, quiet, random_batch, ratio, seconds
from reference.config import load_config
from reference.evaluation.tables import reading
from reference.training.clip import load_clip

PROMPTS = 10
BATCH = 32

# Where the time of a consolidation is spent: part, file, function, and the caller that counts (None: all).
PLACES = (
    ("forward", "capture.py", "batch", "observed"),
    ("relevance", "relevance.py", "trace", None),
    ("moments", "second_moment.py", "update", None),
    ("solve", "fates.py", "_examined", None),
    ("bases", "grow.py", "grow_basis", None),
    ("probe", "probes.py", "record_probe", None),
)
HEADER = (
    "model", "rows", "forward only", "consolidate", "ratio", "ratio of what grows with the data", "forward, observed",
    "relevance", "second moments", "solve", "bases", "probe", "rest",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model with the images of a task `[n, 3, s, s]`, in batches, its prompts `[c, context]`, and `n`."""

    name: str
    model: nn.Module
    batches: list[Tensor]
    tokens: Tensor
    images: int


@dataclass(frozen=True)
class Spent:
    """Seconds of forward-only passes and of consolidations, taken in turn, and the parts of the last consolidation."""

    forward: list[float]
    whole: list[float]
    parts: dict[str, float]


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    options = parse(arguments)
    device, started = options.device, time.perf_counter()
    passes = []
    for name in options.model or ["ViT-B-32"]:
        case = prepare(name, options.blocks, options.images, device)
        for rows in options.rows.split(","):
            progress(f'{case.name}, rows="{rows}"')
            passes.append(_row(case, rows, measure(case, rows, options.repeats, device)))
    table = Table(
        "Consolidation of one task, seconds", HEADER, tuple(passes), reading("consolidate", repeats=options.repeats)
    )
    return finish("reference.benchmarks.consolidate", arguments, device, started, [table], options.output)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = outcome.parser("consolidate", __doc__)
    parser.add_argument(
        "--model", action="append", help="open_clip architecture, folder of an open_clip model, or tiny; repeatable"
    )
    parser.add_argument("--blocks", type=int, help="use only so many blocks of each tower; default: all")
    parser.add_argument("--images", type=int, default=128, help="images of the task, in batches of 32")
    parser.add_argument("--rows", default="relevant,all", help="which of relevant,all")
    parser.add_argument("--repeats", type=int, default=1, help="pairs of passes a figure")
    return parser.parse_args(arguments)


def prepare(name: str, blocks: int | None, images: int, device: torch.device) -> Case:
    """The model `name` and noise in the shape of its inputs."""
    if Path(name).is_dir():
        named = {"model": name, "data_root": name, "output": "", "device": str(device)}
        model = load_clip(load_config("mini", named)).model
        name = Path(name).resolve().name
    else:
        model = build(name, blocks, device)
    batch = random_batch(model, max(images, PROMPTS), device)
    parts = [batch.images[start : min(start + BATCH, images)] for start in range(0, images, BATCH)]
    return Case(name, model, parts, batch.tokens[:PROMPTS], images)


def measure(case: Case, rows: str, repeats: int, device: torch.device) -> Spent:
    """Forward-only passes and consolidations in turn; every consolidation starts without bases."""
    forward = clip_forward(case.model, case.tokens)

    @torch.no_grad()
    def forward_only() -> None:
        forward.restart()
        for batch in case.batches:
            forward(batch)

    case.model.eval()
    forward_only()
    plain, whole = [], []
    for _ in range(repeats):
        plain.append(seconds(forward_only, device))
        optimizer = NullSpaceOptimizer(SGD(case.model.parameters(), lr=1e-3), case.model, rows=rows)  # type: ignore[arg-type]
        with quiet(), Profile() as profile:
            whole.append(seconds(partial(optimizer.consolidate, case.batches, forward=forward, progress=False), device))
        optimizer.detach()
    return Spent(plain, whole, parts_of(profile))


def parts_of(profile: Profile) -> dict[str, float]:
    """Seconds spent in each of `PLACES`; the forward part without what happens inside it."""
    table = cast(Any, Stats(profile)).stats
    parts = {}
    for part, file, function, wanted in PLACES:
        parts[part] = 0.0
        for (path, _, name), (_, _, _, cumulative, callers) in table.items():
            if name == function and Path(path).name == file:
                counted = [times[3] for (_, _, caller), times in callers.items() if caller == wanted]
                parts[part] += cumulative if wanted is None else sum(counted)
    parts["forward"] -= parts["relevance"] + parts["moments"]
    return parts


def _row(case: Case, rows: str, spent: Spent) -> tuple[str, ...]:
    plain, whole, parts = median(spent.forward), median(spent.whole), spent.parts
    growing = parts["forward"] + parts["relevance"] + parts["moments"]
    rest = whole - growing - parts["solve"] - parts["bases"] - parts["probe"]
    columns = (parts[part] for part in ("forward", "relevance", "moments", "solve", "bases", "probe"))
    figures = (plain, whole, ratio(spent.whole, spent.forward), growing / plain, *columns, rest)
    return f"{case.name}, {case.images} images", rows, *(f"{figure:.2f}" for figure in figures)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
