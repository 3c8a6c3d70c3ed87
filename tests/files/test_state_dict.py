"""Joining and splitting the state dicts of several optimizers; taking protection out of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from nullspace_optim import BasisFileError
from nullspace_optim.files.state_dict import join_states, pop_protection, seal, split_states


def _trained() -> list[torch.optim.Optimizer]:
    one, two = nn.Linear(3, 2), nn.Linear(2, 4)
    optimizers = [
        AdamW([{"params": [one.weight]}, {"params": [one.bias], "lr": 0.1}]),
        SGD(two.parameters(), lr=0.1, momentum=0.9),
    ]
    for p in [*one.parameters(), *two.parameters()]:
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def test_joined_states_split_into_what_they_were() -> None:
    states = [optimizer.state_dict() for optimizer in _trained()]
    joined = join_states(states)
    assert sorted(joined["state"]) == [0, 1, 2, 3]
    assert [group["params"] for group in joined["param_groups"]] == [[0], [1], [2, 3]]
    assert split_states(joined, [2, 1]) == states
    for optimizer, part in zip(_trained(), split_states(joined, [2, 1])):
        optimizer.load_state_dict(part)


def test_one_state_is_passed_through() -> None:
    state = _trained()[0].state_dict()
    assert join_states([state]) == state
    assert split_states(state, [2]) == [state]


def test_another_number_of_groups_is_an_error() -> None:
    joined = join_states([optimizer.state_dict() for optimizer in _trained()])
    with pytest.raises(BasisFileError, match=r"has 3 parameter groups.*have 2 together"):
        split_states(joined, [1, 1])


def test_protection_is_taken_out_without_touching_the_argument() -> None:
    owed = {"inexact_steps": 3, "pending": ["w"], "allowed": [0.5]}
    entry = {"tensors": {}, "metadata": "{}", **owed, "seal": seal("{}", owed)}
    state = {"state": {}, "param_groups": [{"lr": 1, "nullspace": "f00"}], "nullspace": entry}
    plain, payload, fingerprint = pop_protection(state)
    assert plain == {"state": {}, "param_groups": [{"lr": 1}]}
    assert (payload, fingerprint) == (entry, "f00")
    assert state["param_groups"] == [{"lr": 1, "nullspace": "f00"}]
    assert pop_protection(plain) == (plain, None, None)
