"""Edits from outside, release, detach, both gradient modes, layouts of guarded weights, norm statistics on demand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from training import NEW, OLD, mlp, relative_drift, train

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank, StaleAnchorError
from nullspace_optim.errors import OptionError


def _wrap(model: nn.Module, **options: Any) -> NullSpaceOptimizer:
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank(), **options)
    optimizer.consolidate([OLD], progress=False)
    return optimizer


EDITS: dict[str, Any] = {
    "load_state_dict": lambda model: model.load_state_dict(mlp().state_dict()),
    "data": lambda model: setattr(model[0].weight, "data", torch.randn(16, 24)),
    "in-place": lambda model: torch._foreach_mul_([model[2].weight.detach()], 1.1),
    "frozen bias": lambda model: model[0].bias.detach().add_(0.1),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("then", ["step", "consolidate", "save"])
@pytest.mark.fault(23)
def test_an_edit_from_outside_is_found_and_never_reverted(edit: str, then: str, tmp_path: Any) -> None:
    model = mlp()
    optimizer = _wrap(model)
    train(optimizer, model, 2)
    EDITS[edit](model)
    edited = copy.deepcopy(model.state_dict())
    with pytest.raises(StaleAnchorError, match=r"'[02]\.(weight|bias)' was changed outside.*opt\.reanchor\(\)"):
        if then == "step":
            train(optimizer, model, 1)
        elif then == "consolidate":
            optimizer.consolidate([OLD], progress=False)
        else:
            optimizer.save(tmp_path / "bases.safetensors")
    assert all(torch.equal(value, edited[name]) for name, value in model.state_dict().items())
    assert not optimizer.verify().ok
    optimizer.reanchor()
    outputs = [layer(OLD @ torch.eye(24)[:, : layer.in_features]) for layer in (model[0],)]
    train(optimizer, model, 5)
    assert optimizer.verify().ok
    assert relative_drift(model[0](OLD), outputs[0]) <= 1e-5


@pytest.mark.parametrize("name", ["0.bias", "2.weight"])
@pytest.mark.fault(23)
def test_an_edit_through_data_is_found_before_it_is_consolidated_or_saved(name: str, tmp_path: Any) -> None:
    model = mlp()
    optimizer = _wrap(model)
    model.get_parameter(name).data.mul_(1.1)  # neither storage nor version tells
    assert not optimizer.verify().ok
    with pytest.raises(StaleAnchorError, match=name):
        optimizer.consolidate([OLD], progress=False)
    with pytest.raises(StaleAnchorError, match=name):
        optimizer.save(tmp_path / "bases.safetensors")


@pytest.mark.fault(23)
def test_an_ema_swap_that_is_restored_is_accepted() -> None:
    model = mlp()
    optimizer = _wrap(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    train(optimizer, model, 5)
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(average.module.state_dict())
    model(OLD)
    model.load_state_dict(kept)
    before = model(OLD).detach()
    train(optimizer, model, 5)
    assert relative_drift(model(OLD), before) <= 1e-5


def test_weights_of_the_old_task_itself_may_be_loaded_back() -> None:
    model = mlp()
    optimizer = _wrap(model)
    start = copy.deepcopy(model.state_dict())
    train(optimizer, model, 5)
    model.load_state_dict(start)
    train(optimizer, model, 5)
    assert optimizer.verify().ok


def test_release_gives_a_parameter_up_until_it_is_met_again() -> None:
    model = mlp()
    optimizer = _wrap(model)
    optimizer.release("0.bias")
    optimizer.release("0.weight")
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=r"release\('0.wait'\).*2\.weight"):
        optimizer.release("0.wait")
    train(optimizer, model, 5)
    assert not torch.equal(model[0].bias, start["0.bias"])
    assert relative_drift(model[0].weight @ OLD.T, start["0.weight"] @ OLD.T) > 1e-3
    assert torch.equal(model[2].bias, start["2.bias"])
    optimizer.consolidate([OLD], progress=False)
    assert optimizer.bases["0.bias"].fate is Fate.FROZEN
    assert optimizer.bases["0.weight"].tasks == ("task 2",)


def test_detach_removes_every_hook_and_returns_the_base() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    base = AdamW(model.parameters(), lr=0.01)
    optimizer = NullSpaceOptimizer(base, model, project="both")
    optimizer.consolidate([OLD], progress=False)
    assert optimizer.detach() is base
    assert not base._optimizer_step_pre_hooks
    assert not base._optimizer_step_post_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    train(base, model, 3)
    assert not torch.equal(model[0].bias, before["0.bias"])
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    two = NullSpaceOptimizer([SGD(model[:1].parameters()), SGD(model[1:].parameters())])
    assert two.detach() == two._core.bases


def test_projecting_only_gradients_leaks_under_decay_as_published_methods_do() -> None:
    drift = {}
    for project in ("update", "gradient", "both"):
        torch.manual_seed(0)
        model = mlp()
        base = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = NullSpaceOptimizer(base, model, policy=NumericalRank(), project=project)
        optimizer.consolidate([OLD], progress=False)
        train(optimizer, model, 100)
        drift[project] = optimizer.verify().worst
    assert drift["gradient"] > 1e-2
    assert max(drift["update"], drift["both"]) <= 1e-5


def test_projecting_as_gradients_accumulate_frees_the_clipping_norm() -> None:
    model = mlp()
    optimizer = _wrap(model, project="both")
    optimizer.zero_grad()
    model(NEW).square().mean().backward()
    model(OLD).square().mean().backward()
    assert _small(model[0].weight.grad @ OLD.T, model[0].weight.grad)
    assert not _small(model[0].weight.grad @ NEW.T, model[0].weight.grad)


def _small(part: Tensor, whole: Tensor) -> bool:
    return bool(part.norm() <= 1e-5 * whole.norm())


@pytest.mark.parametrize("rows", [5, 18], ids=["few kept", "most kept"])
def test_gradients_are_projected_alike_through_a_basis_and_its_complement(rows: int) -> None:
    old = torch.randn(rows, 24, generator=torch.Generator().manual_seed(2))
    model = nn.Linear(24, 6, bias=False)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=NumericalRank(), project="gradient")
    optimizer.consolidate([old], progress=False)
    model(NEW).square().mean().backward()
    assert model.weight.grad is not None
    basis, gradient = optimizer.bases["weight"].U.double(), model.weight.grad.double()
    assert basis.shape[1] == rows
    optimizer.step()
    assert torch.allclose(model.weight.grad.double(), gradient - gradient @ basis @ basis.T, atol=1e-6)


@pytest.mark.fault(12)
def test_sparse_gradients_cannot_be_projected_and_the_error_says_what_to_do() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, project="gradient")
    optimizer.consolidate([torch.tensor([[1, 2]])], progress=False)
    model(torch.tensor([[1, 3]])).square().mean().backward()
    with pytest.raises(OptionError, match=r"'0\.weight' has a sparse gradient.*project=\"update\""):
        optimizer.step()


@pytest.mark.parametrize("kind", ["contiguous", "channels-last", "expanded-stride", "float64", "left", "grouped"])
@pytest.mark.parametrize("base", [AdamW, SGD, LBFGS], ids=lambda b: b.__name__)
@pytest.mark.fault(15, 16, 18)
def test_weights_of_every_layout_keep_their_strides_and_their_outputs(kind: str, base: Any) -> None:
    if base is LBFGS and kind in ("channels-last", "expanded-stride"):
        pytest.skip("torch's LBFGS takes contiguous parameters only")

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    old, new = torch.randn(1, 6, 4, 4), torch.randn(8, 6, 4, 4)
    if kind in ("contiguous", "channels-last", "grouped"):
        model: nn.Module = nn.Conv2d(6, 6, 2, stride=2, groups=3 if kind == "grouped" else 1, bias=False)
        old = old[..., :2] if kind == "grouped" else old
        model = model.to(memory_format=torch.channels_last) if kind == "channels-last" else model
    else:
        model, old, new = Left() if kind == "left" else nn.Linear(24, 6, bias=False), OLD, NEW
    if kind == "expanded-stride":
        model.weight = nn.Parameter(torch.randn(24, 6).T)
    if kind == "float64":
        model, old, new = model.double(), old.double(), new.double()
    optimizer = NullSpaceOptimizer(base(model.parameters(), lr=0.05), model, policy=NumericalRank())
    optimizer.consolidate([old], progress=False)
    assert optimizer.bases["weight"].fate is Fate.PROTECTED
    before, stride, weight = model(old).detach(), model.weight.stride(), model.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(new) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    assert model.weight.stride() == stride
    assert relative_drift(model(old), before) <= 1e-5
    assert relative_drift(model.weight, weight) > 1e-3


def test_evaluation_sees_exact_weights_in_the_difference_form() -> None:
    model = nn.Sequential(nn.Linear(24, 16))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank(), precision="fast")
    optimizer.consolidate([OLD], progress=False)
    before = model.eval()(OLD).detach()
    train(optimizer, model.train(), 5)
    assert optimizer._core.protection.owed["pending"] == ["0.weight"]
    assert relative_drift(model.eval()(OLD), before) <= 1e-5
    assert optimizer._core.protection.owed == {"inexact_steps": 0, "pending": []}


def test_an_evaluation_between_forward_and_backward_is_harmless() -> None:
    model = mlp()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank(), precision="fast")
    optimizer.consolidate([OLD], progress=False)
    train(optimizer, model, 3)
    loss = model(NEW).square().mean()
    with torch.no_grad():
        model.eval()(OLD)
    model.train()
    loss.backward()
    optimizer.step()
    assert optimizer.verify().ok


def test_a_joint_bias_in_another_optimizer_is_protected_as_well() -> None:
    model = mlp()
    bases = [AdamW([p for p in model.parameters() if p.ndim == n], lr=0.01) for n in (2, 1)]
    optimizer = NullSpaceOptimizer(bases, model, policy=NumericalRank(), bias="joint")
    optimizer.consolidate([OLD], progress=False)
    before = model(OLD)
    train(optimizer, model, 20)
    assert relative_drift(model(OLD), before) <= 1e-5
    assert optimizer.verify().ok


def test_an_edit_of_a_joint_bias_is_found() -> None:
    model = mlp()
    optimizer = _wrap(model, bias="joint")
    model[0].bias.detach().add_(3)
    with pytest.raises(StaleAnchorError, match=r"'0\.weight'"):
        train(optimizer, model, 1)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, "freeze"), (torch.float32, "joint")])
def test_verify_between_forward_and_backward_is_harmless(dtype: torch.dtype, bias: str) -> None:
    model = mlp().to(dtype)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, bias=bias)  # type: ignore[arg-type]
    optimizer.consolidate([OLD.to(dtype)], progress=False)
    loss = model(NEW.to(dtype)).square().mean()
    optimizer.verify()
    loss.backward()


def test_release_of_one_parameter_keeps_what_others_owe_and_known_edits() -> None:
    model = mlp()
    optimizer = _wrap(model, precision="fast")
    train(optimizer, model, 5)
    optimizer.release("2.bias")
    assert optimizer.verify().ok
    model[0].weight.detach().add_(1)
    optimizer.release("0.bias")
    with pytest.raises(StaleAnchorError, match=r"'0\.weight'"):
        train(optimizer, model, 1)


def test_release_of_a_joint_weight_releases_its_bias() -> None:
    model = mlp()
    optimizer = _wrap(model, bias="joint")
    optimizer.release("0.weight")
    assert set(optimizer.bases) == {"2.weight", "2.bias"}


class Old(torch.optim.Optimizer):
    """An optimizer of the old style: decay of every parameter, written through `.data`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data.mul_(0.99)
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-0.01)


def test_an_optimizer_that_writes_through_data_cannot_move_frozen_parameters() -> None:
    model = mlp()
    optimizer = NullSpaceOptimizer(Old(model.parameters()), model, policy=NumericalRank())
    optimizer.consolidate([OLD], progress=False)
    before = model(OLD)
    train(optimizer, model, 20)
    assert relative_drift(model(OLD), before) <= 1e-5
    assert optimizer.verify().ok


class Scaled(nn.Module):
    """A layer with a scalar beside it, like the `logit_scale` of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.scale * self.layer(x)
        return scaled


def test_a_frozen_scalar_can_be_anchored_anew() -> None:
    model = Scaled()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank())
    optimizer.consolidate([OLD], progress=False)
    model.scale.data = torch.tensor(3.0)
    optimizer.reanchor()
    train(optimizer, model, 2)
    assert float(model.scale.detach()) == 3.0 and optimizer.verify().ok
