"""The first gradients after a consolidation: a task that finds hardly any free direction is told so, once."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nullspace_optim import FixedRank, NullSpaceOptimizer, NullSpaceWarning

MESSAGE = r"only ([\d.]+)% of the new task's gradient"


def rows(start: int, count: int, noise: float = 0.0) -> Tensor:
    """Return rows that lie in eight of 32 coordinates, with a little of all."""
    batch = noise * torch.randn(count, 32)
    batch[:, start : start + 8] += torch.randn(count, 8)
    return batch


def shares(optimizer: NullSpaceOptimizer, model: nn.Module, batch: Tensor) -> list[str]:
    """Take one step on `batch` and return the shares that were warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    found = [re.search(MESSAGE, str(one.message)) for one in caught if issubclass(one.category, NullSpaceWarning)]
    return [match[1] for match in found if match]


@pytest.mark.fault(133)
@pytest.mark.parametrize("project", ["update", "both", "gradient"])
def test_a_task_with_the_same_inputs_is_named_once(project: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 4, bias=False)
    optimizer = NullSpaceOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), model, policy=FixedRank(8), project=project
    )
    assert not shares(optimizer, model, rows(0, 16))
    optimizer.consolidate([rows(0, 64)], progress=False)
    same = rows(0, 16, noise=1e-3)
    weight, basis = model.weight.detach().clone(), optimizer.bases["weight"].U
    gradient = 2 * (same @ weight.T).T @ same
    expected = float((gradient - gradient @ basis @ basis.T).norm() / gradient.norm())
    assert expected < 0.03
    (found,) = shares(optimizer, model, same)
    assert float(found) == pytest.approx(100 * expected, abs=0.051)
    assert not shares(optimizer, model, same)
    optimizer.consolidate([rows(8, 64)], progress=False)
    assert not shares(optimizer, model, rows(16, 16))
    optimizer.consolidate([rows(16, 64)], progress=False)
    assert len(shares(optimizer, model, rows(0, 16, noise=1e-3))) == 1


def test_frozen_parameters_count_and_gradients_stay_what_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 4, bias=False), nn.LayerNorm(4))
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = NullSpaceOptimizer(base, model, policy=FixedRank(8), project="update")
    optimizer.consolidate([rows(0, 64)], progress=False)
    batch = rows(16, 16)  # all of the weight's gradient is free
    expected = torch.autograd.grad(model(batch).square().sum(), list(model.parameters()))
    model[1].weight.grad = None
    assert float(expected[0].norm()) < 0.03 * sum(float(one.norm()) for one in expected[1:])
    assert len(shares(optimizer, model, batch)) == 1
    for parameter, gradient in zip(model.parameters(), expected):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)


def test_a_closure_is_measured_and_a_step_without_gradients_is_not() -> None:
    model = nn.Linear(32, 4, bias=False)
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, policy=FixedRank(8))
    optimizer.consolidate([rows(0, 64)], progress=False)
    optimizer.step()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(rows(0, 16)).square().sum()
        loss.backward()
        return loss

    with pytest.warns(NullSpaceWarning, match=MESSAGE):
        optimizer.step(closure)


@pytest.mark.parametrize("first", ["zero", "overflow", "discarded"])
@pytest.mark.parametrize("project", ["update", "both"])
def test_only_gradients_that_are_stepped_count(project: Any, first: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 4, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = NullSpaceOptimizer(base, model, policy=FixedRank(8), project=project)
    optimizer.consolidate([rows(0, 64)], progress=False)
    if first == "discarded":
        model(rows(16, 16)).square().sum().backward()
    else:
        (model(rows(0, 16)) * (0.0 if first == "zero" else float("inf"))).sum().backward()
    if first == "zero":
        optimizer.step()
    optimizer.zero_grad()
    assert len(shares(optimizer, model, rows(0, 16))) == 1


@pytest.mark.parametrize("flip", [False, True])
def test_gradients_of_all_bases_and_of_free_parameters_count(flip: bool) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(32, 4, bias=False), nn.Linear(32, 4, bias=False)
    model = nn.ModuleList([one, two])
    bases = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (one, two)]
    optimizer = NullSpaceOptimizer(bases[::-1] if flip else bases, model, policy=FixedRank(8))
    optimizer.consolidate([rows(0, 64)], forward=lambda batch: one(batch) + two(batch), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NullSpaceWarning)
        (one(rows(0, 16)).square().sum() + 100 * two(rows(16, 16)).square().sum()).backward()
        optimizer.step()


