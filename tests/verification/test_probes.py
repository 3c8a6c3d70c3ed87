"""`verify`: what it measures with and without a loader, in any order, and which layer it names first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from nullspace_optim import NullSpaceOptimizer, NumericalRank, StaleAnchorError


@pytest.fixture
def ready() -> tuple[nn.Sequential, NullSpaceOptimizer, TensorDataset]:
    model = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 8))
    data = TensorDataset(torch.randn(10, 24), torch.arange(10))
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1, weight_decay=0.1), model, policy=NumericalRank())
    optimizer.consolidate(DataLoader(data, 4), progress=False)
    return model, optimizer, data


def _move(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.05)


def test_all_is_well_after_training(ready: Any) -> None:
    model, optimizer, data = ready
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 24)).square().mean().backward()
        optimizer.step()
    report = optimizer.verify(DataLoader(data, 3))
    assert report.ok
    assert report.drift("task 1") <= 1e-5
    assert report.first_break("task 1") is None
    assert set(report.kept) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert "protection holds" in str(report)


@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled"])
@pytest.mark.parametrize(
    ("name", "first"), [("0.weight", "0.weight"), ("3.weight", "3.weight"), ("1.bias", "3.weight")]
)
@pytest.mark.fault(57)
def test_the_first_layer_that_moved_is_named(ready: Any, name: str, first: str, shuffle: bool) -> None:
    model, optimizer, data = ready
    if name == "1.bias":
        with torch.no_grad():
            model[1].bias.add_(0.1)
    else:
        _move(model, name)
    report = optimizer.verify(DataLoader(data, 3, shuffle=shuffle))
    assert report.first_break("task 1") == first
    assert 1e-3 < report.drift("task 1") < 1
    assert not report.ok
    assert f"first layer that moved: {first}" in str(report)
    assert f"'{name}' moved by" in str(report)
    assert not optimizer.verify().layers


def test_the_estimated_drift_is_near_the_true_one() -> None:
    model, rows = nn.Linear(24, 64), torch.randn(32, 24)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model)
    optimizer.consolidate([rows], progress=False)
    before = model(rows).detach()
    with torch.no_grad():
        model.weight.add_(0.01 * torch.randn_like(model.weight))
    true = float((model(rows) - before).norm() / before.norm())
    assert 0.7 * true <= optimizer.verify([rows]).drift("task 1") <= 1.4 * true


@pytest.mark.fault(57)
def test_other_data_is_reported_as_missing(ready: Any) -> None:
    _, optimizer, _ = ready
    report = optimizer.verify([torch.randn(10, 24)])
    assert report.missing == ("task 1",)
    assert "task 1" in str(report)


def test_moved_buffers_are_named(ready: Any) -> None:
    model, optimizer, _ = ready
    model[1].running_var.mul_(2)
    report = optimizer.verify()
    assert report.buffers == ("1.running_var",)
    assert not report.ok
    assert "buffer '1.running_var' moved" in str(report)
    optimizer.reanchor()
    assert optimizer.verify().ok


@pytest.mark.fault(1)
def test_a_weight_that_is_not_a_number_is_no_kept_direction(ready: Any, tmp_path: Any) -> None:
    model, optimizer, data = ready
    model[3].weight.detach().fill_(float("nan"))
    report = optimizer.verify(DataLoader(data, 4))
    assert not report.ok
    with pytest.raises(StaleAnchorError, match=r"'3\.weight' holds values that are not finite"):
        optimizer.save(tmp_path / "bases.safetensors")
    assert "protection BROKEN" in str(report)
    assert "'3.weight' moved by nan" in str(report)
    assert report.first_break("task 1") == "3.weight"
