"""What methods share whose adapters or routers belong to tasks: whose turn it is, and whose an input is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer

from reference.data.tasks import Task
from reference.methods.adapters import PLAIN, Routing, Selector
from reference.methods.base import Method
from reference.methods.igsp import TASK_KNOWN, TASK_UNKNOWN
from reference.training.steps import Batches


class AdaptersOfTasks(Method):
    """A child says which modules stand beside the blocks (`put_adapters`) and what trains in a task (`at_work`).

    Without a task's name each image and each prompt is given to the nearest task by the backbone's features.
    """

    evaluations = (TASK_KNOWN, TASK_UNKNOWN)

    def make_optimizer(self) -> Optimizer:
        """AdamW on what `put_adapters` leaves trainable."""
        torch.manual_seed(self.setting.seed)
        self.routing = Routing()
        self.selector = Selector(self.clip, self.routing)
        self.names: list[str] = []
        self.put_adapters()
        return super().make_optimizer()

    def put_adapters(self) -> None:
        """Put modules beside the blocks; they read `self.routing`."""
        raise NotImplementedError

    def at_work(self, number: int, resumed: bool = False) -> None:
        """Let the parameters of task `number` alone be trainable."""
        raise NotImplementedError

    def before_task(self, number: int) -> None:
        """Begin with fresh moments and what belongs to task `number`."""
        super().before_task(number)
        self.routing.task = number
        self.at_work(number)

    def after_task(self, number: int) -> dict[str, Any]:
        """Remember what the task's images and prompts look like."""
        task = self.setting.tasks[number]
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        self.clip.model.eval()
        self.selector.learn(Batches(self.clip, drawn), self.clip.tokens(task.prompts()))
        self.names.append(task.name)
        return {}

    def evaluating(self, evaluation: str, task: Task) -> AbstractContextManager[object]:
        """What belongs to `task`, or to the nearest task of each input."""
        if evaluation == TASK_UNKNOWN:
            return self.without_task()
        return self.selector.using(self.names.index(task.name) if task.name in self.names else PLAIN)

    def without_task(self) -> AbstractContextManager[object]:
        """What belongs to the nearest task of each input, or to none."""
        return self.selector.guessing()

    def state(self) -> dict[str, Any]:
        """The model, the optimizer, and what is known of finished tasks."""
        return {**super().state(), "selector": self.selector.state(), "names": list(self.names)}

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take it up again."""
        super().load_state(state, number)
        self.selector.load_state(state["selector"])
        self.names = list(state["names"])
        if number < len(self.setting.tasks):
            self.routing.task = number
            self.at_work(number, resumed=True)
