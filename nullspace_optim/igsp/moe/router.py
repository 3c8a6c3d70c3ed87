"""Routing: the experts of each sample and the rows of a shared router. Pure functions.

Shapes: gate inputs `[n, d + 1]` (`d` numbers a sample, at most `GATE`, and a constant), a router's weight `[E, d + 1]`,
logits `[n, E]`, a `RoutingChoice` of `k` experts a sample `[n, k]`. Decisions are made sample by sample: no sample's
result depends on its batch.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ...distributed.group import rank, world_size

FLOOR = 1e-6
GATE = 32  # numbers of a layer's input that its router reads


class RoutingChoice(NamedTuple):
    """`experts` `[n, k]`, int64 expert numbers; `gates` `[n, k]`, their weights (0 where an expert is not used)."""

    experts: Tensor
    gates: Tensor


def projection(width: int, number: int) -> Tensor | None:
    """Return a seeded projection `[width, GATE]` for the `number`-th layer, None for narrow ones.

    Lengths grow by `sqrt(width / GATE)`: a step of Adam then moves a logit as far as if the router read all numbers.
    """
    if width <= GATE:
        return None
    draw = torch.randn(width, GATE, generator=torch.Generator().manual_seed(number))
    return draw * math.sqrt(width) / GATE


def tokens_of(x: Tensor) -> Tensor:
    """Return samples `[n, ..., d]` as `[n, tokens, d]`."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def gate_input(x: Tensor, gate_scale: str = "none", draw: Tensor | None = None) -> Tensor:
    """Return the vector `[n, d + 1]` that decides about each sample of `x` `[n, ..., d]`, in float32 and detached.

    The mean of the tokens (with a causal mask the first token depends on nothing but itself), projected by `draw`
    `[width, d]` so that routers of wide layers stay small, and the constant `sqrt(d)`, so that one expert can be
    preferred for all inputs even where these have mean zero. With ``gate_scale="width"`` all is divided by `sqrt(d)`: a
    step of Adam then moves a logit by about `sqrt(d)` times the rate instead of `d` times. Detached: the router learns,
    the features do not learn to be routed.
    """
    mean = tokens_of(x.detach()).mean(dim=1, dtype=torch.float32)
    if draw is not None:
        with torch.autocast(x.device.type, enabled=False):
            mean = mean @ draw.float()
    width = mean.shape[-1]
    if gate_scale == "width":
        mean = mean / width**0.5
    return torch.cat([mean, mean.new_full((len(x), 1), constant(width, gate_scale))], dim=1)


def constant(width: int, gate_scale: str) -> float:
    """Return the last entry of every gate input with `width` others."""
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
