"""Promised for every optimizer of `torch.optim`: without bases nothing changes, with bases nothing kept moves."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import BASIC, CASES, Case, layer_rows, protected, setting, span_drift, take_steps
from torch.optim import Optimizer
from training import relative_drift

from nullspace_optim import NullSpaceOptimizer

EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def test_the_table_names_every_optimizer_of_torch() -> None:
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    assert classes <= {case.name for case in BASIC}


def _states_equal(first: Optimizer, second: Optimizer) -> bool:
    one, two = first.state_dict()["state"], second.state_dict()["state"]
    flat_one, spec_one = torch.utils._pytree.tree_flatten(one)
    flat_two, spec_two = torch.utils._pytree.tree_flatten(two)
    return spec_one == spec_two and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(flat_one, flat_two)
    )


@EVERY
def test_without_bases_every_bit_is_the_base_optimizers(case: Case) -> None:
    plain, wrapped = setting(case), setting(case)
    base = case.build(plain.model.parameters())
    optimizer = NullSpaceOptimizer(case.build(wrapped.model.parameters()))
    take_steps(base, plain.loss, 20, case.kind == "closure")
    take_steps(optimizer, wrapped.loss, 20, case.kind == "closure")
    for one, two in zip(plain.model.parameters(), wrapped.model.parameters()):
        assert torch.equal(one, two)
    assert _states_equal(base, optimizer)


@EVERY
@pytest.mark.fault(10, 12, 20)
def test_with_bases_kept_directions_stay_and_the_new_task_is_learned(case: Case) -> None:
    task = setting(case)
    optimizer = protected(case, task)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    rows, outputs, start = layer_rows(task.model, task.old), task.outputs(), task.loss().item()
    objective = (lambda: -task.loss()) if "maximize" in case.options else task.loss
    take_steps(optimizer, objective, 500, case.kind == "closure")
    assert span_drift(task.model, before, rows) <= 1e-5
    assert relative_drift(task.outputs(), outputs) <= 1e-5
    assert optimizer.verify().worst <= 1e-5
    assert task.loss().item() <= start / 2
