"""Figures of finished runs (matplotlib, no display needed), drawn from what `results.json` holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

Results = dict[str, Any]

STYLES = [{"color": f"C{n}", "linestyle": line} for line in ("-", "--", ":") for n in range(10)]


def heatmap(results: Results, path: Path | IO[bytes]) -> None:
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


def forgetting_curves(runs: Sequence[Results], path: Path | IO[bytes]) -> None:
    """One panel per task: its accuracy along the sequence, one line per method (mean over seeds)."""
    tasks = runs[0]["tasks"]
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    per_row = max(1, round(1.5 * columns))
    legend_rows = -(-len(methods) // per_row)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3.1 * columns, 2.4 * rows + 0.5 + 0.2 * legend_rows),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for number, (axes, task) in enumerate(zip(grid.flat, tasks)):
        for method, style in zip(methods, cycle(STYLES)):
            matrices = [np.array([r["pretrained"], *r["accuracy"]], dtype=float) for r in runs if r["method"] == method]
            axes.plot(np.mean(matrices, axis=0)[:, number], marker=".", label=method, **style)
        axes.axvline(number + 1, color="grey", linestyle=":", linewidth=1)
        axes.set_title(task, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(axis="y", linewidth=0.4, alpha=0.6)
        axes.tick_params(labelbottom=number + columns >= len(tasks))
    for axes in list(grid.flat)[len(tasks) :]:
        axes.axis("off")
    figure.supxlabel("tasks trained (dotted: the task itself)", fontsize=9)
    figure.supylabel("accuracy [%]", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(per_row, len(labels)), frameon=False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def routing(results: Results, path: Path | IO[bytes]) -> None:
    """One panel per task of an iGSP run: the routing through the history and each candidate over phase 1.

    Thick lines are means over layers, thin ones single layers (of the history, and of the first candidate).
    """
    tasks = results["facts"]["tasks"]
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (3.1 * columns, 2.3 * rows + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    colours = ["#1f6a96", "#c9432f", "#e39a1f", "#7d3c1e", "#b07aa1", "#59a14f"]
    for axes, task in zip(grid.flat, tasks):
        full = [layer["routing"] for layer in task["layers"] if layer["routing"]]
        most = max((len(points[0]) for points in full), default=1)
        shares = np.array([[[*point, *[np.nan] * (most - len(point))] for point in points] for points in full])
        for expert in range(most if len(full) else 0):
            if expert < 2:
                axes.plot(task["routing_steps"], shares[:, :, expert].T, color=colours[expert], lw=0.4, alpha=0.5)
            name = f"candidate {expert}" if expert else "experts of earlier tasks"
            mean = np.nanmean(shares[:, :, expert], axis=0)
            axes.plot(task["routing_steps"], mean, color=colours[expert % len(colours)], lw=2, label=name)
        axes.axvline(task["steps_phase_1"], color="grey", linestyle=":", linewidth=1)
        fate = f"{task['kept']} kept, {task['pruned']} pruned, {task['reused']} reused"
        axes.set_title(f"{task['task']}: {fate}", fontsize=8)
        axes.set_ylim(0, 1.02)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.axis("off")
    figure.supxlabel("step (dotted: end of phase 1)", fontsize=9)
    figure.supylabel("share of routing", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
