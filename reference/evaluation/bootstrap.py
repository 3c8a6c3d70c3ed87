"""Paired bootstrap confidence intervals over test images and seeds.

One replicate draws the test images of each task with replacement, the same for every method, row and seed, and draws
the seeds that both methods were run with. Figures of the accuracy matrix are recomputed from the images that were
classified rightly (`right` in `results.json`). Efron and Tibshirani, 1993, ch. 8 and 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.evaluation.scoring import unpacked

Array = NDArray[np.float64]
REPLICATES = 1000


class Interval(NamedTuple):
    """A difference in points with its 95 % interval, and how many seeds it is over."""

    difference: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        """As in `+1.2 [0.3, 2.0]`."""
        return f"{self.difference:+.1f} [{self.low:.1f}, {self.high:.1f}]"


# Of `metrics`, for matrices `[T, T, b]`: `[b]`.
FIGURES: dict[str, Callable[[Array], Array]] = {
    "transfer": lambda cells: np.mean([cells[:i, i].mean(axis=0) for i in range(1, len(cells))], axis=0),
    "average": lambda cells: cells.mean(axis=(0, 1)),
    "last": lambda cells: cells[-1].mean(axis=0),
}


def resampled(run: dict[str, Any], replicates: int = REPLICATES, seed: int = 0) -> Array:
    """The accuracy matrix in percent on `replicates` draws of the test images, `[T, T, replicates]`.

    The draws depend on `seed` and the number of test images alone. Cells that were not scored are NaN.
    """
    tasks = len(run["tasks"])
    cells = np.full((tasks, tasks, replicates), np.nan)
    for i in range(tasks):
        scored = [j for j, row in enumerate(run["right"][1:]) if row[i]]
        right = np.stack([unpacked(run["right"][1 + j][i]).numpy() for j in scored]).astype(float)
        count = right.shape[1]
        cells[scored, i] = 100.0 * (right @ _draws(seed, i, count, replicates).T) / count
    return cells


@lru_cache(maxsize=32)
def _draws(seed: int, task: int, count: int, replicates: int) -> NDArray[np.int16]:
    """Counts of each of `count` test images in every draw, `[replicates, count]`; cached, the same for every run."""
    return np.random.default_rng([seed, task]).multinomial(count, [1 / count] * count, replicates).astype(np.int16)


def compare(
    runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], figure: str, replicates: int = REPLICATES
) -> Interval | None:
    """Difference of `figure` between `runs` and `others`, over the seeds they share; None where that is unknown."""
    mine, theirs = ({run["seed"]: run for run in group if run.get("right")} for group in (runs, others))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds or any(mine[s]["tasks"] != theirs[s]["tasks"] for s in seeds):
        return None
    of, differences = FIGURES[figure], []
    for seed in seeds:
        differences.append(of(resampled(mine[seed], replicates)) - of(resampled(theirs[seed], replicates)))
    table = np.array(differences)
    drawn = np.random.default_rng(1).integers(len(seeds), size=(len(seeds), replicates))
    means = np.take_along_axis(table, drawn, axis=0).mean(axis=0)
    pairs = [(mine[seed][figure], theirs[seed][figure]) for seed in seeds]
    measured = [one - other for one, other in pairs if None not in (one, other)]
    if not measured or np.isnan(means).any():
        return None
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(measured)), float(low), float(high), len(seeds))
