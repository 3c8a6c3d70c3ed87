"""Summary of a grid: one Markdown table, one figure of stability against plasticity, and the settings to take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import pyplot as plt

from reference.errors import ExperimentError
from reference.evaluation.tables import markdown_table, reading, spread
from reference.studies.grids import CONTROLS, OURS

Row = list[dict[str, Any]]  # one cell: figures of every seed

COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float | None], int]] = {
    "Transfer": (lambda run: run["transfer"], 1),
    "Average": (lambda run: run["average"], 1),
    "Last": (lambda run: run["last"], 1),
    "old tasks kept": (lambda run: run["backward_transfer"], 1),
    "learned": (lambda run: run["diagonal_gain"], 1),
    "loss": (lambda run: run["loss"], 3),
    "free directions [%]": (lambda run: None if run["free_share"] is None else 100 * run["free_share"], 0),
    "MB of bases": (lambda run: None if run["bytes"] is None else run["bytes"] / 1e6, 1),
    "seconds": (lambda run: run["seconds"], 0),
}
COLOURS = ("#1b1f24", "#c9432f", "#1f6a96", "#2f9c74", "#e39a1f", "#7d3c9a", "#8c6d46", "#7a7c85")


def read_cells(folder: Path, grid: str) -> list[Row]:
    """The cells of `grid` that are finished below `folder`, each with all its seeds.

    They come in the order of the grid; where the second factor is a number, its values ascend, also those that were
    added later.

    Raises:
        ExperimentError: there are none, or they were not made on the same tasks and split.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    found = sorted((run for run in found if run["grid"] == grid), key=lambda run: run["number"])
    changes = list(dict.fromkeys(_varied(run)[0] for run in found))
    found.sort(key=lambda run: (changes.index(_varied(run)[0]), _number(_varied(run)[1], run["number"])))
    if not found:
        raise ExperimentError(f"no finished cell of {grid} below {folder}; run the grid first")
    if len({(tuple(run["tasks"]), run["split"]) for run in found}) > 1:
        raise ExperimentError(f"the cells below {folder} are of different tasks or splits; give each its own --output")
    names = dict.fromkeys(run["cell"] for run in found)
    return [[run for run in found if run["cell"] == name] for name in names]


def _varied(run: dict[str, Any]) -> tuple[str, str]:
    """The values of a cell's first two factors; of grids with one change at a time, what is changed and to what."""
    changed, to = list(run["factors"].values())[:2]
    return changed, to


def _number(value: str, otherwise: int) -> float:
    """`value` as a number, `otherwise` if it is none."""
    try:
        return float(value)
    except ValueError:
        return otherwise


def markdown(rows: Sequence[Row]) -> str:
    """One line per cell, with what the reader must know below."""
    first = rows[0][0]
    head = [*first["factors"], "method", "seeds", *COLUMNS]
    table = [head]
    for row in rows:
        cells = [spread([read(run) for run in row], digits) for read, digits in COLUMNS.values()]
        table.append([*row[0]["factors"].values(), row[0]["method"], str(len(row)), *cells])
    machine = first["machine"]
    lines = [
        markdown_table(table),
        "",
        f"Tasks {', '.join(first['tasks'])}; {first['split']} split; pretrained {np.mean(first['pretrained']):.1f} on "
        f"average, {np.mean(first['pretrained'][1:]):.1f} without the first task (a Transfer that loses nothing).",
        reading("grid"),
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {first['torch']}, "
        f"{first['date']}.",
    ]
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Stability against plasticity: Transfer and old accuracy kept over what was learned.

    The first factor by colour, as a line with the values of the second beside it.
    """
    names = list(rows[0][0]["factors"])[:2]
    plot, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharex=True)
    for axes, key in zip(panels, ("transfer", "backward_transfer")):
        for number, colour in enumerate(dict.fromkeys(row[0]["factors"][names[0]] for row in rows)):
            of_colour = [row for row in rows if row[0]["factors"][names[0]] == colour]
            found = [(_mean(row, "diagonal_gain"), _mean(row, key), row[0]["factors"][names[1]]) for row in of_colour]
            shade, label = COLOURS[number % len(COLOURS)], "ours, as set" if colour in ("nothing", "-") else colour
            axes.plot([x for x, _, _ in found], [y for _, y, _ in found], color=shade, lw=0.8, alpha=0.6)
            axes.scatter([], [], color=shade, label=label)
            for x, y, value in found:
                axes.scatter(x, y, color=shade, zorder=3, **({"marker": "*", "s": 90} if value == "-" else {"s": 30}))
                axes.annotate(value.strip("-"), (x, y), (4, 3), textcoords="offset points", fontsize=7)
        axes.axhline(np.mean(rows[0][0]["pretrained"][1:]) if key == "transfer" else 0, color="grey", ls=":", lw=1)
        axes.set(xlabel="learned: right after training minus pretrained [points]")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("Transfer [%] (dotted: pretrained)")
    panels[1].set_ylabel("old tasks: end minus right after training [points]")
    plot.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False, fontsize=8)
    plot.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(plot)


def chosen(rows: Sequence[Row], figure: str) -> str:
    """The settings of each method whose mean `figure` is highest, as `of_method` takes them.

    `matched-plasticity` is the exception: the share with which it learns as much as the best cell of our method.
    """
    best: dict[str, Row] = {}
    for row in sorted(reversed(rows), key=lambda row: _mean(row, figure)):  # the first of equals comes last
        best[row[0]["method"]] = row
    twin = CONTROLS["matched_share"]
    if twin in best and OURS in best:
        target = _mean(best[OURS], "diagonal_gain")
        of_twin = [row for row in rows if row[0]["method"] == twin]
        best[twin] = min(of_twin, key=lambda row: abs(_mean(row, "diagonal_gain") - target))
    settings = {method: row[0]["settings"] for method, row in best.items() if row[0]["settings"]}
    return yaml.safe_dump({"of_method": settings}, sort_keys=False)


def _mean(row: Row, figure: str) -> float:
    values = [run[figure] for run in row if run[figure] is not None]
    return float(np.mean(values)) if values else float("-inf")
