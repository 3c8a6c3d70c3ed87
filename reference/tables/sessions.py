"""What a method does around a task besides training: forward scaling of related tasks (TRGP, CODE-CL).

A session is begun before each task, ended after its training and asked for the context in which a task is scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nullspace_optim import ForwardScaling, NullSpaceOptimizer, shared_directions, trust_regions
from reference.tables.data import Labelled


class Session:
    """Nothing besides training."""

    def begin(self, task: int, first: Labelled, samples: Tensor) -> None:
        """Prepare for `task`; `first` is its first batch, `samples` the draw that will be protected."""

    def end(self) -> None:
        """Stop what trains for this task alone."""

    def scoring(self, task: int) -> AbstractContextManager[Any]:
        """The context in which `task` is scored."""
        return nullcontext()

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Prepare the model to load `weights`; the optimizer's bases are loaded already."""


class Scaling(Session):
    """A task may re-weight directions of related earlier tasks; the mixing matrices are its own and stay."""

    def __init__(self, optimizer: NullSpaceOptimizer, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model
        self.scaling: ForwardScaling | None = None

    def directions(self, task: int, first: Labelled, samples: Tensor) -> Mapping[str, Mapping[str, Tensor]]:
        """Which directions `task` may re-weight, by weight and origin."""
        raise NotImplementedError

    def begin(self, task: int, first: Labelled, samples: Tensor) -> None:
        """Find related tasks and give the mixing matrices to the optimizer, at the rate of the weights."""
        if task == 0:
            return
        self.scaling = self.scaling or ForwardScaling(self.optimizer)
        self.scaling.use(None)
        mixing = self.scaling.begin(_name(task), self.directions(task, first, samples))
        if mixing:
            self.optimizer.add_param_group({"params": mixing})

    def end(self) -> None:
        """Take the mixing matrices out of the optimizer."""
        self.optimizer.param_groups = self.optimizer.param_groups[:1]

    def scoring(self, task: int) -> AbstractContextManager[Any]:
        """The weights as `task` mixes them."""
        return nullcontext() if self.scaling is None else self.scaling.task(_name(task))

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Make room for the mixing matrices of a saved model that has them."""
        if any(".parametrizations." in name for name in weights):
            self.scaling = ForwardScaling(self.optimizer)


class TrustRegions(Scaling):
    """TRGP: subspaces of at most two earlier tasks that hold much of the gradient of the first batch."""

    def __init__(self, optimizer: NullSpaceOptimizer, model: nn.Module, threshold: float) -> None:
        super().__init__(optimizer, model)
        self.threshold = threshold

    def directions(self, task: int, first: Labelled, samples: Tensor) -> Mapping[str, Mapping[str, Tensor]]:
        """Related tasks by the gradient of the first batch."""
        images, labels = first
        self.model.train()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(images, task), labels).backward()
        found = trust_regions(self.optimizer, self.threshold)
        self.optimizer.zero_grad()
        return found


class SharedConceptors(Scaling):
    """CODE-CL: the leading 80 directions of what the conceptors of old and new tasks have in common."""

    def directions(self, task: int, first: Labelled, samples: Tensor) -> Mapping[str, Mapping[str, Tensor]]:
        """Shared directions by the inputs of the new task, before it is trained."""
        self.model.eval()
        moments = self.optimizer.measure([samples], forward=lambda x: self.model(x, task), progress=False)
        with torch.no_grad():
            return shared_directions(self.optimizer, moments)


def _name(task: int) -> str:
    return f"task {task + 1}"
