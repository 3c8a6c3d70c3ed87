"""Which finished task a sample looks like: one Gaussian with a diagonal covariance per task, over gate inputs.

Used where no task is named. Each layer decides for itself and sample by sample, never for a batch as a whole; a sample
that is unlike every task's training data gets none and runs the plain backbone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6


class Prototype(NamedTuple):
    """Gate inputs of one task at one layer: `centre` `[d]`, `spread` `[d]` (variances), `limit` `[]` (distance)."""

    centre: Tensor
    spread: Tensor
    limit: Tensor


def prototype(inputs: Tensor, outlier: float) -> Prototype:
    """Return the prototype of gate inputs `[n, d]`; `limit` is mean + `outlier` standard deviations of their distance.

    With few samples the variances are drawn towards their mean, as if `d / 16` more samples had that variance, so that
    a dimension in which ten prompts agree by chance does not exclude the eleventh.
    """
    inputs = inputs.double()
    n, size = inputs.shape
    centre = inputs.mean(dim=0)
    raw = (inputs - centre).square().sum(dim=0)
    prior = max(1.0, size / 16)
    spread = (raw + prior * raw.mean() / max(n, 1)) / (n + prior) + FLOOR
    distances = _distance(inputs, centre, spread)
    deviation = distances.std(unbiased=False)
    limit = distances.mean() + outlier * torch.maximum(deviation, 0.1 * distances.mean())
    return Prototype(centre.float(), spread.float(), limit.float())


def nearest(inputs: Tensor, centres: Tensor, spreads: Tensor, limits: Tensor) -> Tensor:
    """Return for each gate input `[n, d]` the number of its task, -1 for none: `[n]`, int64.

    The task with the largest Gaussian likelihood among `centres` `[T, d]` and `spreads` `[T, d]`; none where the mean
    squared distance in units of the variance is above the task's limit `[T]`.
    """
    distances = _distance(inputs.unsqueeze(1), centres, spreads)
    best = (distances + spreads.log().mean(dim=-1)).argmin(dim=1)
    inside = distances.gather(1, best.unsqueeze(1)).squeeze(1) <= limits[best]
    return torch.where(inside, best, torch.full_like(best, -1))


def _distance(inputs: Tensor, centres: Tensor, spreads: Tensor) -> Tensor:
    """Return the mean over dimensions of `(x - c)^2 / v`."""
    return ((inputs - centres).square() / spreads).mean(dim=-1)
