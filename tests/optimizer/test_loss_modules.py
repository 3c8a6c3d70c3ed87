"""Bases that were named by a module around the model (a loss that holds it) load into the model, and back."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import take_steps
from torch import Tensor, nn
from torch.optim import AdamW
from training import relative_drift

from nullspace_optim import BasisFileError, NullSpaceOptimizer, NumericalRank

OLD = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
NEW = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))


class Loss(nn.Module):
    """A loss that holds the model and feeds it, as those of sentence-transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.model(inputs) - 1).square().flatten(1).sum(1, keepdim=True)


def build(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(32)] if norm else []
    return nn.Sequential(nn.Linear(24, 32), *middle, nn.Tanh(), nn.Linear(32, 8))


def wrap(model: nn.Module, owner: nn.Module | None = None) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), owner, policy=NumericalRank())


def learn(model: nn.Module, optimizer: Any, steps: int = 10) -> None:
    take_steps(optimizer, lambda: (model(NEW) - 1).square().mean(), steps)


@pytest.mark.fault(137)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "running statistics"])
@pytest.mark.parametrize("how", ["file", "state dict"])
@pytest.mark.parametrize("saved", ["loss", "nested loss", "model"])
def test_bases_move_between_a_model_and_modules_around_it(saved: str, how: str, norm: bool, tmp_path: Path) -> None:
    model = build(norm)
    around = {"loss": Loss(model), "nested loss": Loss(Loss(model)), "model": model}[saved]
    optimizer = wrap(model, around)
    learn(model, optimizer)
    optimizer.consolidate([OLD], progress=False)
    prefix = {"loss": "model.", "nested loss": "model.model.", "model": ""}[saved]
    assert all(name.startswith(f"{prefix}0.") or name.startswith(prefix) for name in optimizer.bases)
    optimizer.save(tmp_path / "bases")
    state = copy.deepcopy(optimizer.state_dict())
    other = build(norm)
    other.load_state_dict(model.state_dict())
    owner = Loss(other) if saved == "model" else other
    again = wrap(other, owner)
    if how == "file":
        again.load(tmp_path / "bases")
    else:
        again.load_state_dict(state)
    old = other.eval()(OLD).detach()
    other.train()
    learn(other, again)
    assert relative_drift(other.eval()(OLD).detach(), old) < 1e-5
    report = again.verify()
    assert report.ok and not report.buffers and not report.lost
    assert again.verify([OLD]).foreign == ("task 1",)  # the loss returned something else
    again.consolidate([NEW], progress=False)
    assert len(again.bases) == len(optimizer.bases)


def test_a_loss_dropped_between_tasks_leaves_one_basis_a_parameter() -> None:
    model = build()
    optimizer = wrap(model)
    losses = [Loss(model)]
    learn(model, optimizer)
    optimizer.consolidate([OLD], progress=False)  # finds the outermost module alone
    assert "model.0.weight" in optimizer.bases
    old = model(OLD).detach()
    losses.clear()
    gc.collect()
    learn(model, optimizer)
    optimizer.consolidate([NEW], progress=False)
    assert set(optimizer.bases) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    learn(model, optimizer)
    assert relative_drift(model(OLD).detach(), old) < 1e-5 and optimizer.verify().ok


def test_another_model_is_refused_as_before(tmp_path: Path) -> None:
    model = build()
    loss = Loss(model)
    optimizer = wrap(model, loss)
    optimizer.consolidate([OLD], progress=False)
    optimizer.save(tmp_path / "bases")
    stranger = nn.ModuleDict({"one": nn.Linear(24, 32), "two": nn.Linear(32, 8)})
    with pytest.raises(BasisFileError, match=r"model\.0\.bias"):
        wrap(stranger, stranger).load(tmp_path / "bases")
