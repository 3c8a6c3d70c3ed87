"""Random models against brute force: what a weight does along rows that were left out leaves the output as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import BATCH, STEPS, TOKENS, WIDTH, Held, RandomModel
from torch import Tensor, nn

from nullspace_optim import NumericalRank
from nullspace_optim.capture.capture import Capture
from nullspace_optim.covariance.accumulator import ParameterStatistics
from nullspace_optim.settings import Settings


def results(model: RandomModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(x)
    leaves = [found.tensor] if isinstance(found, Held) else torch.utils._pytree.tree_leaves(found)
    return torch.cat([leaf.reshape(-1).double() for leaf in (*leaves, *model.cache)])


def free(moment: Tensor) -> Tensor:
    """The projector `[s, s]` onto what no row of a second moment has."""
    values, vectors = torch.linalg.eigh(moment)
    keep = (values <= 1e-14 * values.abs().amax(-1, keepdim=True).clamp_min(1e-30)).double()
    return (vectors * keep[..., None, :]) @ vectors.mT


def observe(model: nn.Module, x: Tensor, rows: Any) -> Capture:
    settings = Settings(rows=rows, policy=NumericalRank())
    observer = Capture(dict(model.named_parameters()), settings, buffers=dict(model.named_buffers()))
    with observer:
        observer.batch(lambda: model(x))
    return observer


def met(seen: ParameterStatistics) -> Any:
    index = None if seen.row_index is None else seen.row_index.tolist()
    return {side: moment.rows.tolist() for side, moment in seen.sides.items()}, index


def move(weight: Tensor, seen: ParameterStatistics, size: float) -> Tensor:
    """A random move of a weight that no row it was captured with can see."""
    step = size * torch.randn_like(weight)
    if seen.layout is not None:
        matrix = seen.layout.to_matrix(step)
        for side, moment in seen.sides.items():
            matrix = matrix @ free(moment.matrix) if side == "right" else free(moment.matrix) @ matrix
        step = seen.layout.from_matrix(matrix, weight.shape)
    if seen.row_index is not None:
        step[seen.row_index] = 0
    return step


def check(model: RandomModel) -> tuple[int, bool]:
    """Move each weight of one model along its rows that were left out, if any, beside the later weights as they are and
    beside others; return for how many weights there were some, and whether there was a note.
    """
    x = torch.randn(BATCH, TOKENS, WIDTH).double()
    every, relevant = observe(model, x, "all").captured, observe(model, x, "relevant")
    weights = dict(model.named_parameters())
    moved = 0
    for place, name in enumerate(relevant.order):
        weight, seen = weights[name], relevant.captured[name]
        if seen.reasons or met(seen) == met(every[name]):
            continue
        moved += 1
        for change in (False, True):
            kept = {other: weights[other].detach().clone() for other in relevant.order[place:]}
            with torch.no_grad():
                for other in relevant.order[place + 1 :] if change else ():
                    weights[other].copy_(torch.randn_like(weights[other]))
                before = results(model, x)
                weight += move(weight, seen, 100.0)
                after = results(model, x)
                for other, value in kept.items():
                    weights[other].copy_(value)
            far = float((after - before).norm()) / max(1.0, float(before.norm()))
            assert far <= 1e-5, (far, name, model.names, relevant.relevance_note)
    return moved, relevant.relevance_note is not None


@pytest.mark.parametrize("step", STEPS)
def test_each_operator_between_a_layer_and_a_selection(step: str) -> None:
    for number, pool in enumerate(("first", "last", "middle")):
        check(RandomModel(number, ["linear", step], pool))


@pytest.mark.parametrize(
    "seeds", [range(50), pytest.param(range(50, 1050), marks=pytest.mark.nightly)], ids=["50 models", "1000 models"]
)
def test_no_move_along_rows_that_were_left_out_reaches_the_output(seeds: range) -> None:
    found = [check(RandomModel(seed)) for seed in seeds]
    dropped = sum(weights > 0 for weights, _ in found)
    assert dropped >= len(found) / 4 and sum(note for _, note in found) >= len(found) / 10