def test_a_new_head_that_can_learn_is_no_reason_to_warn() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(32, 8, bias=False), "head": nn.Linear(8, 4)})
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, policy=FixedRank(8))
    optimizer.consolidate([rows(0, 64)], forward=lambda batch: model["body"](batch), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NullSpaceWarning)
        model["head"](model["body"](rows(0, 16))).square().sum().backward()
        optimizer.step()


def test_weights_with_a_joint_bias_count_and_keep_their_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
    base = torch.optim.SGD(model.parameters(), lr=1e-4)
    optimizer = NullSpaceOptimizer(base, model, policy=FixedRank(8), bias="joint", project="update")
    optimizer.consolidate([rows(0, 64)], progress=False)
    assert optimizer.bases["0.weight"].bias == "0.bias"
    batch, weight = 1e3 * rows(16, 16), torch.randn(16, 8)  # the norm divides by its inputs' size: no small gradients
    with warnings.catch_warnings():
        warnings.simplefilter("error", NullSpaceWarning)
        ((model(batch) * weight).sum() + 1e-3 * (model[0](batch) * weight).sum()).backward()
        expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
    for parameter, gradient in zip(model.parameters(), expected):
        assert parameter.grad is not None and gradient is not None and torch.equal(parameter.grad, gradient)


def test_norms_of_half_precision_do_not_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).half()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = NullSpaceOptimizer(base, model, policy=FixedRank(4))
    frame = torch.randn(4, 64)
    optimizer.consolidate([(torch.randn(64, 4) @ frame).half()], progress=False)
    assert not shares(optimizer, model, ((torch.randn(1, 4) @ frame + torch.randn(1, 64)) * 50).half())


@pytest.mark.fault(134)
def test_what_is_left_by_rounding_is_no_gradient() -> None:
    """All of the gradient is kept: AdamW must not blow its rounding up to whole steps."""
    torch.manual_seed(0)
    model = nn.Linear(32, 4, bias=False)
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    optimizer = NullSpaceOptimizer(base, model, policy=FixedRank(8), project="both")
    optimizer.consolidate([rows(0, 64)], progress=False)
    before = model.weight.detach().clone()
    for _ in range(10):
        shares(optimizer, model, rows(0, 16))
    assert float((model.weight - before).abs().max()) < 1e-5


@pytest.mark.fault(134)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["linear", "table"])
def test_an_overflow_stays_to_be_found_by_a_gradient_scaler(kind: str, value: float) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(32, 4, bias=False) if kind == "linear" else nn.Embedding(8, 4)
    inputs = rows(0, 16) if kind == "linear" else torch.arange(4)
    optimizer = NullSpaceOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, policy=FixedRank(8), project="both"
    )
    optimizer.consolidate([inputs], progress=False)
    outputs = model(rows(16, 16) if kind == "linear" else torch.arange(4, 8))
    outputs.backward(torch.full_like(outputs, 1.0).index_fill(0, torch.tensor(0), value))
    (gradient,) = (parameter.grad for parameter in model.parameters())
    assert gradient is not None and not bool(gradient.isfinite().all())


def test_rows_of_very_different_scale_all_learn() -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 4, bias=False)
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, eps=1e-30)
    optimizer = NullSpaceOptimizer(base, model, policy=FixedRank(8), project="both")
    optimizer.consolidate([rows(0, 64)], progress=False)
    before = model.weight.detach().clone()
    (model(rows(16, 16, noise=0.1)).sum(0) * torch.tensor([1.0, 1e-4, 1e-8, 1e-12])).sum().backward()
    optimizer.step()
    moved = (model.weight.detach() - before).norm(dim=1)
    assert float(moved.min()) > 0.5 * float(moved.max())
