"""The small task that the contract is tested with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from cases import Setting
from training import mlp, relative_drift


@pytest.fixture
def task() -> Setting:
    """A small network, 6 rows of an old task, a new task."""
    return Setting(mlp(), torch.randn(6, 24), torch.randn(16, 24), torch.randn(16, 8))


@pytest.fixture
def holds(task: Setting) -> Iterator[Callable[[], None]]:
    """Return a check that the outputs of the old task are what they were, and that training did happen."""
    outputs, start = task.outputs(), copy.deepcopy(task.model.state_dict())

    def check() -> None:
        assert relative_drift(task.outputs(), outputs) <= 1e-5
        assert not torch.equal(task.model[0].weight, start["0.weight"])

    yield check
