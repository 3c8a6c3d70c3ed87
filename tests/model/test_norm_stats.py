"""Running statistics that a past task used stay; others train; the user's modes are never changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.optim import SGD

from nullspace_optim import NullSpaceOptimizer, NumericalRank


class Towers(nn.Module):
    """Two BatchNorm branches; a task runs one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
        self.right = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor, right: bool = False) -> Tensor:
        result: Tensor = (self.right if right else self.left)(x)
        return result


def _ready(norm_stats: str = "frozen") -> tuple[Towers, NullSpaceOptimizer]:
    model = Towers()
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, norm_stats=norm_stats)  # type: ignore[arg-type]
    optimizer.consolidate([torch.randn(8, 12)], progress=False)
    return model.train(), optimizer


def test_only_statistics_that_the_task_used_are_frozen() -> None:
    model, _ = _ready()
    left, right = (tower[1].running_mean.clone() for tower in (model.left, model.right))
    rows = torch.randn(16, 12) + 1
    trained, evaluated = model(rows), model.eval()(rows)
    assert torch.equal(trained, evaluated)
    model.train()(rows, right=True)
    assert torch.equal(model.left[1].running_mean, left)
    assert int(model.left[1].num_batches_tracked) == 0
    assert not torch.equal(model.right[1].running_mean, right)
    assert model.left[1].training


def test_train_lets_them_move_and_detach_gives_them_back() -> None:
    model, _ = _ready("train")
    before = model.left[1].running_mean.clone()
    model(torch.randn(16, 12) + 1)
    assert not torch.equal(model.left[1].running_mean, before)
    model, optimizer = _ready()
    before = model.left[1].running_mean.clone()
    optimizer.detach()
    model(torch.randn(16, 12) + 1)
    assert not torch.equal(model.left[1].running_mean, before)


def test_an_error_inside_the_layer_leaves_the_users_mode() -> None:
    model, _ = _ready()
    try:
        model.left[1](torch.randn(4, 9))
    except RuntimeError:
        pass
    assert model.left[1].training
    model.left[1].eval()
    model(torch.randn(4, 12))
    assert not model.left[1].training


def test_frozen_statistics_without_hooks_twice() -> None:
    model, optimizer = _ready()
    optimizer.consolidate([torch.randn(8, 12)], progress=False)
    assert len(model.left[1]._forward_pre_hooks) == 1


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, spectral_norm], ids=["parametrization", "hook"])
def test_spectral_norm_keeps_its_singular_vectors(wrap: Any) -> None:
    model = nn.Sequential(wrap(nn.Linear(20, 32)), nn.ReLU(), nn.Linear(32, 4))
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-3), model, policy=NumericalRank())
    rows = torch.randn(5, 20)
    optimizer.consolidate([rows], progress=False)
    before = model.eval()(rows).detach()
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        (model(torch.randn(16, 20)) - 1).square().mean().backward()
        optimizer.step()
    assert float((model.eval()(rows) - before).detach().norm()) <= 1e-5 * float(before.norm())
    assert optimizer.verify().ok


def test_a_compiled_model_notices_frozen_statistics_and_detach() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(16, 12))
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model)
    optimizer.consolidate([torch.randn(8, 12)], progress=False)
    before = model[1].running_mean.clone()
    compiled(torch.randn(16, 12) + 1)
    assert torch.equal(model[1].running_mean, before)
    optimizer.detach()
    compiled(torch.randn(16, 12) + 1)
    assert not torch.equal(model[1].running_mean, before)


def test_a_forward_in_training_mode_leaves_the_statistics_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    optimizer = NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    inputs = torch.randn(64, 24) * 3 + 1
    for _ in range(5):
        model(inputs)
    model.eval()
    before, outputs = copy.deepcopy(model.state_dict()), model(inputs).detach()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        model.train()
        return model(batch)

    optimizer.consolidate([inputs], forward=forward, progress=False)
    assert optimizer.verify().ok and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(inputs), outputs)
