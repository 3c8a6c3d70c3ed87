"""A run goes on from a checkpoint or a file to the same bits, whatever the policy keeps, on whichever sides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from every_policy import POLICIES
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.policies import OSF, Energy, Policy


class Tied(nn.Module):
    """A table of 20 rows of 12 numbers, a hidden layer, and the table again as the head where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(20, 12), nn.Linear(12, 12)

    def forward(self, tokens: Tensor, head: bool = True) -> Tensor:
        features: Tensor = self.hidden(self.table(tokens)).tanh()
        return features @ self.table.weight.T if head else features


def wrap(model: nn.Module, **options: Any) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01, weight_decay=0.1), model, **options)


def train(model: nn.Module, optimizer: NullSpaceOptimizer, inputs: Tensor, steps: int = 6) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("way", ["state_dict", "file"])
@pytest.mark.parametrize("project", ["update", "both", "gradient"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_every_policy_goes_on_bitwise(policy: Policy, project: str, way: str, tmp_path: Path) -> None:
    model, inputs = layers(), torch.randn(16, 24)
    optimizer = wrap(model, policy=policy, project=project)
    for name in ("z", "a"):  # not the order of the alphabet, in which files list what has a name
        optimizer.consolidate([torch.randn(6, 24)], name=name, progress=False)
    train(model, optimizer, inputs, steps=3)
    again = layers()
    other = wrap(again, policy=policy, project=project)
    goes_on((model, optimizer), (again, other), inputs, way, tmp_path)


@pytest.mark.parametrize("way", ["state_dict", "file"])
@pytest.mark.parametrize("policy", [Energy(0.9), OSF(0.3)], ids=repr)
@pytest.mark.parametrize("first", ["features", "logits"])
def test_a_table_that_is_read_in_two_ways_goes_on_bitwise(policy: Policy, first: str, way: str, tmp_path: Path) -> None:
    model, tokens = Tied(), torch.randint(0, 8, (6, 5))
    optimizer = wrap(model, policy=policy)
    kinds = ("features", "logits") if first == "features" else ("logits", "features")
    for name, kind in zip(("z", "a"), kinds):
        forward = (lambda batch: model(batch, head=False)) if kind == "features" else model
        optimizer.consolidate([tokens], name=name, forward=forward, progress=False)
    assert len(optimizer.bases["table.weight"].subspaces) > 1
    train(model, optimizer, torch.randint(0, 20, (6, 5)), steps=3)
    again = Tied()
    goes_on((model, optimizer), (again, wrap(again, policy=policy)), torch.randint(0, 20, (6, 5)), way, tmp_path)


def goes_on(
    one: tuple[nn.Module, NullSpaceOptimizer],
    two: tuple[nn.Module, NullSpaceOptimizer],
    inputs: Tensor,
    way: str,
    folder: Path,
) -> None:
    """Carry everything from `one` to `two`, train both and compare every bit, and what they say of themselves."""
    one[1].save(folder / "bases")  # pays what rounding owes, so before the weights are copied
    state = copy.deepcopy(one[1].state_dict())
    two[0].load_state_dict(one[0].state_dict())
    if way == "state_dict":
        two[1].load_state_dict(state)
    else:
        two[1].load(folder / "bases")
        two[1].load_state_dict({key: part for key, part in state.items() if key != "nullspace"})
    for model, optimizer in (one, two):
        train(model, optimizer, inputs)
    for (name, here), there in zip(one[0].named_parameters(), two[0].parameters()):
        assert torch.equal(here, there), name
    first, second = one[1].bases, two[1].bases
    assert list(first) == list(second)
    for name, basis in first.items():
        assert list(basis.subspaces) == list(second[name].subspaces)
        assert repr(basis) == repr(second[name])
    assert str(one[1].verify()) == str(two[1].verify())
