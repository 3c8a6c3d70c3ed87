"""Observation of one layer's routing in phase 1: the flow to each expert, and the convergence of its router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import IGSP
from . import router
from .context import in_backward
from .experts import Stateless
from .router import FLOOR, RoutingChoice

DECAY = 0.9  # of the running means, by step
AGREEMENT = 0.95  # least Jaccard index of the top-k sets of two windows that agree
DIVERGENCE = 1e-3  # nats beyond chance by which the use of experts in two windows that agree may differ
PATIENCE = 2  # windows in a row that must agree
KEPT_INPUTS = 64  # forwards since the last step whose gate inputs the regularization sees


class ConvergenceMonitor(Stateless):
    """Running sums over the training forwards of one layer in phase 1.

    A router of one expert has converged from the start. Buffers, `[E]` each unless they are None: `flow`, the running
    mean of the gates (not normalised); `window`, sum of probabilities and number of samples `[E + 1]` since the window
    began; `previous`, mean probabilities of the window before; `origin` `[E, d + 1]`, the router when the window began;
    `centre` `[d + 1]`, the running mean of the gate inputs (not normalised).
    """

    flow: Tensor
    origin: Tensor
    centre: Tensor
    window: Tensor | None
    previous: Tensor | None

    def __init__(self, options: IGSP, weight: Tensor) -> None:
        super().__init__()
        self.options = options
        self.convergence = Convergence(at=0 if len(weight) < 2 else None)
        self.recent: list[Tensor] = []
        self.quiet = False  # whether any training forward ran without noise
        self.direct = False  # whether forwards since the last step were noted as they ran
        self.tokens: Tensor | None = None  # inputs `[..., d]` of the last forward since the last step
        self.sums: list[Tensor] = []
        self.last: Tensor | None = None
        self.register_buffer("flow", weight.detach().new_zeros(len(weight)))
        self.register_buffer("origin", weight.detach().clone())
        self.register_buffer("centre", weight.detach().new_zeros(weight.shape[1]))
        self.register_buffer("window", None)
        self.register_buffer("previous", None)

    @torch.no_grad()
    def take(self, inputs: Tensor, scores: Tensor, choice: RoutingChoice, noisy: bool = True) -> None:
        """Note one training forward: gate inputs `[n, d + 1]`, scores without noise `[n, E]` and what was chosen.

        One that backward repeats is noted only if it was not noted before (it ran without gradients).
        """
        repeated = in_backward()
        if not len(inputs) or (repeated and self.direct):
            return
        self.direct, self.quiet = not repeated, self.quiet or not noisy
        self.recent = [*self.recent[1 - KEPT_INPUTS :], inputs]
        gates = router.dense(RoutingChoice(choice.experts, choice.gates.detach()), scores.shape[1]).sum(dim=0)
        probabilities = torch.softmax(scores.detach(), dim=-1).sum(dim=0)
        count = gates.new_full((1,), float(len(inputs)))
        self.sums.append(torch.cat([gates, probabilities, count, inputs.sum(dim=0)]))
        self.last = inputs

    def forget(self) -> Tensor | None:
        """Return the sum `[2 E + 1 + d + 1]` of what was noted since the last step (None: nothing), and forget it."""
        sums, self.sums = self.sums, []
        self.recent, self.tokens, self.direct = [], None, False
        return torch.stack(sums).sum(dim=0) if sums else None

    @torch.no_grad()
    def absorb(self, total: Tensor | None = None) -> None:
        """Turn what was noted since the last step (its `total` over the ranks) into one step of the running means."""
        total, size = self.forget() if total is None else total, len(self.flow)
        if total is None:
            return
        count, seen = total[2 * size], total[size : 2 * size + 1]
        self.flow = DECAY * self.flow + (1 - DECAY) * total[:size] / count
        self.centre = DECAY * self.centre + (1 - DECAY) * total[2 * size + 1 :] / count
        self.window = seen if self.window is None else self.window + seen

    @torch.no_grad()
    def jaccard(self, weight: Tensor) -> Tensor | None:
        """Return the agreement `[]` of the router `weight` with the one that the window began with, on the inputs of
        the last forward; None without these.
        """
        if self.last is None:
            return None
        scores = (router.logits(self.last, weight), router.logits(self.last, self.origin))
        return agreement(*scores, self.options.top_k)

    @torch.no_grad()
    def judge(self, weight: Tensor, step: int, jaccard: Tensor | None = None) -> None:
        """End a window at `step`: compare the router `weight` `[E, d + 1]` and its use with the window before.

        `jaccard` is the agreement on all ranks together.
        """
        jaccard = self.jaccard(weight) if jaccard is None else jaccard
        if self.window is None or jaccard is None:
            return
        now = self.window[:-1] / self.window[-1]
        if self.previous is not None:
            kl = float(divergence(now, self.previous))
            most = DIVERGENCE + chance_divergence(len(now), float(self.window[-1]))
            self.convergence.judge(step, float(jaccard), kl, most)
        self.previous, self.window, self.origin = now, None, weight.detach().clone()

    @property
    def seen(self) -> bool:
        """True if any training forward reached the layer in this task."""
        return self.window is not None or self.previous is not None

    @property
    def shares(self) -> Tensor:
        """`pi` `[E]`: the running mean of the gates, with sum 1 (zeros before the first step)."""
        return self.flow / self.flow.sum().clamp_min(torch.finfo(self.flow.dtype).tiny)

    @property
    def mean_input(self) -> Tensor:
        """The running mean of the gate inputs `[d + 1]`, whose last entry is the same for all samples."""
        constant = router.constant(len(self.centre) - 1, self.options.gate_scale)
        return self.centre * (constant / self.centre[-1].clamp_min(torch.finfo(self.centre.dtype).tiny))

    @property
    def done(self) -> bool:
        """True if the layer need not be waited for: it has converged, or nothing reaches it."""
        return self.convergence.at is not None or not self.seen


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
    """Convergence of one layer's router: `at` is the step, None before.

    A router has converged when for `PATIENCE` windows in a row the top-k sets agree (Jaccard index) and the mean
    probabilities stay (KL divergence to the window before). `curve` holds (step, Jaccard, KL) of every window that
    could be compared.
    """

    streak: int = 0
    at: int | None = None
    curve: tuple[tuple[int, float, float], ...] = ()

    def judge(self, step: int, jaccard: float, kl: float, most: float) -> None:
        """Take one more window into account; its KL divergence must be below `most`."""
        self.curve = (*self.curve, (step, jaccard, kl))
        self.streak = self.streak + 1 if jaccard >= AGREEMENT and kl < most else 0
        if self.at is None and self.streak >= PATIENCE:
            self.at = step

    @property
    def plain(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"streak": self.streak, "at": self.at, "curve": [list(point) for point in self.curve]}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Convergence:
        """Undo `plain`."""
        return cls(plain["streak"], plain["at"], tuple((int(s), float(j), float(k)) for s, j, k in plain["curve"]))
