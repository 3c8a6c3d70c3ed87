"""State dicts, resume, copies and pickles: protection travels with the optimizer and is never lost in silence."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import take_steps
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import mlp, relative_drift

from nullspace_optim import (
    BasisFileError,
    NullSpaceOptimizer,
    NullSpaceWarning,
    NumericalRank,
    ShapeError,
    StaleAnchorError,
)
from nullspace_optim.errors import ModelNotFoundError

OLD = {6: torch.randn(6, 24, generator=torch.Generator().manual_seed(1)),
       20: torch.randn(20, 24, generator=torch.Generator().manual_seed(2))}  # fmt: skip
INPUTS = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
TARGETS = torch.randn(16, 8, generator=torch.Generator().manual_seed(4))


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))


def _adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def _two(model: nn.Module) -> list[Optimizer]:
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) is two] for two in (True, False))
    return [SGD(matrices, lr=0.05, momentum=0.9), AdamW(rest, lr=0.01)]


def _wrap(model: nn.Module, base: Any = _adamw, **options: Any) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(base(model), model, policy=NumericalRank(), **options)


def _train(optimizer: Optimizer, model: nn.Module, steps: int) -> None:
    take_steps(optimizer, lambda: (model(INPUTS) - TARGETS).square().mean(), steps)


def _through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "anchor-form": (6, {}),
    "difference-form": (20, {}),
    "fast": (6, {"precision": "fast"}),
    "fast-many": (20, {"precision": "fast"}),
    "both": (6, {"project": "both"}),
    "gradient": (6, {"project": "gradient"}),
    "joint": (6, {"bias": "joint"}),
    "several-bases": (20, {"base": _two}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("model_first", [True, False], ids=["model-first", "optimizer-first"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(name: str, model_first: bool) -> None:
    rank, options = CONFIGURATIONS[name]
    model = _model()
    optimizer = _wrap(model, **options)
    _train(optimizer, model, 3)
    optimizer.consolidate([OLD[rank]], progress=False)
    _train(optimizer, model, 21)
    saved = _through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    _train(optimizer, model, 21)

    fresh = _model(seed=5)
    resumed = _wrap(fresh, **options)
    if model_first:
        fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    fresh.load_state_dict(saved["model"])
    _train(resumed, fresh, 21)
    assert _equal(model, fresh)
    assert resumed.verify().kept == optimizer.verify().kept
    assert resumed.consolidate([INPUTS], progress=False).fates == optimizer.consolidate([INPUTS], progress=False).fates
    for key, basis in optimizer.bases.items():
        for side, subspace in basis.subspaces.items():
            assert torch.equal(subspace.basis, resumed.bases[key].subspaces[side].basis)


def test_state_dict_holds_tensors_and_plain_values_only() -> None:
    model = _model()
    optimizer = _wrap(model)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    optimizer.consolidate([OLD[6]], progress=False)
    _train(optimizer, model, 2)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "nullspace"}
    assert all(set(value) == {"step", "exp_avg", "exp_avg_sq"} for value in state["state"].values())
    leaves = torch.utils._pytree.tree_leaves(state)
    assert {type(leaf) for leaf in leaves} <= {Tensor, int, float, bool, str, type(None)}


def test_loading_leaves_its_argument_alone_and_may_be_repeated() -> None:
    model = _model()
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    _train(optimizer, model, 2)
    saved = _through_a_file(optimizer.state_dict())
    twin = copy.deepcopy(saved)
    for _ in range(3):
        optimizer.load_state_dict(saved)
    assert _same(saved, twin)
    _train(optimizer, model, 3)
    optimizer.reanchor()
    assert _same(saved["nullspace"], twin["nullspace"])
    assert len(optimizer.state_dict()["nullspace"]["metadata"]) > 0
    assert len(optimizer.bases["0.weight"].tasks) == 1


def _same(one: Any, two: Any) -> bool:
    (first, spec), (second, other) = (torch.utils._pytree.tree_flatten(state) for state in (one, two))
    return spec == other and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second))


@pytest.mark.fault(100)
def test_a_fingerprint_without_bases_is_an_error() -> None:
    model = _model()
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    saved = optimizer.state_dict()
    del saved["nullspace"]  # what torch.distributed.checkpoint drops
    fresh = _wrap(_model(), _adamw)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(BasisFileError, match=r"bases are missing.*opt\.load"):
        fresh.load_state_dict(saved)
    assert fresh.state_dict() == before
    optimizer.load_state_dict(saved)  # the same bases are there already


@pytest.mark.fault(100)
def test_bases_of_another_run_are_an_error() -> None:
    one, two = _wrap(model := _model()), _wrap(other := _model(1))
    one.consolidate([OLD[6]], progress=False)
    two.consolidate([OLD[6]], progress=False)
    saved = one.state_dict()
    saved["nullspace"] = two.state_dict()["nullspace"]
    with pytest.raises(BasisFileError, match="another run"):
        _wrap(fresh := _model()).load_state_dict(saved)
    assert model and other and fresh


@pytest.mark.fault(101)
def test_a_protected_checkpoint_loads_into_the_bare_base_and_back() -> None:
    model = _model()
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    _train(optimizer, model, 2)
    saved = _through_a_file(optimizer.state_dict())
    bare = _adamw(model)
    bare.load_state_dict(saved)
    with pytest.raises(BasisFileError, match="protected, but its bases are missing"):
        _wrap(fresh := _model()).load_state_dict(bare.state_dict())
    assert fresh is not None
    optimizer.load_state_dict(bare.state_dict())  # has the bases itself

    plain = _wrap(model, lambda _: bare)  # goes on without protection, knowingly
    _train(plain, model, 1)
    again = _wrap(third := _model())
    again.load_state_dict(plain.state_dict())
    _train(again, third, 1)


@pytest.mark.fault(101)
def test_a_checkpoint_without_protection_keeps_the_optimizers_own() -> None:
    model = _model()
    optimizer = _wrap(model)
    _train(optimizer, model, 1)
    saved = optimizer.state_dict()
    optimizer.consolidate([OLD[6]], progress=False)
    with pytest.warns(NullSpaceWarning, match="holds no bases; the 1 consolidated tasks stay protected"):
        optimizer.load_state_dict(saved)
    assert optimizer.bases["0.weight"].rank == 6


@pytest.mark.fault(93)
def test_bases_that_do_not_fit_change_nothing() -> None:
    model = _model()
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    _train(optimizer, model, 2)
    wider = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    other = _wrap(wider)
    _train(other, wider, 1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ShapeError, match=r"0\.weight.*\(40, 24\).*\(32, 24\)"):
        other.load_state_dict(optimizer.state_dict())
    after = other.state_dict()
    assert all(torch.equal(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"]) for i in after["state"])
    assert "nullspace" not in after


@pytest.mark.fault(100)
def test_weights_that_the_bases_were_not_made_for_are_found_at_the_next_step() -> None:
    model = _model()
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    saved = optimizer.state_dict()
    fresh = _model(seed=5)
    resumed = _wrap(fresh)
    resumed.load_state_dict(saved)
    with pytest.raises(StaleAnchorError, match=r"0\.weight"):
        _train(resumed, fresh, 1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("order", ["model-first", "optimizer-first"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.fault(34)
def test_a_copied_pair_goes_on_bitwise_and_independently(how: str, order: str, name: str) -> None:
    rank, options = CONFIGURATIONS[name]
    model = _model()
    optimizer = _wrap(model, **options)
    optimizer.note = "kept"
    optimizer.consolidate([OLD[rank]], progress=False)
    old = model.eval()(OLD[rank]).detach()
    _train(optimizer, model.train(), 5)
    pair = (model, optimizer) if order == "model-first" else (optimizer, model)
    copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    twin, other = copied if order == "model-first" else copied[::-1]
    assert type(other) is NullSpaceOptimizer
    assert other.note == "kept"
    assert repr(other) == repr(optimizer)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    _train(other, twin, 20)
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    _train(optimizer, model, 20)
    assert _equal(model, twin)
    if options.get("project") != "gradient":
        assert other.verify().worst == optimizer.verify().worst <= 1e-5
        assert rank == 20 or relative_drift(twin(OLD[rank]).detach(), old) <= 1e-5
    assert other.model is twin
    other.consolidate([INPUTS], progress=False)
    assert len(optimizer.bases["0.weight"].tasks) == 1
    other.detach()
    assert not twin._forward_pre_hooks


@pytest.mark.fault(34)
def test_a_copied_optimizer_alone_protects_its_own_parameters() -> None:
    model = _model()
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    twin = copy.deepcopy(optimizer)
    weights = twin.param_groups[0]["params"]
    start = [p.detach().clone() for p in weights]
    for p in weights:
        p.grad = torch.randn_like(p)
    twin.step()
    basis = twin.bases["0.weight"].U
    assert relative_drift(weights[0].detach() @ basis, start[0] @ basis) <= 1e-6
    assert not torch.equal(weights[0], start[0])
    assert torch.equal(weights[1], start[1])
    with pytest.raises(ModelNotFoundError, match="model="):
        twin.consolidate([OLD[6]], progress=False)


def test_a_copied_model_alone_carries_no_optimizer() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16))
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    assert b"AdamW" not in buffer.getvalue()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.eval()(INPUTS)
    _train_ema(optimizer, model, average)


def _train_ema(optimizer: Optimizer, model: nn.Module, average: Any) -> None:
    for _ in range(3):
        take_steps(optimizer, lambda: model(INPUTS).square().mean(), 1)
        average.update_parameters(model)


def test_batch_norm_of_a_copied_pair_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16))
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[6]], progress=False)
    twin, other = copy.deepcopy((model, optimizer))
    mean = twin[1].running_mean.clone()
    for _ in range(3):
        take_steps(other, lambda: twin(INPUTS).square().mean(), 1)
    assert torch.equal(twin[1].running_mean, mean)
    other.detach()
    twin(INPUTS)
    assert not torch.equal(twin[1].running_mean, mean)


@pytest.mark.parametrize("rank", [6, 20])
def test_saved_bases_protect_in_another_process(tmp_path: Any, rank: int) -> None:
    model = _model()
    optimizer = _wrap(model)
    optimizer.consolidate([OLD[rank]], progress=False)
    _train(optimizer, model, 5)
    optimizer.save(tmp_path / "bases.safetensors")
    weights = copy.deepcopy(model.state_dict())
    fresh = _model(7)
    fresh.load_state_dict(weights)
    other = _wrap(fresh)
    other.load(tmp_path / "bases.safetensors")
    other.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bases.safetensors").read_bytes()
    kept = fresh[0].weight.detach() @ other.bases["0.weight"].U
    _train(other, fresh, 30)
    assert relative_drift(fresh[0].weight.detach() @ other.bases["0.weight"].U, kept) <= 1e-5
    assert other.verify().ok
    assert other.verify([OLD[rank]]).drift("task 1") <= 1e-5 or rank == 20


def test_a_plain_small_model_is_found_for_a_loaded_state() -> None:
    model = mlp()
    optimizer = NullSpaceOptimizer(_adamw(model))
    optimizer.consolidate([OLD[6]], progress=False)
    twin = copy.deepcopy(model.state_dict())
    fresh = mlp()
    fresh.load_state_dict(twin)
    other = NullSpaceOptimizer(_adamw(fresh))
    other.load_state_dict(optimizer.state_dict())
    assert other.model is fresh
    assert other.bases["0.weight"].rank == optimizer.bases["0.weight"].rank
