"""What phase 1 observes of one layer's routing: the flow to each expert, and whether the router has settled."""

from __future__ import annotations

import torch
from torch import Tensor

from . import router
from .experts import Silent
from .options import IGSP
from .router import Choice, Convergence

KEPT_INPUTS = 64  # forwards since the last step whose gate inputs the regularization sees


class Watch(Silent):
    """Running sums over the training forwards of one layer in phase 1.

    Buffers, `[E]` each unless they are None: `flow`, the running mean of the gates (not normalised); `window`, sum of
    probabilities and number of samples `[E + 1]` since the window began; `previous`, mean probabilities of the window
    before; `origin` `[E, d + 1]`, the router when the window began; `centre` `[d + 1]`, the running mean of the gate
    inputs (not normalised).
    """

    flow: Tensor
    origin: Tensor
    centre: Tensor
    window: Tensor | None
    previous: Tensor | None

    def __init__(self, options: IGSP, weight: Tensor) -> None:
        super().__init__()
        self.options = options
        self.convergence = Convergence()
        self.recent: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.last: Tensor | None = None
        self.register_buffer("flow", weight.detach().new_zeros(len(weight)))
        self.register_buffer("origin", weight.detach().clone())
        self.register_buffer("centre", weight.detach().new_zeros(weight.shape[1]))
        self.register_buffer("window", None)
        self.register_buffer("previous", None)

    @torch.no_grad()
    def take(self, inputs: Tensor, scores: Tensor, choice: Choice) -> None:
        """Note one training forward: gate inputs `[n, d + 1]`, scores without noise `[n, E]` and what was chosen."""
        self.recent = [*self.recent[1 - KEPT_INPUTS :], inputs]
        gates = router.dense(Choice(choice.experts, choice.gates.detach()), scores.shape[1]).sum(dim=0)
        probabilities = torch.softmax(scores.detach(), dim=-1).sum(dim=0)
        count = gates.new_full((1,), float(len(inputs)))
        self.sums.append(torch.cat([gates, probabilities, count, inputs.sum(dim=0)]))
        self.last = inputs

    @torch.no_grad()
    def absorb(self) -> None:
        """Turn what was noted since the last step into one step of the running means."""
        self.recent = []
        if not self.sums:
            return
        total, size = torch.stack(self.sums).sum(dim=0), len(self.flow)
        self.sums = []
        decay, count, seen = self.options.flow_decay, total[2 * size], total[size : 2 * size + 1]
        self.flow = decay * self.flow + (1 - decay) * total[:size] / count
        self.centre = decay * self.centre + (1 - decay) * total[2 * size + 1 :] / count
        self.window = seen if self.window is None else self.window + seen

    @torch.no_grad()
    def judge(self, weight: Tensor, step: int) -> None:
        """End a window at `step`: compare the router `weight` `[E, d + 1]` and its use with the window before."""
        if self.window is None or self.last is None:
            return
        now = self.window[:-1] / self.window[-1]
        if self.previous is not None:
            options = self.options
            scores = (router.logits(self.last, weight), router.logits(self.last, self.origin))
            jaccard = float(router.agreement(*scores, options.top_k))
            kl = float(router.divergence(now, self.previous))
            most = options.divergence + router.chance_divergence(len(now), float(self.window[-1]))
            self.convergence.judge(step, jaccard, kl, options.agreement, most, options.patience)
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

    def settled(self) -> bool:
        """True if the layer need not be waited for: it has converged, or nothing reaches it."""
        return self.convergence.at is not None or not self.seen
