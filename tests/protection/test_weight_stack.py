"""Small weights of one shape, corrected together: the same weights as one by one, to float32 rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from nullspace_optim import OSF, SGP, FixedRank, NullSpaceOptimizer, NumericalRank
from nullspace_optim.protection import weight_stack

ROWS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


class Deep(nn.Module):
    """Six layers of one shape `[16, 16]` after another."""

    def __init__(self, layers: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


class Convolutions(nn.Module):
    """Five grouped convolutions in channels-last order, and five used as `x @ P`."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False) for _ in range(5))
        self.to(memory_format=torch.channels_last)
        self.left = nn.ParameterList(nn.Parameter(torch.randn(16, 16) / 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        image = x.reshape(-1, 16, 1, 1).expand(-1, 16, 2, 2)
        for conv in self.convs:
            image = image + conv(image).tanh()
        x = image.mean((2, 3))
        for matrix in self.left:
            x = x + (x @ matrix).tanh()
        return x


def run(model: nn.Module, fewest: int, base: Any = AdamW, steps: int = 20, **options: Any) -> NullSpaceOptimizer:
    """Consolidate and train `model` where so many weights make a stack."""
    options = {"policy": FixedRank(5), "project": "update", **options}
    before, weight_stack.FEWEST = weight_stack.FEWEST, fewest
    try:
        optimizer = NullSpaceOptimizer(base(model.parameters(), lr=1e-2), model, **options)
        dtype = next(model.parameters()).dtype
        optimizer.consolidate([ROWS.to(dtype)], progress=False)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(NEW.to(dtype)) - 1).square().mean().backward()
            optimizer.step()
    finally:
        weight_stack.FEWEST = before
    return optimizer


def stacked(optimizer: NullSpaceOptimizer) -> int:
    return sum(len(stack.guards) for stack in optimizer._core.protection.forms.stacks)


@pytest.mark.parametrize(
    "options", [{}, {"bias": "joint"}, {"policy": FixedRank(12)}, {"policy": OSF(0.3)}, {"project": "both"}], ids=str
)
@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("kind", [Deep, Convolutions])
def test_together_and_one_by_one_give_the_same_weights(kind: Any, base: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = kind()
    twin, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    one, other = run(model, 4, base, **options), run(twin, 100, base, **options)
    assert stacked(one) >= 5 and stacked(other) == 0
    for name, parameter in model.named_parameters():
        moved = (parameter - start[name]).norm()
        apart = float((parameter - twin.get_parameter(name)).norm())
        assert apart <= 1e-5 * float(parameter.norm()) or apart <= 1e-3 * float(moved), name
        assert parameter.stride() == start[name].stride()
    assert one.verify().worst <= max(1e-6, 2 * other.verify().worst)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_hold_as_exactly_together_as_one_by_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Deep().to(dtype)
    twin = copy.deepcopy(model)
    one, other = run(model, 4, SGD), run(twin, 100, SGD)
    assert stacked(one) == 6
    assert one.verify().worst <= 1.01 * other.verify().worst + (1e-14 if dtype == torch.float64 else 0.0)
    assert one.verify().ok


class Beside(nn.Module):
    """Six layers beside one another: layer `n` meets rows of rank `n + 2`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x * (torch.arange(16) < n + 2)) for n, layer in enumerate(self.layers))  # type: ignore[return-value]


def test_ranks_that_differ_are_padded_and_each_weight_keeps_its_own() -> None:
    torch.manual_seed(0)
    model = Beside()
    optimizer = run(model, 4, SGD, steps=0, policy=NumericalRank())
    assert [basis.rank for basis in optimizer.bases.values()] == [2, 3, 4, 5, 6, 7] and stacked(optimizer) == 6
    before, start = model(ROWS).detach(), copy.deepcopy(model.state_dict())
    for _ in range(20):
        optimizer.zero_grad()
        sum((layer(NEW) - 1).square().mean() for layer in model.layers).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert float((model(ROWS) - before).norm() / before.norm()) <= 1e-5
    assert all(float((p - start[name]).norm()) > 1e-3 for name, p in model.named_parameters())
    assert optimizer.verify().worst <= 1e-5


def test_weights_of_a_stack_that_did_not_move_stay_bitwise() -> None:
    torch.manual_seed(0)
    model = Deep(bias=False)
    optimizer = run(model, 4, SGD, steps=3)
    quiet = [model.layers[1].weight, model.layers[4].weight]
    before = [p.detach().clone() for p in quiet]
    for _ in range(5):
        optimizer.zero_grad()
        (model(NEW) - 1).square().mean().backward()
        for parameter in quiet:
            parameter.grad = None
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(quiet, before))
    assert optimizer.verify().worst <= 1e-6


def test_a_stack_across_two_bases_is_corrected_by_each_for_its_own() -> None:
    torch.manual_seed(0)
    model = Deep(bias=False)
    one, two = list(model.parameters())[:3], list(model.parameters())[3:]
    optimizer = NullSpaceOptimizer([SGD(one, lr=0.05), AdamW(two, lr=1e-2)], model, policy=FixedRank(5))
    optimizer.consolidate([ROWS], progress=False)
    assert stacked(optimizer) == 6
    for _ in range(10):
        optimizer.zero_grad()
        (model(NEW) - 1).square().mean().backward()
        optimizer.step()
    assert optimizer.verify().worst <= 1e-6


@pytest.mark.parametrize("then", ["reanchor", "release", "consolidate", "load", "swap"])
def test_stacks_follow_every_change_of_bases_and_parameters(then: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Deep(bias=False)
    optimizer = run(model, 4, SGD, steps=3)
    if then == "reanchor":
        with torch.no_grad():
            model.layers[0].weight.mul_(1.5)
        optimizer.reanchor()
    elif then == "release":
        optimizer.release("layers.0.weight")
        assert stacked(optimizer) == 5
    elif then == "consolidate":
        optimizer.consolidate([NEW[:2]], progress=False)
    elif then == "load":
        optimizer.save(tmp_path / "bases.safetensors")
        optimizer.load(tmp_path / "bases.safetensors")
    else:
        fresh = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
        model.load_state_dict(fresh, assign=True)
        optimizer.param_groups[0]["params"][:] = list(model.parameters())
    kept = {name: model.get_parameter(name).detach() @ basis.U for name, basis in optimizer.bases.items()}
    kept = {name: value.clone() for name, value in kept.items()}
    for _ in range(10):
        optimizer.zero_grad()
        (model(NEW) - 1).square().mean().backward()
        optimizer.step()
    for name, basis in optimizer.bases.items():
        now = model.get_parameter(name).detach() @ basis.U
        assert float((now - kept[name]).norm() / kept[name].norm()) <= 1e-5, name
    assert optimizer.verify().worst <= 1e-5


def test_soft_weights_and_large_ones_stay_alone() -> None:
    torch.manual_seed(0)
    assert stacked(run(Deep(bias=False), 4, policy=SGP(0.9))) == 0
    wide = nn.Sequential(*[nn.Linear(72, 72, bias=False) for _ in range(5)])
    optimizer = NullSpaceOptimizer(SGD(wide.parameters(), lr=0.01), wide, policy=FixedRank(5))
    optimizer.consolidate([torch.randn(20, 72)], progress=False)
    assert stacked(optimizer) == 0


@pytest.mark.parametrize(("project", "products"), [("update", 2), ("both", 4)])
def test_layers_of_one_shape_take_two_products_a_projection(project: str, products: int) -> None:
    def calls(layers: int) -> int:
        torch.manual_seed(0)
        model = Deep(layers, bias=False)
        optimizer = run(model, 4, SGD, steps=2, project=project)
        optimizer.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (model(NEW) - 1).square().mean().backward()  # whose own products are `mm`
            optimizer.step()
        return sum(event.count for event in profile.key_averages() if "bmm" in event.key)

    assert calls(6) == calls(24) == products
