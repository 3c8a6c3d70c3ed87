"""What a table of runs has: its columns, one row per method, and the remarks below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import nan

import numpy as np

from reference.evaluation.tables import Results, gap, memory, reading, robust_share, spread, whole
from reference.methods import METHODS


def _of_pool(run: Results, figure: str) -> float | None:
    value: float | None = run.get("pool", {}).get("after", {}).get(figure)
    return value


ACCURACY: dict[str, Callable[[Results], float | None]] = {
    "Transfer": partial(whole, figure="transfer"),
    "Transfer, known tasks": lambda run: run.get("transfer_known"),
    "Average": partial(whole, figure="average"),
    "Last": partial(whole, figure="last"),
    "Preserve": partial(whole, figure="preserve"),
    "forgetting": partial(whole, figure="forgetting"),
    "learned": partial(whole, figure="diagonal_gain"),
}
REST: dict[str, tuple[Callable[[Results], float | None], int]] = {  # with the number of decimals
    "image → text @1": (partial(_of_pool, figure="image_to_text_at_1"), 1),
    "text → image @1": (partial(_of_pool, figure="text_to_image_at_1"), 1),
    "modality gap": (partial(_of_pool, figure="modality_gap"), 3),
    "positive cosine": (partial(gap, figure="positive_cosine"), 3),
    "negative cosine": (partial(gap, figure="negative_cosine"), 3),
    "gap on tasks": (partial(gap, figure="modality_gap"), 3),
    "nHSIC with labels": (partial(gap, figure="nhsic"), 3),
    "robust, share kept": (robust_share, 3),
    "patch grouping": (lambda run: run.get("dense", {}).get("after", {}).get("grouping"), 3),
    "trained parameters [M]": (lambda run: max(run.get("trained_parameters") or [nan]) / 1e6, 1),
    "s / iteration": (lambda run: run.get("seconds_per_iteration"), 4),
    "s / 1,000 images consolidated": (lambda run: run.get("consolidation_seconds_per_1000_images"), 1),
    "seconds": (lambda run: run["seconds"], 0),
    "memory [MiB]": (memory, 0),
}


def by_method(runs: Sequence[Results]) -> dict[str, list[Results]]:
    """Runs grouped by method, in the harness's order; methods it does not know last, in order of appearance."""
    found = dict.fromkeys(run["method"] for run in runs)
    names = [name for name in METHODS if name in found] + [name for name in found if name not in METHODS]
    return {name: [run for run in runs if run["method"] == name] for name in names}


def tables(runs: Sequence[Results]) -> tuple[list[list[str]], list[list[str]]]:
    """Accuracy, and what else was measured: heading, one row per method."""
    accuracy, rest = [["method", "seeds", *ACCURACY]], [["method", *REST]]
    for name, group in by_method(runs).items():
        cells = [spread([read(run) for run in group]) for read in ACCURACY.values()]
        accuracy.append([name, str(len(group)), *cells])
        rest.append([name, *(spread([read(run) for run in group], digits) for read, digits in REST.values())])
    return accuracy, rest


def notes(runs: Sequence[Results]) -> list[str]:
    """Remarks below the tables."""
    found = [f"Pretrained, before any training: {np.nanmean([run['pretrained'] for run in runs]):.1f} on average."]
    if unknown := list(dict.fromkeys(task for run in runs for task in run.get("unknown_tasks", []))):
        found.append(f"Not known before training (below three times chance): {', '.join(unknown)}.")
    before = [run["pool"]["before"] for run in runs if run.get("pool", {}).get("before")]
    if before:
        first = before[0]
        found.append(
            f"Before training: image → text @1 {first['image_to_text_at_1']:.1f}, text → image @1 "
            f"{first['text_to_image_at_1']:.1f}, modality gap {first['modality_gap']:.3f}."
        )
    found += list(dict.fromkeys(note for run in runs if (note := run["config"].get("note"))))
    return [*found, reading("report")]
