"""The figure of README.md: what earlier tasks lose while later ones are trained, one line a method.

    python -m reference.evaluation.headline

It is drawn from the committed runs of eleven tasks of real images, into docs/figures/forgetting.png.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).resolve().parents[1]
RUNS, FIGURE = HERE / "results" / "mini", HERE.parent / "docs" / "figures" / "forgetting.png"
METHODS = {
    "nullspace-reference": ("this library", "#1f6a96"),
    "gradient-reference": ("gradient projected before AdamW", "#e39a1f"),
    "finetune": ("plain AdamW", "#c9432f"),
}


def lost(accuracy: np.ndarray) -> np.ndarray:
    """Change of earlier tasks, in points, after each task but the first: `[tasks, tasks]` -> `[tasks - 1]`.

    Entry `t - 1` is the mean over tasks `j < t` of the accuracy on `j` after task `t`, less that right after task `j`.
    """
    learned = np.diag(accuracy)
    return np.array([(accuracy[t, :t] - learned[:t]).mean() for t in range(1, len(accuracy))])


def matrices(folder: Path, method: str) -> np.ndarray:
    """Accuracy matrices `[seeds, tasks, tasks]` of the runs of `method` in `folder`.

    Raises:
        FileNotFoundError: the folder holds no run of this method.
    """
    files = sorted(folder.glob(f"{method}-seed*/results.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no run of '{method}'; make one with reference.run --methods {method}")
    return np.array([json.loads(path.read_text(encoding="utf-8"))["accuracy"] for path in files], dtype=float)


def draw(folder: Path, path: Path) -> None:
    """Draw the methods of `METHODS`: mean over seeds, shaded by their standard deviation."""
    figure, axes = plt.subplots(figsize=(7.6, 3.3), layout="constrained")
    for method, (name, colour) in METHODS.items():
        curves = np.array([[0.0, *lost(matrix)] for matrix in matrices(folder, method)])
        mean, spread = curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(curves) - 1))
        tasks = np.arange(1, len(mean) + 1)
        axes.fill_between(tasks, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes.plot(tasks, mean, color=colour, linewidth=2.2)
        end = f"{name}: {mean[-1]:.1f}".replace("-", "\N{MINUS SIGN}")
        axes.annotate(end, (tasks[-1], mean[-1]), (8, 0), textcoords="offset points", color=colour, va="center")
    axes.axhline(0, color="#9a9ca5", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(1, len(mean))
    axes.set_xlabel("tasks trained so far, one after the other")
    axes.set_ylabel("accuracy on earlier tasks,\nchange since each was trained [points]")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(RUNS, FIGURE)
