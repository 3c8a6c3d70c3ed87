"""Numbers of continual learning, from an accuracy matrix.

Convention: `accuracy[j, i]` is the accuracy on task i after training task j, both 0-based in training order, `[T, T]`,
in whatever unit (percent here). The row of the pretrained model is not part of the matrix. A cell that was not measured
is NaN: means run over the cells that exist, and `Mean` says how many there were.
Definitions: ZSCL (Zheng et al., 2023; its `results.ipynb`) for Transfer, Average and Last; Chaudhry et al., 2018, for
forgetting (their maximum begins at the first task, ours at the task itself: what was never trained is not forgotten);
Lopez-Paz and Ranzato, 2017, for backward transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Mean(NamedTuple):
    """A mean and how many of its cells were measured; `value` is NaN when none was."""

    value: float
    measured: int
    cells: int

    def __str__(self) -> str:
        """One decimal, `-` for NaN; the number of cells only where some are missing."""
        text = "-" if np.isnan(self.value) else f"{self.value:.1f}"
        return text if self.measured == self.cells else f"{text} ({self.measured}/{self.cells} cells)"


def transfer(accuracy: Matrix) -> Mean:
    """Accuracy on tasks that are not yet trained.

    Cells: the strict upper triangle, `a[j, i]` with j < i, i = 1 .. T-1. First the mean of each column,
    `Transfer_i = 1/i sum_{j<i} a[j, i]`, then the mean of the T-1 column means (not the mean over the triangle). Task 0
    has no such cell and does not enter.
    """
    return _above(accuracy, range(1, len(accuracy)))


def average(accuracy: Matrix) -> Mean:
    """Mean of all T x T cells: `1/T^2 sum_{j,i} a[j, i]`; row 0 is the one after the first task."""
    return _mean(accuracy)


def last(accuracy: Matrix) -> Mean:
    """Mean of the last row, `1/T sum_i a[T-1, i]`: all tasks after the whole sequence."""
    return _mean(accuracy[-1])


def forgetting(accuracy: Matrix) -> Mean:
    """Fall of each task from its best: mean over i < T-1 of `max_{i <= j < T-1} a[j, i] - a[T-1, i]`.

    Cells counted are the T-1 differences; one is missing when the last row's cell or all of the column's are.
    """
    tasks = len(accuracy)
    best = [np.nanmax(c) if np.isfinite(c).any() else np.nan for c in (accuracy[i:-1, i] for i in range(tasks - 1))]
    return _mean(np.array(best) - accuracy[-1, :-1])


def backward_transfer(accuracy: Matrix) -> Mean:
    """Change of earlier tasks by later ones: mean over i < T-1 of `a[T-1, i] - a[i, i]` (negative: forgetting)."""
    return _mean(accuracy[-1, :-1] - np.diag(accuracy)[:-1])


def preserve(accuracy: Matrix) -> Mean:
    """Accuracy on trained tasks later: mean over the strict lower triangle, `a[j, i]`, j > i (LEBA's "Preserve")."""
    return _mean(accuracy[np.tril_indices(len(accuracy), -1)])


def transfer_known(accuracy: Matrix, pretrained: Sequence[float], chance: Sequence[float]) -> Mean:
    """`transfer` over the columns i >= 1 of tasks that the pretrained model knew: at least three times chance."""
    return _above(accuracy, [i for i in known(pretrained, chance) if i > 0])


def known(pretrained: Sequence[float], chance: Sequence[float]) -> list[int]:
    """Numbers of the tasks whose accuracy before any training is at least three times chance (both in percent)."""
    return [i for i, (accuracy, level) in enumerate(zip(pretrained, chance)) if accuracy >= 3 * level]


def diagonal_gain(accuracy: Matrix, pretrained: Sequence[float]) -> Mean:
    """Gain of a task by its training: mean over i of `a[i, i] - pretrained[i]`."""
    return _mean(np.diag(accuracy) - np.asarray(pretrained, dtype=np.float64))


def summary(accuracy: Matrix, pretrained: Sequence[float]) -> dict[str, Mean]:
    """All figures of an accuracy matrix by name.

    Raises:
        ValueError: the matrix is not square, is empty, or `pretrained` has another length.
    """
    if accuracy.shape != (len(pretrained), len(pretrained)) or not len(accuracy):
        raise ValueError(f"accuracy must be [T, T] and pretrained [T]; found {accuracy.shape} and {len(pretrained)}")
    figures = {f.__name__: f(accuracy) for f in (transfer, average, last, preserve, forgetting, backward_transfer)}
    return {**figures, "diagonal_gain": diagonal_gain(accuracy, pretrained)}


def _above(accuracy: Matrix, columns: Sequence[int]) -> Mean:
    """Mean of the means of `columns` above the diagonal."""
    means = [_mean(accuracy[:i, i]) for i in columns]
    return Mean(_mean(np.array([m.value for m in means])).value, sum(m.measured for m in means), sum(columns))


def _mean(cells: Matrix) -> Mean:
    found = cells[np.isfinite(cells)]
    return Mean(float(found.mean()) if found.size else float("nan"), int(found.size), int(cells.size))
