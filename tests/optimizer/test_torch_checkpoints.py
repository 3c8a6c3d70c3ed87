"""PyTorch's own recipe, `get_state_dict`, `dcp.save`, `dcp.load`, `set_state_dict`: bases survive it or it refuses."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import take_steps
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer
from training import relative_drift

from nullspace_optim import BasisFileError, NullSpaceOptimizer, NumericalRank, StaleAnchorError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")
OLD = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
INPUTS = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
BASES: dict[str, Any] = {
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "sgd": lambda m: SGD(m.parameters(), lr=0.05),
    "momentum": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9),
    "two groups": lambda m: AdamW([{"params": [p]} for p in m.parameters()], lr=0.01),
    "two bases": lambda m: [AdamW(m[0].parameters(), lr=0.01), SGD(m[2].parameters(), lr=0.05, momentum=0.9)],
}


def build(seed: int = 0, base: str = "adamw", **options: Any) -> tuple[nn.Sequential, NullSpaceOptimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))
    return model, NullSpaceOptimizer(BASES[base](model), model, policy=NumericalRank(), **options)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    take_steps(optimizer, lambda: (model(INPUTS) - 1).square().mean(), steps)


def protected(steps: int = 3, **options: Any) -> tuple[nn.Sequential, NullSpaceOptimizer]:
    """A model, trained and consolidated after `steps`, in the middle of its second task."""
    model, optimizer = build(**options)
    take_steps(optimizer, lambda: model(OLD).square().mean(), steps)
    optimizer.consolidate([OLD], progress=False)
    model.before = model(OLD).detach()
    train(model, optimizer)
    return model, optimizer


def save(model: nn.Module, optimizer: Optimizer, folder: Path, options: Any = None) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: Optimizer, folder: Path, options: Any = None, partial: bool = False) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    both = {"model": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partial))
    set_state_dict(
        model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"], options=options
    )


def goes_on_like(
    one: tuple[nn.Module, NullSpaceOptimizer], two: tuple[nn.Module, NullSpaceOptimizer], steps: int = 20
) -> bool:
    """Train both on and compare every bit; the second must hold the outputs of the first task as well."""
    for model, optimizer in (one, two):
        train(model, optimizer, steps)
    assert one[1].verify().ok and two[1].verify().ok
    assert relative_drift(two[0](OLD).detach(), one[0].before) < 1e-5
    return all(torch.equal(a, b) for a, b in zip(one[0].parameters(), two[0].parameters()))


@pytest.mark.fault(131)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("steps", [3, 0], ids=["with state", "frozen before it had state"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.fault(100)
def test_a_new_optimizer_goes_on_bitwise_and_protected(base: str, steps: int, precision: str, tmp_path: Path) -> None:
    run = protected(steps, base=base, precision=precision)
    stateless = [p for p in run[0].parameters() if not run[1].state.get(p)]
    assert steps or stateless
    save(*run, tmp_path)
    assert all(not run[1].state.get(p) for p in stateless)
    fresh = build(1, base, precision=precision)
    load(*fresh, tmp_path)
    assert [task["name"] for task in fresh[1]._core.store.tasks] == ["task 1"]
    assert [bool(run[1].state.get(p)) for p in run[0].parameters()] == [
        bool(fresh[1].state.get(p)) for p in fresh[0].parameters()
    ]
    assert goes_on_like(run, fresh)


def test_the_optimizer_alone_and_bases_that_are_there_already(tmp_path: Path) -> None:
    run = protected(0)
    run[1].save(tmp_path / "bases")
    state = copy.deepcopy(get_optimizer_state_dict(*run))
    fresh = build(1)
    fresh[0].load_state_dict(run[0].state_dict())
    fresh[1].load(tmp_path / "bases")
    set_optimizer_state_dict(*fresh, state)
    assert goes_on_like(run, fresh)


@pytest.mark.parametrize("options", [{"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}])
def test_full_state_dicts_carry_the_bases_as_well(options: dict[str, bool], tmp_path: Path) -> None:
    run, fresh = protected(), build(1)
    save(*run, tmp_path, StateDictOptions(**options))
    load(*fresh, tmp_path, StateDictOptions(**options))
    assert goes_on_like(run, fresh)


def test_a_protected_checkpoint_replaces_the_bases_of_another_run(tmp_path: Path) -> None:
    run, other = protected(), protected(seed=1)
    save(*run, tmp_path)
    load(*other, tmp_path)
    assert goes_on_like(run, other)


@pytest.mark.parametrize("base", ["adamw", "sgd", "momentum"])
@pytest.mark.fault(101)
def test_a_protected_checkpoint_loads_into_a_bare_optimizer(base: str, tmp_path: Path) -> None:
    model, optimizer = protected(0, base=base)
    save(model, optimizer, tmp_path)
    other, _ = build(1)
    bare = BASES[base](other)
    load(other, bare, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    train(other, bare)


def bare_checkpoint(folder: Path) -> nn.Module:
    model, _ = build()
    bare = AdamW(model.parameters(), lr=0.01)
    train(model, bare)
    save(model, bare, folder)
    return model


@pytest.mark.fault(101)
def test_a_bare_checkpoint_loads_through_the_base_or_a_partial_plan(tmp_path: Path) -> None:
    """The words are those of DCP's planner, which compares keys before any code of an optimizer runs."""
    model = bare_checkpoint(tmp_path)
    fresh, optimizer = build(1)
    with pytest.raises(
        CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.param_groups\.0\.nullspace"
    ):
        load(fresh, optimizer, tmp_path)
    load(fresh, optimizer, tmp_path, partial=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
    assert float(optimizer.state[fresh[0].weight]["step"]) == 5
    again, optimizer = build(2)
    load(again, optimizer._core.bases[0], tmp_path)
    assert float(optimizer.state[again[0].weight]["step"]) == 5 and not optimizer.bases
    train(again, optimizer)


def test_a_bare_checkpoint_leaves_the_bases_of_a_protected_optimizer(tmp_path: Path) -> None:
    bare_checkpoint(tmp_path)
    model, optimizer = protected()
    load(model, optimizer, tmp_path, partial=True)
    assert len(optimizer._core.store.tasks) == 1
    with pytest.raises(StaleAnchorError, match="changed outside the optimizer"):
        train(model, optimizer)


@pytest.mark.fault(131)
@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.fault(100)
def test_a_flattened_state_is_refused_until_the_bases_are_loaded(protect: bool, tmp_path: Path) -> None:
    """Flattening writes what stands in a group once for each parameter, and reads back only keys it knows."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    run = protected() if protect else build()
    train(*run)
    run[1].save(tmp_path / "bases")
    save(*run, tmp_path / "all", flat)
    fresh = build(1)
    with pytest.raises(BasisFileError, match=r"flatten_optimizer_state_dict.*opt\.load\(path\).*base optimizer"):
        load(*fresh, tmp_path / "all", flat)
    if not protect:
        load(fresh[0], fresh[1]._core.bases[0], tmp_path / "all", flat)
        return
    fresh[1].load(tmp_path / "bases")
    with pytest.warns(UserWarning, match="stay protected"):
        load(*fresh, tmp_path / "all", flat)
    assert goes_on_like(run, fresh)


def spoiled(text: str) -> Iterator[str]:
    """The text of a first group with one defect each."""
    record = json.loads(text)
    yield text[:-20]
    yield json.dumps({**record, "bases": record["bases"][:-400]})
    yield json.dumps({**record, "bases": 3})
    yield json.dumps({key: value for key, value in record.items() if key != "pending"})
    yield json.dumps({**record, "fingerprint": "0" * 16})


@pytest.mark.parametrize("number", range(5))
def test_damaged_bases_are_refused(number: int) -> None:
    run, fresh = protected(), build(1)
    state = get_optimizer_state_dict(*run)
    group = state["param_groups"][0]
    group["nullspace"] = list(spoiled(group["nullspace"]))[number]
    with pytest.raises(BasisFileError):
        set_optimizer_state_dict(*fresh, state)
    assert not fresh[1].bases


def test_before_any_task_nothing_is_carried_and_nothing_is_said(tmp_path: Path) -> None:
    run, fresh = build(), build(1)
    train(*run)
    save(*run, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="torch")
        load(*fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(run[0].parameters(), fresh[0].parameters()))
