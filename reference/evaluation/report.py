"""Tables for the terminal; `python -m reference.evaluation.report RUNS...`: a page and Markdown tables of runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference.errors import ExperimentError
from reference.evaluation import metrics
from reference.evaluation.page import load_runs, markdown, page, refuse_mixed, spread, whole
from reference.training.tracking import writing

FIGURES = ("transfer", "average", "last", "forgetting", "diagonal_gain")
COLUMNS = ("transfer", "transfer_known", "average", "last", "forgetting", "diagonal_gain")


def matrix_table(results: dict[str, Any]) -> str:
    """The accuracy matrix of one run; `[ ]` marks the task that was just trained."""
    width = max(8, *(len(task) + 2 for task in results["tasks"]))
    first = len("after ") + max(len(task) for task in results["tasks"])
    lines = [f"{results['method']}, seed {results['seed']}: accuracy [%]"]
    lines.append(" " * first + "".join(f"{task:>{width}}" for task in results["tasks"]))
    lines.append(
        f"{'pretrained':<{first}}" + "".join(f"{_number(value):>{width - 1}} " for value in results["pretrained"])
    )
    for j, row in enumerate(results["accuracy"]):
        cells = (f"[{_number(value)}]" if i == j else f"{_number(value)} " for i, value in enumerate(row))
        lines.append(f"after {results['tasks'][j]:<{first - 6}}" + "".join(f"{cell:>{width}}" for cell in cells))
    figures = metrics.summary(np.array(results["accuracy"], dtype=float), results["pretrained"])
    lines.append("   ".join(f"{name.replace('_', ' ')} {figures[name]}" for name in FIGURES))
    return "\n".join(lines)


def summary_table(runs: Sequence[dict[str, Any]], note: str) -> str:
    """One line per method: mean over seeds, with the standard deviation where there are several."""
    headings = ["method", *(name.replace("_", " ") for name in COLUMNS), "seconds"]
    rows = [headings]
    for method in dict.fromkeys(run["method"] for run in runs):
        of_method = [run for run in runs if run["method"] == method]
        figures = [spread([figure(run, name) for run in of_method]) for name in COLUMNS]
        rows.append([method, *figures, spread([run["seconds"] for run in of_method])])
    lines = _aligned(rows).split("\n")
    pretrained = np.nanmean([run["pretrained"] for run in runs])
    lines.append(f"before any fine-tuning (pretrained): {pretrained:.1f} % on average")
    unknown = list(dict.fromkeys(task for run in runs for task in run.get("unknown_tasks", [])))
    if unknown:
        lines.append(f"not known before training (below three times chance): {', '.join(unknown)}")
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
        memory = _known([run["peak_memory"]["gpu_mib"] or run["peak_memory"]["process_mib"] for run in of_method])
        ratio = np.mean(seconds) / bare if seconds else np.nan
        cells = (_figure(seconds, 4), "-" if np.isnan(ratio) else f"{ratio:.2f}", _figure(spent, 2), _figure(memory, 0))
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `report.html` (self-contained) and `report.md` of all runs; returns the exit status."""
    options = parse(arguments)
    try:
        runs = load_runs(options.runs)
        refuse_mixed(runs)
        text = markdown(runs, options.against)
        folder = Path(options.output)
        for name, content in (("report.html", page(runs, options.against)), ("report.md", text)):
            with writing(folder / name) as draft:
                draft.parent.mkdir(parents=True, exist_ok=True)
                draft.write_text(content, encoding="utf-8")
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text + f"\n{folder / 'report.html'}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.evaluation.report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", help="folders of finished runs, or their results.json")
    parser.add_argument("--against", default="finetune", help="method that differences are taken to")
    parser.add_argument("--output", default=".", help="folder for report.html and report.md (default: here)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
