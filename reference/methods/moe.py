"""MoE-Adapters4CL (Yu et al., 2024): 22 experts beside each block's MLP, two of them a sample, a router a task.

Written from its description. Scaled down with the width: a bottleneck of d / 12 (64 at ViT-B's 768). As published:
ReLU bottleneck with dropout .1 and output scale .1, un-normalised input, the first token as gate input, learned routing
noise in training, no balance loss, and after each task the two most used experts of each block are frozen for good. Not
as published: the task of an input is found by the backbone's features for each input (see `adapters`), not by DDAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.methods.adapters import PLAIN, AdaptersOfTasks, Routing, put_beside
from reference.training.steps import Batch, seeded

TOP, FROZEN_PER_TASK = 2, 2
DROPOUT, SCALE = 0.1, 0.1
NARROWER = 12


class MixtureOfAdapters(nn.Module):
    """The experts and routers of one block; `counts` `[E]` is how often each was chosen in the task at work."""

    counts: Tensor
    frozen: Tensor

    def __init__(self, width: int, experts: int, tasks: int, routing: Routing) -> None:
        super().__init__()
        hidden = max(8, round(width / NARROWER))
        self.routing = routing
        self.down, self.down_bias, self.up, self.up_bias = (
            nn.ParameterList(nn.Parameter(torch.zeros(*size)) for _ in range(experts))
            for size in ((hidden, width), (hidden,), (hidden, width), (width,))
        )
        self.router, self.noise = (
            nn.ParameterList(nn.Parameter(torch.zeros(width, experts)) for _ in range(tasks)) for _ in range(2)
        )
        self.register_buffer("counts", torch.zeros(experts))
        self.register_buffer("frozen", torch.zeros(experts, dtype=torch.bool))
        for weight in self.down:
            nn.init.kaiming_uniform_(weight, a=5**0.5)

    def begin(self, task: int) -> None:
        """Train router `task` and all experts that are not frozen."""
        self.counts.zero_()
        for number, (router, noise) in enumerate(zip(self.router, self.noise)):
            router.requires_grad_(number == task)
            noise.requires_grad_(number == task)
        for parts in (self.down, self.down_bias, self.up, self.up_bias):
            for part, frozen in zip(parts, self.frozen.tolist()):
                part.requires_grad_(not frozen)

    def freeze_most_used(self) -> None:
        """Freeze the two experts that were chosen most often."""
        self.frozen[self.counts.topk(FROZEN_PER_TASK).indices] = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[n, tokens, d]`, like the result."""
        task = self.routing.task
        if isinstance(task, int) and task == PLAIN:
            return torch.zeros_like(x)
        chosen, gates = self._route(x[:, 0].float(), task)
        down, bias, up, shift = (
            torch.stack(list(part)).to(x.dtype)[chosen] for part in (self.down, self.down_bias, self.up, self.up_bias)
        )
        hidden = F.relu(x @ down.flatten(1, 2).mT + bias.flatten(1)[:, None])
        hidden = F.dropout(hidden, DROPOUT, self.training)
        weights = SCALE * gates.to(x.dtype)
        hidden = hidden * weights.repeat_interleave(down.shape[2], dim=1)[:, None]
        return hidden @ up.flatten(1, 2) + (weights[..., None] * shift).sum(dim=1, keepdim=True)

    def _route(self, first: Tensor, task: int | Tensor) -> tuple[Tensor, Tensor]:
        """Two experts a sample `[n, 2]` and their gates, from the first tokens `[n, d]`; gates are 0 for PLAIN."""
        with torch.autocast(first.device.type, enabled=False):
            if isinstance(task, Tensor):
                logits = torch.einsum("nd,nde->ne", first, torch.stack(list(self.router))[task])
                best = logits.topk(TOP, dim=1)
                return best.indices, torch.softmax(best.values, dim=1) * (task != PLAIN)[:, None]
            logits = first @ self.router[task]
            if self.training:
                logits = logits + torch.randn_like(logits) * (F.softplus(first @ self.noise[task]) + 0.01)
            best = logits.topk(TOP, dim=1)
        if self.routing.counting:
            self.counts += torch.bincount(best.indices.flatten(), minlength=len(self.counts)).to(self.counts)
        return best.indices, torch.softmax(best.values, dim=1)


class MoeAdapters(AdaptersOfTasks):
    """MoE-Adapters4CL with the number of experts `moe_experts` of the settings."""

    name = "moe-adapters"
    saved = ("names", "trained")

    def put_adapters(self) -> None:
        """Experts and a router for each task."""
        self.trained: list[int] = []
        experts, tasks = self.config.moe_experts, len(self.setting.tasks)
        made = put_beside(
            self.clip.model, lambda width: MixtureOfAdapters(width, experts, tasks, self.routing), normalised=False
        )
        self.blocks = [block for block in made if isinstance(block, MixtureOfAdapters)]

    def before_task(self, number: int) -> None:
        """Count what trains as well."""
        super().before_task(number)
        self.trained.append(self.trained_parameters())

    def at_work(self, number: int, resumed: bool = False) -> None:
        """Train the router of task `number` and the experts that are not frozen."""
        for block in self.blocks:
            counts = block.counts.clone()
            block.begin(number)
            if resumed:
                block.counts.copy_(counts)

    def loss(self, batch: Batch) -> Tensor:
        """The usual loss; dropout and routing noise are drawn anew for each step from its number."""
        with _drawing(self.setting.seed, batch.task, batch.step), self.routing.counted():
            return super().loss(batch)

    def after_task(self, number: int) -> dict[str, Any]:
        """Freeze the two most used experts of each block; remember what the task's inputs look like."""
        for block in self.blocks:
            block.freeze_most_used()
        return {**super().after_task(number), "frozen": [int(block.frozen.sum()) for block in self.blocks]}

    def facts(self) -> dict[str, Any]:
        """Parameters beside the backbone with and without routers, frozen experts, and how many train on average."""
        routers = sum(p.numel() for block in self.blocks for p in (*block.router, *block.noise))
        count = sum(p.numel() for block in self.blocks for p in block.parameters())
        return {
            "trainable_mean": sum(self.trained) / max(1, len(self.trained)),
            "trainable": list(self.trained),
            "final_without_routers": count - routers,
            "final_with_routers": count + self.selector.parameters,
            "frozen_experts": [int(block.frozen.sum()) for block in self.blocks],
        }


@contextmanager
def _drawing(*numbers: int) -> Iterator[None]:
    """Random numbers that depend on `numbers` alone; the global state is given back."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(*numbers, 7))))
        yield
