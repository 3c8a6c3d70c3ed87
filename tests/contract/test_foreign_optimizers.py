"""Optimizers of other libraries whose ways are special: what holds, what is found, what is refused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from cases import Case, Setting, setting
from torch.optim import SGD, AdamW
from training import relative_drift

from nullspace_optim import NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import OptionError


@pytest.fixture
def task() -> Setting:
    return setting(Case("SGD"))


def library(name: str) -> Any:
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


def consolidated(base: Any, task: Setting) -> NullSpaceOptimizer:
    optimizer = NullSpaceOptimizer(base, task.model, policy=NumericalRank())
    optimizer.consolidate([task.old], progress=False)
    return optimizer


def test_sharpness_aware_phases_called_by_hand_hold(task: Setting) -> None:
    base = library("pytorch_optimizer").SAM(task.model.parameters(), SGD, lr=0.5)
    optimizer = consolidated(base, task)
    outputs, start = task.outputs(), task.loss().item()
    for _ in range(20):
        task.loss().backward()
        base.first_step(zero_grad=True)
        task.loss().backward()
        base.second_step(zero_grad=True)
    assert relative_drift(task.outputs(), outputs) <= 1e-5 and optimizer.verify().ok
    assert task.loss().item() < start


def test_sharpness_aware_steps_with_a_closure_hold(task: Setting) -> None:
    base = library("pytorch_optimizer").SAM(task.model.parameters(), SGD, lr=0.5)
    optimizer = consolidated(base, task)
    outputs, start = task.outputs(), task.loss().item()

    def evaluate() -> Any:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        return loss

    for _ in range(20):
        evaluate()
        optimizer.step(evaluate)
    assert relative_drift(task.outputs(), outputs) <= 1e-5 and optimizer.verify().ok
    assert task.loss().item() < start


def test_slow_weights_of_lookahead_hold_as_well(task: Setting) -> None:
    base = library("pytorch_optimizer").Lookahead(AdamW(task.model.parameters(), lr=0.01), k=5)
    optimizer = consolidated(base, task)
    outputs = task.outputs()
    for _ in range(13):
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()
    trained = task.outputs()
    base.backup_and_load_cache()
    assert relative_drift(task.outputs(), outputs) <= 1e-5, "slow weights"
    assert relative_drift(task.model(task.inputs), task.targets) > 0.0
    base.clear_and_load_backup()
    assert relative_drift(task.outputs(), trained) == 0.0


def test_copies_in_host_memory_are_refused() -> None:
    """torchao's offloading wrapper can be built only beside a GPU; its class is what is looked at."""
    kind = library("torchao.optim").CPUOffloadOptimizer
    base = kind.__new__(kind)
    base.d_param_groups, base.optim_dict, base.param_d2h_map = [], {}, {}
    with pytest.raises(OptionError, match="CPUOffloadOptimizer: expected a torch"):
        NullSpaceOptimizer(base)


def test_a_wrapper_whose_step_runs_no_hooks_is_refused_by_name(task: Setting) -> None:
    kind = library("timm.optim").Lookahead
    with pytest.raises(OptionError, match=r"Lookahead.step\(\) runs no step hooks"):
        NullSpaceOptimizer(kind(AdamW(task.model.parameters())), task.model)


@pytest.mark.parametrize("name", ["LOMO", "AdaLOMO"])
def test_weights_that_move_in_the_backward_pass_are_refused_by_name(name: str, task: Setting) -> None:
    kind = getattr(library("pytorch_optimizer"), name)
    with pytest.raises(OptionError, match=f"{name} moves the weights during the backward pass"):
        NullSpaceOptimizer(kind(task.model), task.model)
