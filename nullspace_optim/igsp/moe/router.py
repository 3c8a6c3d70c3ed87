"""Routing: the experts of each sample, the prototypes of tasks and the rows of a shared router. Pure functions.

Shapes: gate inputs `[n, d + 1]` (one vector a sample and a constant), a router's weight `[E, d + 1]`, logits `[n, E]`,
a `RoutingChoice` of `k` experts a sample `[n, k]`. Decisions are made sample by sample: no sample's result depends
on its batch.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ...distributed.group import rank, world_size

FLOOR = 1e-6
OUTLIER = 3.0  # standard deviations of the distance from its prototype beyond which a sample belongs to no task


class RoutingChoice(NamedTuple):
    """`experts` `[n, k]`, int64 expert numbers; `gates` `[n, k]`, their weights (0 where an expert is not used)."""

    experts: Tensor
    gates: Tensor


def gate_input(x: Tensor, gate_scale: str = "none") -> Tensor:
    """Return the vector `[n, d + 1]` that decides about each sample of `x` `[n, ..., d]`, in float32 and detached.

    The mean of the tokens (with a causal mask the first token depends on nothing but itself) and the constant
    `sqrt(d)`, so that one expert can be preferred for all inputs even where these have mean zero. With
    ``gate_scale="width"`` all is divided by `sqrt(d)`: a step of Adam then moves a logit by about `sqrt(d)` times the
    rate instead of `d` times. Detached: the router learns, the features do not learn to be routed.
    """
    mean = x.detach().reshape(len(x), -1, x.shape[-1]).mean(dim=1, dtype=torch.float32)
    if gate_scale == "width":
        mean = mean / x.shape[-1] ** 0.5
    return torch.cat([mean, mean.new_full((len(x), 1), constant(x.shape[-1], gate_scale))], dim=1)


def constant(width: int, gate_scale: str) -> float:
    """Return the last entry of every gate input of a layer with `width` inputs."""
    return 1.0 if gate_scale == "width" else width**0.5


def head_start(history: int, candidates: int, deviation: float) -> float:
    """Return the logit at which `candidates` experts begin beside `history` ones that begin at 0.

    With noise of this `deviation` alone, the best candidate and the best historical expert of a sample then have equal
    expectation, however many there are of either (expected maximum of `n` normal numbers after Blom, 1958).
    """
    best = [NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) for n in (history, candidates)]
    return deviation * (best[0] - best[1])


def logits(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return `x W^T` `[n, E]` in float32, under autocast as well."""
    with torch.autocast(inputs.device.type, enabled=False):
        return inputs @ weight.float().mT


def top_k(scores: Tensor, k: int) -> RoutingChoice:
    """Return the `k` experts with the highest scores `[n, E]` (all if there are fewer), softmax over them as gates."""
    best = scores.topk(min(k, scores.shape[1]), dim=-1)
    return RoutingChoice(best.indices, torch.softmax(best.values, dim=-1))


def noise(scores: Tensor, deviation: float, *seed: int) -> Tensor:
    """Return Gaussian noise like `scores` `[n, E]`, the same for the same `seed` numbers.

    A forward that is computed twice (activation checkpointing) and a run that is resumed so draw the same numbers. Of
    several ranks each takes its part of the noise that one process draws for their batches one after the other.
    """
    generator = torch.Generator().manual_seed(hash(seed) & (2**63 - 1))
    count, start = len(scores), rank() * len(scores)
    drawn = torch.randn(world_size() * count, scores.shape[1], generator=generator)[start : start + count]
    return deviation * drawn.to(scores.device, scores.dtype)


def dense(choice: RoutingChoice, experts: int) -> Tensor:
    """Return gates as a matrix `[n, experts]` with zeros for experts that are not chosen."""
    empty = choice.gates.new_zeros(len(choice.gates), experts)
    return empty.scatter(1, choice.experts, choice.gates)


class Prototype(NamedTuple):
    """Gate inputs of one task at one layer: `centre` `[d]`, `spread` `[d]` (variances), `limit` `[]` (distance)."""

    centre: Tensor
    spread: Tensor
    limit: Tensor


def prototype(inputs: Tensor) -> Prototype:
    """Return the prototype of gate inputs `[n, d]`; `limit` is mean + `OUTLIER` standard deviations of their distance.

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
    limit = distances.mean() + OUTLIER * torch.maximum(deviation, 0.1 * distances.mean())
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


MARGIN = 8.0  # logits below the least used expert of any old sample: a gate of exp(-8) = 3e-4 at most
NEW = 1e-4  # share of the mean gate input outside `U` below which a task is taken for an old one


def lowest(inputs: Tensor, weight: Tensor, k: int) -> Tensor:
    """Return the least logit `[]` with which any sample of `inputs` `[n, d + 1]` chooses an expert."""
    scores = logits(inputs, weight)
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
