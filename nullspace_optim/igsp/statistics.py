"""Routing statistics of all layers, of all ranks together: every rank then decides alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.collectives import sum_over_ranks
from ..distributed.fsdp import all_gather_uneven
from ..distributed.group import world_size
from .moe.layer import ExpertLayer


def absorb_step(layers: Sequence[ExpertLayer]) -> None:
    """Turn what all ranks noted since the last step into one step of every layer's running means."""
    watches = [layer.watch for layer in layers]
    like = [watch.flow.new_empty(2 * len(watch.flow) + 1 + len(watch.centre)) for watch in watches]
    for watch, total in zip(watches, sum_over_ranks([watch.forget() for watch in watches], like), strict=True):
        watch.absorb(total)


def judge_windows(layers: Sequence[ExpertLayer], step: int) -> None:
    """End a window of every layer at `step`; samples of all ranks count alike in the agreement of two routers."""
    found = _agreements(layers) if world_size() > 1 else [None] * len(layers)
    for layer, jaccard in zip(layers, found, strict=True):
        layer.watch.judge(layer.router, step, jaccard)


def _agreements(layers: Sequence[ExpertLayer]) -> list[Tensor | None]:
    """Return the Jaccard index `[]` of every layer, a mean over the samples of all ranks' last forwards."""
    sums = []
    for layer in layers:
        mean, last = layer.watch.jaccard(layer.router), layer.watch.last
        sums.append(None if mean is None or last is None else torch.stack([mean, mean.new_ones(())]) * len(last))
    whole = sum_over_ranks(sums, [layer.watch.flow.new_empty(2) for layer in layers])
    return [None if value is None else value[0] / value[1] for value in whole]


def collect_inputs(layers: Sequence[ExpertLayer]) -> list[Tensor]:
    """Return for every layer the gate inputs `[n, d + 1]` that all ranks have collected, in the order of the ranks."""
    return _gathered([layer.collect() for layer in layers])


def collect_features(layers: Sequence[ExpertLayer]) -> list[Tensor]:
    """Return the features `[n, p]` that the towers of all ranks have collected, `[0, 0]` for a layer that ends none."""
    towers = [layer.recognition for layer in layers]
    return _gathered(
        [layer.router.new_zeros(0, 0) if tower is None else tower.collect() for layer, tower in zip(layers, towers)]
    )


def sum_moments(layers: Sequence[ExpertLayer]) -> list[Tensor | None]:
    """Return for every layer the second moment that all ranks have collected (see `ExpertLayer.moment`)."""
    sizes = [layer.options.width + (layer.options.kind == "bottleneck") for layer in layers]
    like = [layer.router.new_empty(len(layer.fresh), size, size) for layer, size in zip(layers, sizes)]
    return sum_over_ranks([layer.moment for layer in layers], like)


def _gathered(collected: list[Tensor]) -> list[Tensor]:
    return collected if world_size() == 1 else [all_gather_uneven(rows, 0, None) for rows in collected]
