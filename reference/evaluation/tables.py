"""Tables of results for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reference.evaluation import metrics

Results = dict[str, Any]
FIGURES = ("transfer", "average", "last", "forgetting", "diagonal_gain")
COLUMNS = ("transfer", "transfer_known", "average", "last", "forgetting", "diagonal_gain")


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


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown; the first row is its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def unknown_tasks(runs: Sequence[Results]) -> str:
    """Names of the tasks that the pretrained model did not know, separated by commas."""
    return ", ".join(dict.fromkeys(task for run in runs for task in run.get("unknown_tasks", [])))


def memory(run: Results) -> float | None:
    """Peak memory in MiB, of the GPU if there is one."""
    found: float | None = run["peak_memory"]["gpu_mib"] or run["peak_memory"]["process_mib"]
    return found


def matrix_table(results: Results) -> str:
    """The accuracy matrix of one run; `[ ]` marks the task that was just trained."""
    tasks = results["tasks"]
    width, first = max(8, *(len(task) + 2 for task in tasks)), len("after ") + max(map(len, tasks))
    rows = [("", [f"{task:>{width}}" for task in tasks])]
    for j, row in enumerate([results["pretrained"], *results["accuracy"]], -1):
        cells = [f"[{_number(value)}]" if i == j else f"{_number(value)} " for i, value in enumerate(row)]
        rows.append(("pretrained" if j < 0 else f"after {tasks[j]}", [f"{cell:>{width}}" for cell in cells]))
    figures = metrics.summary(np.array(results["accuracy"], dtype=float), results["pretrained"])
    return "\n".join(
        [
            f"{results['method']}, seed {results['seed']}: accuracy [%]",
            *(f"{name:<{first}}" + "".join(cells) for name, cells in rows),
            "   ".join(f"{name.replace('_', ' ')} {figures[name]}" for name in FIGURES),
        ]
    )


def summary_table(runs: Sequence[Results], note: str) -> str:
    """One line per method: mean over seeds, with the standard deviation where there are several."""
    rows = [["method", *(name.replace("_", " ") for name in COLUMNS), "seconds"]]
    for method in dict.fromkeys(run["method"] for run in runs):
        of_method = [run for run in runs if run["method"] == method]
        figures = [spread([figure(run, name) for run in of_method]) for name in COLUMNS]
        rows.append([method, *figures, spread([run["seconds"] for run in of_method])])
    pretrained = np.nanmean([run["pretrained"] for run in runs])
    lines = [_aligned(rows), f"before any fine-tuning (pretrained): {pretrained:.1f} % on average"]
    if unknown := unknown_tasks(runs):
        lines.append(f"not known before training (below three times chance): {unknown}")
    return "\n".join([*lines, note] if note else lines)


def figure(run: dict[str, Any], name: str) -> float | None:
    """A figure of one run; None where it is not known or cells of the matrix are missing."""
    return run.get(name) if name == "transfer_known" else whole(run, name)


def cost_table(runs: Sequence[dict[str, Any]]) -> str:
    """Seconds per iteration (and as a multiple of `finetune`'s), of consolidation, and peak memory, by method."""
    times = {
        method: _known([run.get("seconds_per_iteration") for run in runs if run["method"] == method])
        for method in dict.fromkeys(run["method"] for run in runs)
    }
    bare = np.mean(times.get("finetune") or [np.nan])
    rows = [["method", "s / iteration", "x finetune", "s / 1,000 images consolidated", "peak memory [MiB]"]]
    for method, seconds in times.items():
        of_method = [run for run in runs if run["method"] == method]
        spent = _known([run.get("consolidation_seconds_per_1000_images") for run in of_method])
        peak = _known([memory(run) for run in of_method])
        ratio = np.mean(seconds) / bare if seconds else np.nan
        cells = (_figure(seconds, 4), "-" if np.isnan(ratio) else f"{ratio:.2f}", _figure(spent, 2), _figure(peak, 0))
        rows.append([method, *cells])
    return _aligned(rows)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _figure(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" if values else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"
