"""One router for all tasks that goes on routing old ones as it did: where rows of new experts begin.

What the router saw in finished tasks spans `U` `[d + 1, j]`; `W U` is kept by the kernel of null-space protection. So
a new row keeps for old inputs the logit at which it begins, and that must lie below those of the experts they use; for
the inputs of its own task it must begin level with them, or it would never be chosen and never learn. Both hold for a
row that is a low constant plus a multiple of what the new inputs have outside `U`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import router

MARGIN = 8.0  # logits below the least used expert of any old sample: a gate of exp(-8) = 3e-4 at most
NEW = 1e-4  # share of the mean gate input outside `U` below which a task is taken for an old one


def lowest(inputs: Tensor, weight: Tensor, k: int) -> Tensor:
    """Return the least logit `[]` with which any sample of `inputs` `[n, d + 1]` chooses an expert."""
    scores = router.logits(inputs, weight)
    return scores.topk(min(k, scores.shape[1]), dim=-1).values.amin()


def low_row(floor: Tensor, width: int, constant: float) -> Tensor:
    """Return a row `[width]` whose logit is `MARGIN` below `floor` for all inputs."""
    row = floor.new_zeros(width)
    row[-1] = (floor - MARGIN) / constant
    return row


def level(weight: Tensor, candidates: int, basis: Tensor, mean: Tensor) -> Tensor:
    """Return the router `weight` `[E, d + 1]` with its last rows, the `candidates`, level with the best old one.

    At the mean gate input `mean` `[d + 1]`. They move along its part outside `basis` `[d + 1, j]`, so `W U` stays.
    Without such a part nothing moves: old experts serve a task that looks like old ones.
    """
    outside = mean.double() - basis.double() @ (basis.double().mT @ mean.double())
    old = len(weight) - candidates
    if not old or not candidates or float(outside.square().sum()) < NEW * float(mean.square().sum()):
        return weight
    scores = weight.double() @ mean.double()
    lift = (scores[:old].max() - scores[old:]) / (outside @ mean.double())
    return torch.cat([weight[:old], (weight[old:].double() + lift[:, None] * outside).to(weight.dtype)])
