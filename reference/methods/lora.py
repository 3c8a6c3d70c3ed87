"""One LoRA per task, one LoRA for all tasks, and that one under null-space protection: the simple ways to share or not.

All stand beside the block MLPs of both towers, where the experts of iGSP stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.methods.adapters import PLAIN, AdaptersOfTasks, Routing, put_beside
from reference.methods.base import Method
from reference.methods.nullspace import NullSpace


class Lora(nn.Module):
    """`B A x` with `A` `[r, d]` orthonormal at first and `B` zero."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[n, tokens, d]`, like the result."""
        return self.up(self.down(x))  # type: ignore[no-any-return]


class LoraOfTasks(nn.Module):
    """One LoRA a task; `routing` says whose is used, for all samples or for each."""

    def __init__(self, width: int, rank: int, tasks: int, routing: Routing) -> None:
        super().__init__()
        self.of_task = nn.ModuleList(Lora(width, rank) for _ in range(tasks))
        self.routing = routing

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[n, tokens, d]`, like the result."""
        task = self.routing.task
        if isinstance(task, int):
            return torch.zeros_like(x) if task == PLAIN else self.of_task[task](x)
        down, up = (torch.stack([getattr(lora, part).weight for lora in self.of_task])[task] for part in ("down", "up"))
        mixed = x @ down.to(x.dtype).mT @ up.to(x.dtype).mT  # PLAIN is the last entry: its result is not used
        return torch.where((task != PLAIN)[:, None, None], mixed, torch.zeros_like(mixed))


class LoraShared(Method):
    """One LoRA for all tasks, trained on and on."""

    name = "lora-shared"

    def make_optimizer(self) -> Optimizer:
        """AdamW on the LoRA alone."""
        torch.manual_seed(self.setting.seed)
        put_beside(self.clip.model, lambda width: Lora(width, self.config.lora_rank))
        return super().make_optimizer()

    def facts(self) -> dict[str, Any]:
        """Parameters beside the backbone, and how many train on average."""
        count = sum(p.numel() for p in self.clip.model.parameters() if p.requires_grad)
        return super().facts() | dict.fromkeys(("trainable_mean", "final_without_routers", "final_with_routers"), count)


class LoraSharedNullSpace(LoraShared, NullSpace):
    """One LoRA for all tasks; directions that earlier tasks used of it do not move."""

    name = "lora-shared-nullspace"


class LoraPerTask(AdaptersOfTasks):
    """One LoRA per task and nothing shared; the simplest way not to forget."""

    name = "lora-per-task"

    def put_adapters(self) -> None:
        """A LoRA for each task."""
        tasks, rank = len(self.setting.tasks), self.config.lora_rank
        self.adapters = put_beside(self.clip.model, lambda width: LoraOfTasks(width, rank, tasks, self.routing))

    def at_work(self, number: int, resumed: bool = False) -> None:
        """Train the LoRA of task `number` alone."""
        for adapter in self.adapters:
            for task, lora in enumerate(adapter.of_task):  # type: ignore[arg-type,union-attr]
                lora.requires_grad_(task == number)

    def facts(self) -> dict[str, Any]:
        """Parameters beside the backbone with and without the selector, and how many train on average."""
        count = sum(p.numel() for adapter in self.adapters for p in adapter.parameters())
        per_task = count // len(self.setting.tasks)
        return {
            "trainable_mean": per_task,
            "final_without_routers": count,
            "final_with_routers": count + self.selector.parameters,
        }
