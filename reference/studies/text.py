"""What a pretrained sentence encoder keeps while it learns one retrieval task after another: a table and a figure.

    python -m reference.studies.text --data-root DIR --model DIR --output DIR --figure FILE

`--data-root` holds `<task>/{train,test}.jsonl` (objects with `query` and `document`) and `pool.txt`, general texts;
`--model` is a folder of transformers, such as that of all-MiniLM-L6-v2. The encoder (mean of the last states, no
dropout) learns each task by the symmetric contrastive loss of a batch. Measured is recall@1 among a task's documents,
of every task after each one; at the end also after interpolation with the untouched weights (WiSE-FT; `blend`). Every
finished run is a JSON file below `--output`; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from reference.benchmarks.outcome import Table, finish, progress
from reference.benchmarks.workload import quiet
from reference.command import carried_out
from reference.errors import ExperimentError
from reference.evaluation.tables import reading, spread, whole
from reference.studies.encoder import HALF, TOKENS, Bed, by_length, drawn, embed, load_bed, loss_of, padded
from reference.studies.ways import Way, chosen, draw, interpolation, listed, parser, stored_bytes
from reference.training.tracking import provenance, write_json

BATCH = 24  # pairs
KEPT_PAIRS = 240  # of a task, drawn at random, that ours consolidates
SHARES = (0.2, 0.4)
COLUMNS = ("transfer", "average", "last", "diagonal_gain", "forgetting")

WAYS = listed("text")


def run(way: Way, bed: Bed, made: dict[str, Any], split: str, steps: int, seed: int) -> dict[str, Any]:
    """Learn every task in turn: accuracy of all after each, at the end also after interpolation, costs, and `made`."""
    started, model = time.perf_counter(), way.adapted(copy.deepcopy(bed.model), seed)
    optimizer, rate = way.optimizer(model, steps, fused=True)
    order, draws = (torch.Generator().manual_seed(seed + more) for more in (0, 1000))
    accuracy, seconds, old = [], [], []  # type: ignore[var-annotated]

    def keep(texts: Sequence[Tensor], name: str) -> None:
        batches = [padded([texts[n] for n in batch]) for batch in by_length(texts)]
        optimizer.consolidate(batches, name=name, forward=partial(embed, model), progress=False)

    if way.threshold is not None:
        keep(bed.pool, "the pool")
    for name, task in bed.tasks.items():
        optimizer.state.clear()
        for _ in range(steps):
            begun = time.process_time()
            pairs = drawn(task["training"], BATCH, order) + drawn(old, way.old_rows(BATCH, draws), draws)
            loss = loss_of(model, pairs) + way.distil * (bed.moved(model, BATCH, draws) if way.distil else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            seconds.append(time.process_time() - begun)
        accuracy.append(bed.row(model, split))
        progress(f"  {name}: loss {loss.item():.2f}, mean of all tasks {mean(accuracy[-1]):.1f}")
        if len(accuracy) == len(bed.tasks):
            break  # nothing comes after the last task, so nothing of it is kept
        old += task["training"] if way.replay else []
        if way.threshold is not None:
            keep([text for pair in drawn(task["training"], KEPT_PAIRS, draws) for text in pair], name)
    beside = [text for pair in old for text in pair] + ([*bed.pool, bed.known] if way.distil else [])
    stored = stored_bytes(way, model, optimizer, beside)
    interpolated = interpolation(model, optimizer, bed.model.state_dict())
    back = {} if way.rank else {str(share): bed.row(interpolated(share), split) for share in SHARES}
    costs = {"seconds_of_a_step": median(seconds), "stored_bytes": stored, "seconds": time.perf_counter() - started}
    return {**made, "accuracy": accuracy, "interpolated": back, **costs}


def finished(folder: Path, identity: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The run of this identity in `folder`, or that of `make`, then written there; `ExperimentError` for another."""
    name = re.sub(r"[^a-z0-9.]+", "-", identity["method"].lower()).strip("-")
    file = folder / f"{name}-seed{identity['seed']}.json"
    if not file.is_file():
        progress(f"{identity['method']}, seed {identity['seed']}")
        write_json(file, {**identity, **make()})
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if other := [key for key, value in identity.items() if found.get(key) != value]:
        raise ExperimentError(f"{file} is a run with another value of {', '.join(other)}; give another --output")
    return found


def study(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Run what is missing, then write the table and the figure."""
    started = time.perf_counter()
    bed, split = load_bed(Path(options.model), Path(options.data_root), options.tasks), options.split
    same = dict(tasks=[*bed.tasks], split=split, steps=options.steps, tokens=TOKENS, batch=BATCH, half=HALF)
    folder, seeds, made = Path(options.output), [int(seed) for seed in options.seeds.split(",")], provenance()
    untouched = {"method": "untouched", "seed": 0, **same}
    before = finished(folder, untouched, lambda: {**made, "pretrained": bed.row(bed.model, split)})["pretrained"]
    lines = [("untouched", *(f"{mean(row):.1f}" for row in (before[1:], before, before)), *["-"] * 7)]
    points: dict[str, Any] = {}
    for name, way in chosen(WAYS, options.methods).items():
        about, make = {"method": name, "settings": asdict(way), **same, "pretrained": before}, partial(run, way, bed)
        with quiet():
            runs = [finished(folder, {**about, "seed": n}, partial(make, made, split, options.steps, n)) for n in seeds]
        lines.append(row_of(name, way, runs))
        points[name] = [tuple(mean(whole(run, end) or 0.0 for run in runs) for end in ("forgetting", "diagonal_gain"))]
    back = [f"Last, {share:g} back" for share in SHARES]
    header = ("method", "Transfer", "Average", "Last", "learned", "forgotten", *back, "s a step", "MB", "needs later")
    note = reading("text", **{**same, "tasks": len(bed.tasks)}, seeds=options.seeds, kept=KEPT_PAIRS)
    table = Table("A sentence encoder on one retrieval task after another", header, tuple(lines), note)
    if options.figure:
        draw(points, ("forgotten at the end", "learned: right after training"), options.figure)
    finish("reference.studies.text", arguments, torch.device("cpu"), started, [table], options.output)


def row_of(name: str, way: Way, runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Cells of a method's line."""
    back = [[mean(row) for run in runs if (row := run["interpolated"].get(str(share)))] for share in SHARES]
    needed = "the pool" if way.distil else "earlier pairs" if way.replay else "none"
    seconds, stored = (mean(run[cost] for run in runs) for cost in ("seconds_of_a_step", "stored_bytes"))
    figures = (spread([whole(run, column) for run in runs]) for column in COLUMNS)
    return name, *figures, *map(spread, back), f"{seconds:.2f}", f"{stored / 1e6:.1f}", needed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    found = parser("text", (__doc__ or "").split("\n")[0], seeds="0", steps=30)
    found.add_argument("--data-root", required=True, help="folder with one folder a task, and pool.txt")
    found.add_argument("--model", required=True, help="folder of a sentence encoder of transformers")
    found.add_argument("--tasks", default="", help="names with commas, in this order; all by default")
    return found.parse_args(list(arguments))


def main(arguments: Sequence[str]) -> int:
    """Run the study; 2 and one line where a folder or a setting is wrong."""
    torch.set_num_threads(1)
    return carried_out(lambda: study(parse(arguments), arguments), str)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
