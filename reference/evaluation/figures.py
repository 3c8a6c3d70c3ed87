"""Figures of finished runs (matplotlib, no display needed), drawn from what `results.json` holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reference.evaluation.tables import Results

STYLES = [{"color": f"C{n}", "linestyle": line} for line in ("-", "--", ":") for n in range(10)]


def heatmap(results: Results, path: Path) -> None:
    """The accuracy matrix of one run under the pretrained row; a white line bounds the cells of trained tasks."""
    cells = np.array([results["pretrained"], *results["accuracy"]], dtype=float)
    tasks = results["tasks"]
    figure, axes = plt.subplots(figsize=(2.2 + 0.75 * len(tasks), 1.8 + 0.45 * len(cells)), layout="constrained")
    image = axes.imshow(cells, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (j, i), value in np.ndenumerate(cells):
        text = "-" if np.isnan(value) else f"{value:.0f}"
        axes.text(i, j, text, ha="center", va="center", fontsize=8, color="white" if value < 60 else "black")
    axes.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right")
    axes.set_yticks(range(len(cells)), ["pretrained", *(f"after {task}" for task in tasks)])
    axes.step([-0.5, *np.arange(len(tasks)) + 0.5], [0.5, *np.arange(len(tasks)) + 0.5], color="white", where="pre")
    axes.set_title(f"{results['method']}, seed {results['seed']}: accuracy on each task")
    figure.colorbar(image, ax=axes, label="accuracy [%]")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def forgetting_curves(runs: Sequence[Results], path: Path) -> None:
    """One panel per task: its accuracy along the sequence, one line per method (mean over seeds)."""
    tasks, methods = runs[0]["tasks"], list(dict.fromkeys(run["method"] for run in runs))
    columns = min(4, len(tasks))
    per_row = max(1, round(1.5 * columns))
    figure, panels = task_panels(len(tasks), 2.4, 0.5 + 0.2 * -(-len(methods) // per_row), sharex=True)
    for number, (axes, task) in enumerate(zip(panels, tasks)):
        for method, style in zip(methods, cycle(STYLES)):
            matrices = [np.array([r["pretrained"], *r["accuracy"]], dtype=float) for r in runs if r["method"] == method]
            axes.plot(np.mean(matrices, axis=0)[:, number], marker=".", label=method, **style)
        axes.axvline(number + 1, color="grey", linestyle=":", linewidth=1)
        axes.set_title(task, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(axis="y", linewidth=0.4, alpha=0.6)
        axes.tick_params(labelbottom=number + columns >= len(tasks))
    finish_panels(figure, panels[0], ("tasks trained (dotted: the task itself)", "accuracy [%]"), path, per_row)


def task_panels(count: int, height: float, extra: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each of `count` tasks, four in a row, `height` inches each and `extra` in all."""
    columns = min(4, count)
    rows = -(-count // columns)
    size = (3.1 * columns, height * rows + extra)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **shared)
    for axes in list(grid.flat)[count:]:
        axes.axis("off")
    return figure, list(grid.flat)[:count]


def finish_panels(figure: Figure, first: Axes, names: tuple[str, str], path: Path, columns: int, **style: Any) -> None:
    """Name the axes, put the legend of the `first` panel on top, in at most `columns`, and write the figure."""
    figure.supxlabel(names[0], fontsize=9)
    figure.supylabel(names[1], fontsize=9)
    handles, labels = first.get_legend_handles_labels()
    columns = max(1, min(columns, len(labels)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, **style)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
