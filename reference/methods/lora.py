"""One LoRA per task, one LoRA for all tasks, and that one under null-space protection: the simple ways to share or not.

All stand beside the block MLPs of both towers, where the experts of iGSP stand.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nullspace_optim import NullSpaceOptimizer
from reference.engine import Batches
from reference.methods.adapters import PLAIN, Routing, Selector, put_beside
from reference.methods.base import Method
from reference.methods.igsp import TASK_KNOWN, TASK_UNKNOWN
from reference.methods.projection import NullSpace
from reference.tasks import Task


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
        return {"trainable_mean": count, "final_without_routers": count, "final_with_routers": count}


class LoraSharedNullSpace(NullSpace):
    """One LoRA for all tasks; directions that earlier tasks used of it do not move."""

    name = "lora-shared-nullspace"

    def make_optimizer(self) -> Optimizer:
        """AdamW on the LoRA under protection."""
        torch.manual_seed(self.setting.seed)
        put_beside(self.clip.model, lambda width: Lora(width, self.config.lora_rank))
        base = Method.make_optimizer(self)
        return NullSpaceOptimizer(base, self.clip.model, policy=self.policy, project=self.project)

    def facts(self) -> dict[str, Any]:
        """As `lora-shared`, and the share of directions still free."""
        return {**super().facts(), **LoraShared.facts(self)}  # type: ignore[arg-type]


class LoraPerTask(Method):
    """One LoRA per task and nothing shared; the simplest way not to forget."""

    name = "lora-per-task"
    evaluations = (TASK_KNOWN, TASK_UNKNOWN)

    def make_optimizer(self) -> Optimizer:
        """AdamW on the LoRA of the task at work."""
        torch.manual_seed(self.setting.seed)
        self.routing = Routing()
        self.selector = Selector(self.clip, self.routing)
        self.names: list[str] = []
        tasks, rank = len(self.setting.tasks), self.config.lora_rank
        self.adapters = put_beside(self.clip.model, lambda width: LoraOfTasks(width, rank, tasks, self.routing))
        return super().make_optimizer()

    def before_task(self, number: int) -> None:
        """Train the LoRA of task `number` alone."""
        super().before_task(number)
        self._at_work(number)

    def _at_work(self, number: int) -> None:
        self.routing.task = number
        for adapter in self.adapters:
            for task, lora in enumerate(adapter.of_task):  # type: ignore[arg-type,union-attr]
                lora.requires_grad_(task == number)

    def after_task(self, number: int) -> dict[str, Any]:
        """Remember what the task's images and prompts look like."""
        task = self.setting.tasks[number]
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        self.clip.model.eval()
        self.selector.learn(Batches(self.clip, drawn), self.clip.tokens(task.prompts()))
        self.names.append(task.name)
        return {}

    def evaluating(self, evaluation: str, task: Task) -> AbstractContextManager[object]:
        """The LoRA of `task`, or the nearest task's for each input."""
        if evaluation == TASK_UNKNOWN:
            return self.selector.guessing()
        return self.selector.using(self.names.index(task.name) if task.name in self.names else PLAIN)

    def facts(self) -> dict[str, Any]:
        """Parameters beside the backbone with and without the selector, and how many train on average."""
        count = sum(p.numel() for adapter in self.adapters for p in adapter.parameters())
        selector = sum(mean.numel() + 1 for centres in self.selector.centres.values() for mean in centres.means)
        per_task = count // len(self.setting.tasks)
        return {"trainable_mean": per_task, "final_without_routers": count, "final_with_routers": count + selector}

    def state(self) -> dict[str, Any]:
        """The model, the optimizer, and what is known of finished tasks."""
        return {**super().state(), "selector": self.selector.state(), "names": list(self.names)}

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take it up again."""
        super().load_state(state, number)
        self.selector.load_state(state["selector"])
        self.names = list(state["names"])
        self._at_work(number)
