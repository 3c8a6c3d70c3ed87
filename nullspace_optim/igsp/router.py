"""Routing: which experts a sample uses, and whether a router has settled. Pure functions and one small counter.

Shapes: gate inputs `[n, d + 1]` (one vector a sample and a constant), a router's weight `[E, d + 1]`, logits `[n, E]`,
a `Choice` of `k` experts a sample `[n, k]`. Decisions are made sample by sample: no sample's result depends
on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6


class Choice(NamedTuple):
    """`experts` `[n, k]`, int64 expert numbers; `gates` `[n, k]`, their weights (0 where an expert is not used)."""

    experts: Tensor
    gates: Tensor


def gate_input(x: Tensor, gate: str, gate_scale: str = "none") -> Tensor:
    """Return the vector `[n, d + 1]` that decides about each sample of `x` `[n, ..., d]`, in float32 and detached.

    ``"mean"`` of the tokens, or the ``"first"`` token, and the constant `sqrt(d)`, so that one expert can be preferred
    for all inputs even where these have mean zero. With ``gate_scale="width"`` all is divided by `sqrt(d)`: a step
    of Adam then moves a logit by about `sqrt(d)` times the rate instead of `d` times. Detached: the router learns, the
    features do not learn to be routed.
    """
    tokens = x.detach().reshape(len(x), -1, x.shape[-1])
    chosen = (tokens[:, 0] if gate == "first" else tokens.mean(dim=1, dtype=torch.float32)).float()
    if gate_scale == "width":
        chosen = chosen / x.shape[-1] ** 0.5
    return torch.cat([chosen, chosen.new_full((len(x), 1), constant(x.shape[-1], gate_scale))], dim=1)


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
    """Return `x W^T` `[n, E]` in float32, whatever autocast says."""
    with torch.autocast(inputs.device.type, enabled=False):
        return inputs @ weight.float().mT


def top_k(scores: Tensor, k: int) -> Choice:
    """Return the `k` experts with the highest scores `[n, E]` (all if there are fewer), softmax over them as gates."""
    best = scores.topk(min(k, scores.shape[1]), dim=-1)
    return Choice(best.indices, torch.softmax(best.values, dim=-1))


def noise(scores: Tensor, deviation: float, *seed: int) -> Tensor:
    """Return Gaussian noise like `scores` `[n, E]`, the same for the same `seed` numbers.

    A forward that is computed twice (activation checkpointing) and a run that is resumed so draw the same numbers.
    """
    generator = torch.Generator().manual_seed(hash(seed) & (2**63 - 1))
    return deviation * torch.randn(scores.shape, generator=generator).to(scores.device, scores.dtype)


def dense(choice: Choice, experts: int) -> Tensor:
    """Return gates as a matrix `[n, experts]` with zeros for experts that are not chosen."""
    empty = choice.gates.new_zeros(len(choice.gates), experts)
    return empty.scatter(1, choice.experts, choice.gates)


def agreement(now: Tensor, then: Tensor, k: int) -> Tensor:
    """Return the mean Jaccard index of the top-k sets under two sets of scores `[n, E]` of the same samples."""
    k = min(k, now.shape[1])
    sets = [torch.zeros_like(s, dtype=torch.bool).scatter(1, s.topk(k, dim=-1).indices, True) for s in (now, then)]
    return ((sets[0] & sets[1]).sum(dim=1) / (sets[0] | sets[1]).sum(dim=1)).mean()


def divergence(now: Tensor, then: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence `sum_e p_e log(p_e / q_e)` of two distributions `[E]`, in nats."""
    p, q = ((t + FLOOR) / (t + FLOOR).sum() for t in (now, then))
    return (p * (p / q).log()).sum()


def chance_divergence(experts: int, samples: float) -> float:
    """Return `(E - 1) / n`: how far the use of `experts` in two windows of `samples` differs by chance alone, in nats.

    That is the expected Kullback-Leibler divergence of two multinomial samples, to first order; softer probabilities
    differ less.
    """
    return (experts - 1) / samples


@dataclass
class Convergence:
    """Whether one layer's router has settled: `at` is the step, None before.

    Settled when for `patience` windows in a row the top-k sets agree (Jaccard index) and the mean probabilities stay
    (KL divergence to the window before). `curve` holds (step, Jaccard, KL) of every window that could be compared.
    """

    streak: int = 0
    at: int | None = None
    curve: tuple[tuple[int, float, float], ...] = ()

    def judge(self, step: int, jaccard: float, kl: float, least: float, most: float, patience: int) -> None:
        """Take one more window into account: Jaccard index at least `least`, KL divergence below `most`."""
        self.curve = (*self.curve, (step, jaccard, kl))
        self.streak = self.streak + 1 if jaccard >= least and kl < most else 0
        if self.at is None and self.streak >= patience:
            self.at = step

    @property
    def plain(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"streak": self.streak, "at": self.at, "curve": [list(point) for point in self.curve]}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Convergence:
        """Undo `plain`."""
        return cls(plain["streak"], plain["at"], tuple((int(s), float(j), float(k)) for s, j, k in plain["curve"]))
