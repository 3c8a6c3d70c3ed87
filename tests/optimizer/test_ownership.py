"""One model, several wrappers: bases go over to the newest, are never shared, and their loss is said."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import NEW, OLD, mlp, relative_drift, train

from nullspace_optim import IGSP, NullSpaceOptimizer, NumericalRank, StaleAnchorError
from nullspace_optim.errors import BasisFileError, NullSpaceWarning, OptionError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def protected(model: nn.Module, **options: Any) -> tuple[NullSpaceOptimizer, Tensor]:
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-2), model, policy=NumericalRank(), **options)
    optimizer.consolidate([OLD], name="old", progress=False)
    return optimizer, model(OLD).detach()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_new_wrapper_takes_over_the_bases_of_a_living_one(given: bool, precision: str) -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model, precision=precision)
    train(first, model, 3)
    second = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2, momentum=0.9), model if given else None)
    assert [task["name"] for task in second._core.store.tasks] == ["old"]
    train(second, model)
    assert relative_drift(model(OLD), before) < 1e-5 and second.verify().ok
    report = second.consolidate([NEW[:3]], name="new", progress=False)
    assert report.drift.keys() >= {"old"}
    kept = model(NEW[:3]).detach()
    third = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-2), model)
    train(third, model)
    assert relative_drift(model(NEW[:3]), kept) < 1e-5 and relative_drift(model(OLD), before) < 1e-5
    for earlier in (first, second):
        with pytest.raises(OptionError, match="took the bases of this one over"):
            train(earlier, model, 1)


def test_a_wrapper_whose_bases_went_over_refuses_to_go_on() -> None:
    model = mlp(24, 32, 4)
    first, _ = protected(model)
    second = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model)
    weights = copy.deepcopy(model.state_dict())
    for action in (lambda: train(first, model, 1), lambda: first.consolidate([NEW], progress=False)):
        with pytest.raises(OptionError, match="took the bases of this one over"):
            action()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    base = first._core.bases[0]
    with pytest.raises(OptionError, match="took the bases of this one over"):
        base.step()
    second.detach()
    train(base, model, 1)  # a plain optimizer again


def test_disjoint_wrappers_stay_apart() -> None:
    model = mlp(24, 32, 4)
    halves = [list(part.parameters()) for part in model.children() if list(part.parameters())]
    wrappers = [NullSpaceOptimizer(SGD(half, lr=1e-2), model) for half in halves]
    for wrapper in wrappers:
        wrapper.consolidate([OLD], progress=False)
    before = model(OLD).detach()
    for wrapper in wrappers:
        train(wrapper, model)
        assert wrapper.verify().ok
    assert relative_drift(model(OLD), before) < 1e-5


def test_bases_are_not_split_and_not_joined() -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model)
    with pytest.raises(OptionError, match=r"2\.bias.*detach\(\)|2\.weight.*detach\(\)"):
        NullSpaceOptimizer(half := SGD(model[0].parameters(), lr=1e-2), model)
    train(first, model)
    assert relative_drift(model(OLD), before) < 1e-5  # the refused one left no trace
    train(half, model, 1)
    with pytest.raises(StaleAnchorError, match="changed outside"):  # a plain optimizer it is, and seen as one
        train(first, model, 1)
    first.reanchor()
    other = mlp(24, 8)
    second, _ = protected(other)
    with pytest.raises(OptionError, match="2 other NullSpaceOptimizers"):
        NullSpaceOptimizer(SGD([*model.parameters(), *other.parameters()], lr=1e-2))
    del second


def test_bases_that_do_not_fit_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model)

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("nullspace_optim.optimizer.engine.Engine.adopt", fail)
        with pytest.raises(MemoryError):
            NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model)
    train(first, model)
    assert relative_drift(model(OLD), before) < 1e-5 and first.verify().ok


def test_experts_do_not_go_beside_protected_weights_in_silence() -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(OptionError, match=r"go on without mode=, or call detach\(\)"):
        NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model, mode=IGSP(target_modules="0"))
    assert [name for name, _ in model.named_modules()] == names
    train(first, model, 30)
    assert relative_drift(model(OLD), before) < 1e-5
    first.detach()
    NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model, mode=IGSP(target_modules="0"))


@pytest.mark.fault(126)
@pytest.mark.parametrize("end", ["detached", "dropped"])
@pytest.mark.parametrize("part", ["all", "backbone", "experts"])
def test_a_null_space_wrapper_does_not_go_over_living_experts(part: str, end: str) -> None:
    model = mlp(24, 32, 4)
    backbone = list(model.parameters())
    experts = NullSpaceOptimizer(SGD(backbone, lr=1e-2), model, mode=IGSP(target_modules="0"))
    known = {id(p) for p in backbone}
    added = [p for p in model.parameters() if id(p) not in known]
    trained = {"all": [*backbone, *added], "backbone": backbone[:1], "experts": added}[part]
    assert trained
    with pytest.raises(OptionError, match=r"with experts.*go on with that one, or call its detach\(\)"):
        NullSpaceOptimizer(SGD(trained, lr=1e-2), model)
    train(experts, model, 2)  # the refused one left no trace
    twin, other = copy.deepcopy((model, experts))
    with pytest.raises(OptionError, match="with experts"):
        NullSpaceOptimizer(SGD(twin.parameters(), lr=1e-2), twin)
    if end == "detached":
        experts.detach()
        other.detach()
    del experts, other
    for mine in (model, twin):
        train(NullSpaceOptimizer(SGD(mine.parameters(), lr=1e-2), mine), mine, 1)


def test_experts_on_one_tower_leave_the_other_free() -> None:
    towers = nn.ModuleList([mlp(24, 32, 4), mlp(24, 32, 4)])
    experts = NullSpaceOptimizer(SGD(towers[0].parameters(), lr=1e-2), towers[0], mode=IGSP(target_modules="0"))
    second, before = protected(towers[1])
    train(second, towers[1])
    assert relative_drift(towers[1](OLD), before) < 1e-5 and experts.status().phase == 1


@pytest.mark.filterwarnings("error")
def test_nothing_is_taken_from_a_detached_wrapper() -> None:
    model = mlp(24, 32, 4)
    first, _ = protected(model)
    first.detach()
    second = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model)
    train(second, model, 1)
    assert not second.bases


def test_bases_that_went_with_their_wrapper_are_named_once(recwarn: pytest.WarningsRecorder) -> None:
    model = mlp(24, 32, 4)
    del_me, _ = protected(model)
    del del_me
    second = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model)
    with pytest.warns(NullSpaceWarning, match=r"for old, and its bases are gone"):
        train(second, model, 1)
    recwarn.clear()
    train(second, model, 1)
    train(NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model), model, 1)
    assert not recwarn.list


@pytest.mark.filterwarnings("error")
def test_loaded_bases_are_not_called_lost(tmp_path: Path) -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model)
    first.save(tmp_path / "bases.safetensors")
    del first
    second = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model)
    second.load(tmp_path / "bases.safetensors")
    train(second, model)
    assert relative_drift(model(OLD), before) < 1e-5


def test_another_model_has_another_claim() -> None:
    model = mlp(24, 32, 4)
    gone, _ = protected(model)
    del gone
    gc.collect()
    protected(mlp(24, 8))  # claims of its own do not make those above forgotten
    with pytest.warns(NullSpaceWarning, match="its bases are gone"):
        train_once = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model)
        train(train_once, model, 1)


def test_a_copy_of_wrapper_and_model_is_owned_apart() -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model)
    twin, copied = copy.deepcopy((model, first))
    second = NullSpaceOptimizer(SGD(twin.parameters(), lr=1e-2), twin)
    train(second, twin)
    train(first, model)
    assert copied._core.superseded and not first._core.superseded
    assert relative_drift(twin(OLD), before) < 1e-5 and relative_drift(model(OLD), before) < 1e-5


@pytest.mark.parametrize("grown", ["replaced", "in a new model"])
def test_bases_of_a_replaced_head_are_dropped_and_named(grown: str) -> None:
    model = mlp(24, 32, 4)
    first, _ = protected(model)
    features = model[:2](OLD).detach()
    if grown == "replaced":
        model[2] = nn.Linear(32, 7)
    else:
        model = nn.Sequential(model[0], model[1], nn.Linear(32, 7))
    with pytest.warns(NullSpaceWarning, match=r"2\.weight, 2\.bias \(2 parameters\) were replaced"):
        second = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2, momentum=0.9), model)
    train(second, model, 30)
    assert relative_drift(model[:2](OLD), features) < 1e-5 and first._core.superseded
    second.consolidate([OLD], name="again", progress=False)
    before = model(OLD).detach()
    train(second, model, 30)
    assert relative_drift(model(OLD), before) < 1e-5


def test_the_same_layers_under_other_names_are_refused() -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model)
    other = nn.ModuleDict({"body": model})
    with pytest.raises(BasisFileError, match=r"0\.weight.*body\.0\.weight"):
        NullSpaceOptimizer(SGD(other.parameters(), lr=1e-2), other)
    train(first, model, 30)
    assert relative_drift(model(OLD), before) < 1e-5


@pytest.mark.parametrize("way", ["load", "load_state_dict", "consolidate"])
@pytest.mark.parametrize("taken", [True, False])
def test_bases_that_come_back_after_a_detach_protect_again(way: str, taken: bool, tmp_path: Path) -> None:
    model = mlp(24, 32, 4)
    first, before = protected(model)
    first.save(tmp_path / "bases.safetensors")
    state = first.state_dict()
    loads = {
        "load": lambda: first.load(tmp_path / "bases.safetensors"),
        "load_state_dict": lambda: first.load_state_dict(state),
    }
    if taken:
        second = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-2), model)
        for action in (lambda: first.release("0.weight"), first.reanchor, first.restore, *loads.values()):
            with pytest.raises(OptionError, match="took the bases of this one over"):
                action()
        with pytest.raises(OptionError, match="took the bases of this one over"):
            first.blend(copy.deepcopy(model.state_dict()), 0.5)
        train(second, model)
        assert relative_drift(model(OLD), before) < 1e-5
        second.detach()
        loads["load"]()
    else:
        first.detach()
    loads.get(way, lambda: first.consolidate([NEW[:3]], progress=False))()
    train(first, model)
    assert relative_drift(model(OLD), before) < 1e-5 and first.verify().ok
    first.detach()
    train(first, model)
    assert relative_drift(model(OLD), before) > 1e-3


def test_experts_do_not_come_back_after_a_detach() -> None:
    model = mlp(24, 32, 4)
    experts = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-2), model, mode=IGSP(target_modules=["0"], rank=2))
    state = experts.state_dict()
    experts.detach()
    with pytest.raises(OptionError, match="make a new NullSpaceOptimizer"):
        experts.load_state_dict(state)
