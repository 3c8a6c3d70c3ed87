"""A head for each task and an optimizer for each head: bases of finished heads wait until they are stepped again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import take_steps
from torch import Tensor, nn
from torch.optim import AdamW
from training import relative_drift

from nullspace_optim import BasisFileError, NullSpaceOptimizer, NullSpaceWarning, NumericalRank, StaleAnchorError

INPUTS = {task: torch.randn(6, 24, generator=torch.Generator().manual_seed(int(task))) for task in "123"}


class Heads(nn.Module):
    """A body and three heads; `task` chooses the head whose output is returned, all of them run if `every`."""

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(24, 32)
        self.heads = nn.ModuleDict({task: nn.Linear(32, 4) for task in "123"})
        self.every = every
        self.task = "1"

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(inputs))
        return {task: head(hidden) for task, head in self.heads.items() if self.every or task == self.task}[self.task]

    def outputs(self, task: str) -> Tensor:
        with torch.no_grad():
            return self.heads[task](torch.tanh(self.body(INPUTS[task])))


def build(every: bool = False) -> Heads:
    torch.manual_seed(0)
    return Heads(every)


def wrap(model: Heads, *tasks: str) -> NullSpaceOptimizer:
    """An optimizer of the body and the heads of `tasks`."""
    trained = [*model.body.parameters(), *(p for task in tasks for p in model.heads[task].parameters())]
    return NullSpaceOptimizer(AdamW(trained, lr=0.01), model, policy=NumericalRank())


def learn(model: Heads, optimizer: Any, task: str, steps: int = 5) -> None:
    model.task = task
    take_steps(optimizer, lambda: (model(INPUTS[task]) - 1).square().mean(), steps)


def finish(model: Heads, optimizer: NullSpaceOptimizer, task: str) -> Tensor:
    learn(model, optimizer, task)
    optimizer.consolidate([INPUTS[task]], name=task, progress=False)
    return model.outputs(task)


@pytest.mark.fault(136)
@pytest.mark.parametrize("how", ["file", "state dict"])
def test_an_optimizer_for_each_head_keeps_all_finished_heads(how: str, tmp_path: Path) -> None:
    model, kept = build(), {}
    optimizer = wrap(model, "1")
    for task in "123":
        kept[task] = finish(model, optimizer, task)
        if task == "3":
            break
        optimizer.save(tmp_path / "bases")
        state = optimizer.state_dict()
        optimizer.detach()
        optimizer = wrap(model, "123"["123".index(task) + 1])
        if how == "file":
            optimizer.load(tmp_path / "bases")
        else:
            optimizer.load_state_dict(
                {**optimizer.state_dict(), **{k: state[k] for k in ("nullspace", "param_groups")}}
            )
    assert all(relative_drift(model.outputs(task), then) < 1e-5 for task, then in kept.items())
    assert {"heads.1.weight", "heads.2.weight", "heads.3.weight", "body.weight"} <= set(optimizer.bases)
    optimizer.save(tmp_path / "all")
    optimizer.detach()
    everything = wrap(model, *"123")
    everything.load(tmp_path / "all")
    learn(model, everything, "1", 10)
    assert all(relative_drift(model.outputs(task), then) < 1e-5 for task, then in kept.items())


def test_a_waiting_head_is_protected_once_stepped_and_an_edit_is_found(tmp_path: Path) -> None:
    model = build()
    optimizer = wrap(model, "1")
    old = finish(model, optimizer, "1")
    optimizer.save(tmp_path / "bases")
    optimizer.detach()
    optimizer = wrap(model, "2")
    optimizer.load(tmp_path / "bases")
    optimizer.add_param_group({"params": list(model.heads["1"].parameters())})
    learn(model, optimizer, "1", 10)
    assert relative_drift(model.outputs("1"), old) < 1e-5 and optimizer.verify().ok
    optimizer.detach()
    optimizer = wrap(model, "2")
    optimizer.load(tmp_path / "bases")
    with torch.no_grad():
        model.heads["1"].weight.mul_(2)
    assert not optimizer.verify().ok
    with pytest.raises(StaleAnchorError, match=r"heads\.1\.weight.*changed outside"):
        optimizer.consolidate([INPUTS["2"]], progress=False)


def test_bases_of_a_head_that_the_model_lacks_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = build()
    optimizer = wrap(model, "1")
    finish(model, optimizer, "1")
    optimizer.save(tmp_path / "bases")
    smaller = build()
    del smaller.heads["1"]
    with pytest.raises(BasisFileError, match=r"heads\.1\.bias, heads\.1\.weight.*release\(\) these names"):
        wrap(smaller, "2").load(tmp_path / "bases")
    for name in ("heads.1.weight", "heads.1.bias"):
        optimizer.release(name)
    optimizer.save(tmp_path / "bases")
    wrap(smaller, "2").load(tmp_path / "bases")


@pytest.mark.parametrize("every", [False, True])
def test_a_head_that_no_task_used_trains_and_the_warning_does_not_claim_more(every: bool) -> None:
    model = build(every)
    model.heads["2"].requires_grad_(False)
    optimizer = wrap(model, *"12")
    old = finish(model, optimizer, "1")
    model.heads["2"].requires_grad_(True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        learn(model, optimizer, "2", 20)
    texts = [str(warning.message) for warning in told if warning.category is NullSpaceWarning]
    assert relative_drift(model.outputs("1"), old) < 1e-5
    assert len(texts) == every
    assert all("where they take part in old outputs, these will move" in text for text in texts)
