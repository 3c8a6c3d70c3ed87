"""Training loops that move the weights between two steps and put them back: SAM, averages, extrapolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import NEW, OLD, mlp, relative_drift, wrap

from nullspace_optim import SGP, FixedRank, NullSpaceOptimizer, StaleAnchorError

Loop = Callable[[Any, nn.Module, int], None]


def loss(model: nn.Module) -> Tensor:
    value: Tensor = (model(NEW.to(model[0].weight.dtype)) - 1).square().mean()
    return value


def sam(optimizer: Any, model: nn.Module, number: int, adaptive: bool = False) -> None:
    """Foret et al. 2021; with `adaptive` Kwon et al. 2021."""
    loss(model).backward()
    found = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        directions = [p.grad * (p.square() if adaptive else 1) for p in found]
        norm = torch.stack([d.norm() for d in directions]).norm()
        moves = [d * (0.1 / norm) for d in directions]
        torch._foreach_add_(found, moves)
    optimizer.zero_grad()
    loss(model).backward()
    with torch.no_grad():
        torch._foreach_sub_(found, moves)
    optimizer.step()
    optimizer.zero_grad()


def asam(optimizer: Any, model: nn.Module, number: int) -> None:
    sam(optimizer, model, number, adaptive=True)


def through_data(optimizer: Any, model: nn.Module, number: int) -> None:
    """SAM that keeps the old tensor and gives it back by `p.data = `."""
    loss(model).backward()
    old = [p.data for p in model.parameters()]
    for p in model.parameters():
        if p.grad is not None:
            p.data = p.data + 0.1 * p.grad
    optimizer.zero_grad()
    loss(model).backward()
    for p, value in zip(model.parameters(), old):
        p.data = value
    optimizer.step()
    optimizer.zero_grad()


def lookahead(optimizer: Any, model: nn.Module, number: int) -> None:
    """Zhang et al. 2019: every fifth step the weights go half the way back to the slow ones."""
    if number == 0:
        optimizer.slow = [p.detach().clone() for p in model.parameters()]
    plain(optimizer, model, number)
    if number % 5 == 4:
        with torch.no_grad():
            for p, slow in zip(model.parameters(), optimizer.slow):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


def extrapolation(optimizer: Any, model: nn.Module, number: int) -> None:
    """Extragradient (Korpelevich 1976): a step to look ahead, back, and a step with the gradient found there."""
    start = [p.detach().clone() for p in model.parameters()]
    plain(optimizer, model, number)
    loss(model).backward()
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), start)
    optimizer.step()
    optimizer.zero_grad()


def average(optimizer: Any, model: nn.Module, number: int) -> None:
    """An average of the weights, swapped in for an evaluation and out again."""
    if number == 0:
        optimizer.average = [p.detach().clone() for p in model.parameters()]
    plain(optimizer, model, number)
    with torch.no_grad():
        torch._foreach_lerp_(optimizer.average, list(model.parameters()), 0.1)
        trained = [p.detach().clone() for p in model.parameters()]
        torch._foreach_copy_(list(model.parameters()), optimizer.average)
        model.eval()(OLD.to(model[0].weight.dtype))
        model.train()
        torch._foreach_copy_(list(model.parameters()), trained)


def plain(optimizer: Any, model: nn.Module, number: int) -> None:
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


LOOPS: list[Loop] = [sam, asam, through_data, lookahead, extrapolation, average]
OPTIONS: dict[str, dict[str, Any]] = {
    "anchor": {},
    "difference": {"policy": FixedRank(15)},
    "fast": {"precision": "fast"},
    "both": {"project": "both"},
    "joint": {"bias": "joint"},
}


@pytest.mark.fault(129)
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_loops_that_move_weights_between_steps_keep_what_is_kept(loop: Loop, options: str, base: Any) -> None:
    model = mlp()
    optimizer = wrap(model, base(model.parameters(), lr=0.01), **OPTIONS[options])
    optimizer.consolidate([OLD], progress=False)
    frozen = {n: b.kept.clone() for n, b in optimizer.bases.items() if b.kept is not None}
    before, first = model(OLD).detach(), float(loss(model).detach())
    for number in range(60):
        loop(optimizer, model, number)
    plain(optimizer, model, 0)
    assert optimizer.verify().ok
    assert options == "difference" or relative_drift(model(OLD), before) <= 1e-5
    assert all(relative_drift(model.get_parameter(n), value) <= 1e-6 for n, value in frozen.items())
    assert float(loss(model).detach()) < first


@pytest.mark.parametrize("loop", [sam, asam])
def test_rounding_of_moves_by_hand_does_not_add_up_in_frozen_parameters(loop: Loop) -> None:
    model = mlp()
    optimizer = wrap(model, SGD(model.parameters(), lr=0.01))
    optimizer.consolidate([OLD], progress=False)
    bias = model[0].bias.detach().clone()
    for number in range(200):
        loop(optimizer, model, number)
        assert torch.equal(model[0].bias, bias)


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("loop", [sam, asam, through_data])
def test_soft_policies_and_half_precision_go_with_moves_by_hand(loop: Loop) -> None:
    for dtype, options in ((torch.float32, {"policy": SGP(0.9)}), (torch.bfloat16, {})):
        model = mlp(dtype=dtype)
        optimizer = wrap(model, SGD(model.parameters(), lr=0.01), **options)
        optimizer.consolidate([OLD.to(dtype)], progress=False)
        for number in range(20):
            loop(optimizer, model, number)
        assert optimizer.verify().ok


@pytest.mark.fault(129)
def test_a_perturbation_that_is_not_removed_is_refused_with_both_ways_out() -> None:
    model = mlp()
    optimizer = wrap(model, SGD(model.parameters(), lr=0.01))
    optimizer.consolidate([OLD], progress=False)
    before = model(OLD).detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    with pytest.raises(StaleAnchorError, match=r"changed outside.*opt\.reanchor\(\).*opt\.restore\(\)"):
        plain(optimizer, model, 0)
    optimizer.restore()
    plain(optimizer, model, 0)
    assert relative_drift(model(OLD), before) <= 1e-5


def test_slow_weights_from_before_a_consolidation_are_refused() -> None:
    model = mlp()
    optimizer = wrap(model, SGD(model.parameters(), lr=0.05))
    slow = [p.detach().clone() for p in model.parameters()]
    for number in range(20):
        plain(optimizer, model, number)
    optimizer.consolidate([OLD], progress=False)
    before = model(OLD).detach()
    with torch.no_grad():
        for p, value in zip(model.parameters(), slow):
            p.lerp_(value, 0.5)
    with pytest.raises(StaleAnchorError, match=r"opt\.restore\(\)"):
        plain(optimizer, model, 0)
    optimizer.restore()
    assert isinstance(optimizer, NullSpaceOptimizer)
    plain(optimizer, model, 0)
    assert relative_drift(model(OLD), before) <= 1e-5 and optimizer.verify().ok
