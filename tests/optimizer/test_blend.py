"""`blend`: part of the way back to earlier weights, with everything kept in its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nullspace_optim import IGSP, SGP, Energy, NullSpaceOptimizer, Policy
from nullspace_optim.errors import OptionError, ShapeError


def network() -> nn.Sequential:
    """Return a network with an embedding, a joint bias and batch statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 16), nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(policy: Policy, bias: str = "freeze") -> tuple[nn.Module, NullSpaceOptimizer, Tensor, dict[str, Tensor]]:
    """Consolidate rows that use six tokens, then train on all twelve: model, optimizer, old rows, weights before."""
    model = network()
    opt = NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, policy=policy, bias=bias)  # type: ignore[arg-type]
    old = torch.randint(0, 6, (24, 4))
    opt.consolidate([old], progress=False)
    before = state(model)
    for _ in range(20):
        opt.zero_grad()
        (model(torch.randint(0, 12, (16, 4))) - 1).square().mean().backward()
        opt.step()
    return model, opt, old, before


@pytest.mark.fault(135)
@pytest.mark.parametrize("bias", ["freeze", "joint"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weights_are_interpolated_and_what_is_kept_stays(share: float, bias: str) -> None:
    model, opt, _, before = trained(Energy(0.99), bias)
    after = state(model)
    opt.blend(before, share)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            expected = after[name] + share * (before[name] - after[name])
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert opt.verify().ok and opt.verify().worst < 1e-5


@pytest.mark.fault(135)
def test_weights_of_any_time_do_not_move_what_is_kept() -> None:
    model, opt, _, _ = trained(Energy(0.99))
    before = {
        name: torch.randn_like(value) if value.is_floating_point() else value for name, value in state(model).items()
    }
    opt.blend(before, 0.5)
    assert opt.verify().worst < 1e-5
    free = {name: basis for name, basis in opt.bases.items() if basis.kept is None and name.endswith("2.weight")}
    assert free and not torch.allclose(model.get_parameter("2.weight"), before["2.weight"])


def test_training_goes_on_and_soft_directions_move_by_their_share() -> None:
    model, opt, _, before = trained(SGP(0.9, alpha=3.0))
    after = state(model)
    opt.blend(before, 0.5)
    half = before["2.weight"] + 0.5 * (after["2.weight"] - before["2.weight"])
    weight = model.get_parameter("2.weight").detach()
    assert 0 < float((weight - after["2.weight"]).norm()) <= float((half - after["2.weight"]).norm())
    model(torch.randint(0, 12, (16, 4))).square().mean().backward()
    opt.step()
    assert opt.verify().ok


def test_bad_arguments_change_nothing_and_name_the_way_out() -> None:
    model, opt, _, before = trained(Energy(0.99))
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=r"share=1\.5"):
        opt.blend(before, 1.5)
    with pytest.raises(OptionError, match="'other' in `before` is not in Sequential"):
        opt.blend({"other": torch.zeros(1)}, 0.5)
    with pytest.raises(OptionError, match="clone"):
        opt.blend(model.state_dict(), 0.5)
    with pytest.raises(ShapeError, match=r"4\.weight"):
        opt.blend({**before, "4.weight": torch.zeros(3, 3)}, 0.5)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_half_precision_and_statistics_that_no_task_read_are_blended_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).bfloat16()
    opt = NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    before = state(model)
    model[0].weight.add_(1.0)
    model[1].running_mean.add_(2.0)  # type: ignore[operator, union-attr]
    opt.blend(before, 0.5)
    assert torch.allclose(model[0].weight, before["0.weight"] + 0.5, atol=2e-2)
    assert torch.allclose(model[1].running_mean, before["1.running_mean"] + 1.0, atol=2e-2)  # type: ignore[arg-type]


def moved_back(model: nn.Module, base: Any = None) -> dict[str, float]:
    """Add one to every parameter, blend all the way back, and return what differs, by name."""
    opt = NullSpaceOptimizer(base or torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    opt.blend(before, 1.0)
    return {name: float((value - before[name]).abs().max()) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["compiled part", "compiled", "parametrized", "tied"])
def test_names_of_wrapped_and_tied_weights_are_found(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if kind == "compiled part":
        model[0] = torch.compile(model[0], backend="eager")
    elif kind == "parametrized":
        nn.utils.parametrizations.spectral_norm(model[0])
    elif kind == "tied":
        model[1].weight = model[0].weight
        opt = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        before = {"1.weight": model[0].weight.detach() - 1}
        opt.blend(before, 1.0)
        assert torch.allclose(model[0].weight, before["1.weight"], atol=1e-6)
        return
    found = moved_back(torch.compile(model, backend="eager") if kind == "compiled" else model)  # type: ignore[arg-type]
    assert found and max(found.values()) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), "meta", None])
def test_values_that_are_none_are_refused_before_anything_moves(bad: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    opt = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before: Any = state(model)
    if isinstance(bad, float):
        before["1.weight"][0, 0] = bad
    else:
        before["1.weight"] = None if bad is None else before["1.weight"].to(bad)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    kept = state(model)
    for share in (0.0, 0.5):
        with pytest.raises(OptionError, match=r"'1\.weight'"):
            opt.blend(before, share)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_weights_that_a_base_keeps_beside_the_model_go_back_too() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    base = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    base.train()
    opt = NullSpaceOptimizer(base, model)
    before = state(model)
    for factor, rate in ((1.0, 1e-2), (0.0, 1e-12)):
        base.param_groups[0]["lr"] = rate
        for _ in range(20):
            opt.zero_grad()
            ((model(torch.randn(16, 8)) - 1).square().mean() * factor).backward()
            opt.step()
        if factor:
            opt.blend(before, 1.0)
    base.eval()
    assert float((model.weight - before["weight"]).abs().max()) < 1e-5


@pytest.mark.parametrize("statistics", ["train", "frozen"])
def test_statistics_that_train_go_back_and_are_not_restored(statistics: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    opt = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, norm_stats=statistics)
    opt.consolidate([torch.randn(20, 2) @ torch.randn(2, 8)], progress=False)
    before, kept = state(model), statistics == "frozen"
    with torch.no_grad():
        model[1].running_mean.add_(2.0)  # type: ignore[operator, union-attr]
    opt.restore()
    moved = model[1].running_mean.clone()  # type: ignore[operator, union-attr]
    assert torch.equal(moved, before["1.running_mean"]) is kept
    opt.blend({**before, "1.running_mean": before["1.running_mean"] - 2}, 0.5)
    assert torch.allclose(model[1].running_mean, before["1.running_mean"], atol=1e-6)  # type: ignore[arg-type]


def test_experts_are_not_blended() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = state(model)
    opt = NullSpaceOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, mode=IGSP(target_modules=["0"], rank=2)
    )
    with pytest.raises(OptionError, match=r"blend\(\) is for null-space protection"):
        opt.blend({name: value + 1 for name, value in before.items()}, 0.5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
