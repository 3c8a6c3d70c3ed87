"""Cost of a consolidation: over a forward-only pass, part by part, and beside the SVDs of published methods.

    python -m reference.benchmarks.consolidate --model DIR --model ViT-B-32

A consolidation is a forward pass under observation, second moments `K = X^T X` `[d, d]` of the rows `X` `[n, d]` of
every weight, for `rows="relevant"` a backward pass that finds the rows that matter, one eigen-decomposition a moment,
and a probe for `verify`. The first three grow with the data, the last two do not. GPM takes a full SVD of `X`, GNSP one
of `K`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
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
    sizes: dict[str, int]


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    passes, decompositions = [], []
    for name in options.model or ["ViT-B-32"]:
        case = prepare(name, options.blocks, options.images, device)
        for rows in options.rows.split(","):
            progress(f'{case.name}, rows="{rows}"')
            spent = measure(case, rows, options.repeats, device)
            passes.append(_row(case, rows, spent))
        if not options.no_peers:
            decompositions.append(_compare(case, spent, device))
    tables = [_pass_table(passes, options.repeats), *([] if options.no_peers else [_peer_table(decompositions)])]
    return finish("reference.benchmarks.consolidate", arguments, device, started, tables, options.output)


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
    parser.add_argument("--no-peers", action="store_true", help="leave the SVDs of published methods out")
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
    kept = {name: basis.main for name, basis in optimizer.bases.items() if basis.main is not None}
    sizes = {name: subspace.size for name, subspace in kept.items() if subspace.side != "rows"}
    return Spent(plain, whole, parts_of(profile), sizes)


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


def peer_seconds(case: Case, sizes: dict[str, int], device: torch.device) -> tuple[float, float]:
    """A full SVD of all rows (GPM) and of the Gram matrix (GNSP) of every weight: each shape once, times its number."""
    model = cast(Any, case.model)
    vision = case.images * model.visual.positional_embedding.shape[0]
    text = case.tokens.shape[0] * case.tokens.shape[1]
    shapes = Counter((vision if name.startswith("visual.") else text, size) for name, size in sizes.items())
    rows_svd = gram_svd = 0.0
    for (rows, size), number in shapes.items():
        progress(f"{case.name}: SVD of {rows} x {size}")
        x = torch.randn(rows, size, device=device)
        rows_svd += number * seconds(partial(torch.linalg.svd, x.T, full_matrices=False), device)
        gram_svd += number * seconds(lambda x=x: torch.linalg.svd(x.T @ x), device)  # type: ignore[misc]
    return rows_svd, gram_svd


def _row(case: Case, rows: str, spent: Spent) -> tuple[str, ...]:
    plain, whole, parts = median(spent.forward), median(spent.whole), spent.parts
    growing = parts["forward"] + parts["relevance"] + parts["moments"]
    rest = whole - growing - parts["solve"] - parts["bases"] - parts["probe"]
    columns = (parts[part] for part in ("forward", "relevance", "moments", "solve", "bases", "probe"))
    return (
        f"{case.name}, {case.images} images",
        rows,
        f"{plain:.2f}",
        f"{whole:.2f}",
        f"{ratio(spent.whole, spent.forward):.2f}",
        f"{growing / plain:.2f}",
        *(f"{value:.2f}" for value in columns),
        f"{rest:.2f}",
    )


def _pass_table(rows: Sequence[tuple[str, ...]], repeats: int) -> Table:
    return Table(
        "Consolidation of one task, seconds",
        (
            "model", "rows", "forward only", "consolidate", "ratio", "ratio of what grows with the data",
            "forward, observed", "relevance", "second moments", "solve", "bases", "probe", "rest",
        ),
        tuple(rows),
        reading("consolidate", repeats=repeats),
    )  # fmt: skip


def _compare(case: Case, spent: Spent, device: torch.device) -> tuple[str, ...]:
    rows_svd, gram_svd = peer_seconds(case, spent.sizes, device)
    ours = spent.parts["moments"] + spent.parts["solve"]
    cells = [f"{value:.2f}" for value in (ours, rows_svd, gram_svd)]
    return f"{case.name}, {case.images} images", *cells, f"{rows_svd / ours:.1f}", f"{gram_svd / ours:.1f}"


def _peer_table(rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(
        "Finding the directions: ours beside full decompositions, seconds for all matrices",
        ("model", "moments + solve", "SVD of rows (GPM)", "Gram and its SVD (GNSP)", "GPM / ours", "GNSP / ours"),
        tuple(rows),
        reading("decompositions"),
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
