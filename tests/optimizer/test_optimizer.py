"""The first example of the documentation, end to end; the contract itself is tested in `contract/`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from nullspace_optim import Energy, Fate, NullSpaceOptimizer, StaleAnchorError
from nullspace_optim.errors import OptionError


def test_three_tasks_in_a_row_with_one_argument() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01))
    tasks = [[(torch.randn(4, 32), torch.randn(4, 8))] for _ in range(3)]
    outputs, losses = [], []
    for loader in tasks:
        for _ in range(150):
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = (model(inputs) - targets).square().mean()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
        report = optimizer.consolidate(loader, progress=False)
        outputs.append(model(loader[0][0]).detach())
    assert max(losses) < 0.2
    for loader, before in zip(tasks, outputs):
        assert (model(loader[0][0]) - before).norm() / before.norm() < 0.05
    assert report.task == "task 3"
    assert isinstance(optimizer._core.options.policy, Energy)
    assert [optimizer.verify(loader).drift(f"task {i}") < 0.05 for i, loader in enumerate(tasks, 1)] == [True] * 3


def test_a_bare_optimizer_on_the_same_tasks_forgets() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    old, new = torch.randn(4, 32), torch.randn(4, 32)
    before = model(old).detach()
    optimizer = AdamW(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        (model(new) - 1).square().mean().backward()
        optimizer.step()
    assert (model(old) - before).norm() / before.norm() > 0.3


def test_bases_are_a_mapping_with_the_mathematical_names() -> None:
    model = nn.Linear(12, 6)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model)
    optimizer.consolidate([torch.randn(4, 12)], name="birds", progress=False)
    basis = optimizer.bases["weight"]
    assert basis.U.shape == (12, basis.rank)
    assert basis.spectrum is not None
    assert basis.spectrum.shape == (1, 12)
    assert bool((basis.spectrum[0].diff() <= 0).all())
    assert (basis.tasks, basis.fate) == (("birds",), Fate.PROTECTED)
    with pytest.raises(KeyError, match="'bias' has no basis: it is frozen"):
        _ = optimizer.bases["bias"].U


def test_a_model_without_the_wrapped_parameters_is_refused() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), other)
    with pytest.raises(OptionError, match="pass the model that is trained"):
        optimizer.consolidate([torch.randn(4, 3)], progress=False)


def test_reanchor_is_named_by_the_error_that_needs_it() -> None:
    model = nn.Linear(12, 6)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model)
    optimizer.consolidate([torch.randn(4, 12)], progress=False)
    model.load_state_dict(nn.Linear(12, 6).state_dict())
    model(torch.randn(4, 12)).sum().backward()
    with pytest.raises(StaleAnchorError, match="reanchor"):
        optimizer.step()
    optimizer.reanchor()
    optimizer.step()
    assert optimizer.verify().ok
