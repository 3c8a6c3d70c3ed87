"""Tables of results for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from reference.evaluation import metrics

Results = dict[str, Any]
FIGURES = ("transfer", "average", "last", "forgetting", "diagonal_gain")


def whole(run: Results, figure: str) -> float | None:
    """A figure of `metrics.summary`, None where cells are missing: joint training has the last row alone."""
    found = metrics.summary(np.array(run["accuracy"], dtype=float), run["pretrained"])[figure]
    return found.value if found.measured == found.cells else None


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """`mean ± deviation` with `digits` decimals; `-` where nothing was measured."""
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    if not known:
        return "-"
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"


def reading(name: str, **values: Any) -> str:
    """What the reader of a table must know, from `readings.yaml`, with `values` in their places."""
    listed = yaml.safe_load(Path(__file__).with_name("readings.yaml").read_text(encoding="utf-8"))
    return str(listed[name]).format(**values)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown; the first row is its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def memory(run: Results) -> float | None:
    """Peak memory in MiB, of the GPU if there is one."""
    found: float | None = run["peak_memory"]["gpu_mib"] or run["peak_memory"]["process_mib"]
    return found


def gap(run: Results, figure: str, row: int = -1) -> float | None:
    """Mean over tasks of one of `gap_figures`, after the last task or (`row` 0) before training."""
    found = [cell[figure] for cell in (run.get("gaps") or [[]])[row] if cell and figure in cell]
    return float(np.mean(found)) if found else None


def robust_share(run: Results) -> float | None:
    """Share of the pretrained accuracy under the attack of half a grey level that is left, mean over tasks."""
    moments = (run.get("robust", {}).get(moment, {}).values() for moment in ("before", "after"))
    before, after = (sum(row[2] for row in rows) for rows in moments)
    return after / before if before else None


def matrix_table(results: Results) -> str:
    """The accuracy matrix of one run; `[ ]` marks the task that was just trained."""
    tasks = results["tasks"]
    width, first = max(8, *(len(task) + 2 for task in tasks)), len("after ") + max(map(len, tasks))
    rows = [("", [f"{task:>{width}}" for task in tasks])]
    for j, row in enumerate([results["pretrained"], *results["accuracy"]], -1):
        cells = [f"[{_number(value)}]" if i == j else f"{_number(value)} " for i, value in enumerate(row)]
        rows.append(("pretrained" if j < 0 else f"after {tasks[j]}", [f"{cell:>{width}}" for cell in cells]))
    figures = metrics.summary(np.array(results["accuracy"], dtype=float), results["pretrained"])
    lines = [f"{name:<{first}}" + "".join(cells) for name, cells in rows]
    means = "   ".join(f"{name.replace('_', ' ')} {figures[name]}" for name in FIGURES)
    return "\n".join([f"{results['method']}, seed {results['seed']}: accuracy [%]", *lines, means])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal; the first row is its heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"
