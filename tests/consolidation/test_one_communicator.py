"""One communicator is handed into a consolidation, and every exchange of a task goes through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from nullspace_optim import Energy, NullSpaceOptimizer
from nullspace_optim.consolidation.consolidate import consolidate, measure
from nullspace_optim.distributed.communicator import Alone, communicator
from nullspace_optim.errors import ConsolidationError
from nullspace_optim.model.loader import LoaderPass
from nullspace_optim.settings import Settings
from nullspace_optim.subspace.basis import BasisStore
from nullspace_optim.verification.verify import RecentSamples


class BesideAnEmptyRank(Alone):
    """The second of two ranks, the first of which has no batches and no second moments; notes what is exchanged."""

    def __init__(self) -> None:
        self.gathered: list[Any] = []
        self.sources: list[int] = []

    def all_gather_object(self, value: Any) -> list[Any]:
        self.gathered.append(value)
        return [(0, 0) if isinstance(value, tuple) else {}, value]

    def broadcast_object(self, source: int, value: Any) -> Any:
        self.sources.append(source)
        return value


class Joint(Energy):
    joint = True


def task(model: nn.Module, batches: list[torch.Tensor]) -> LoaderPass:
    return LoaderPass(model, dict(model.named_parameters()), batches, "one", progress=False)


def test_a_process_without_a_group_is_alone() -> None:
    ranks = communicator()
    assert isinstance(ranks, Alone) and (ranks.rank, ranks.size) == (0, 1)
    assert ranks.all_gather_object("x") == ["x"] and ranks.broadcast_object(0, "x") == "x"
    assert ranks.broadcast_from_owners([1, 2], [0, 0], torch.device("cpu")) == [1, 2]


@pytest.mark.parametrize("policy", [Energy(0.9), Joint(0.9)], ids=["one weight at a time", "all at once"])
def test_counts_first_samples_and_spectra_travel_through_the_communicator(policy: Energy) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    batches = [torch.randn(8, 6), torch.randn(8, 6)]
    ranks = BesideAnEmptyRank()
    grown, report = consolidate(task(model, batches), BasisStore(), Settings(policy=policy), RecentSamples(), ranks)
    assert ranks.gathered[0][0] == 2 and ranks.sources == [1], "the rank with batches gives the first samples"
    assert report.batches == 2
    assert len(ranks.gathered) == (2 if policy.joint else 1)
    alone, _ = consolidate(task(model, batches), BasisStore(), Settings(policy=policy), RecentSamples(), Alone())
    assert {name: basis.rank for name, basis in grown.items()} == {name: basis.rank for name, basis in alone.items()}
    assert torch.equal(grown["0.weight"].U, alone["0.weight"].U)


def test_second_moments_alone_are_measured_in_one_process_only() -> None:
    class Two(Alone):
        size = 2

    model = nn.Linear(4, 2)
    assert set(measure(task(model, [torch.randn(3, 4)]), Settings(), Alone())) == {"weight"}
    with pytest.raises(ConsolidationError, match="one process only"):
        measure(task(model, [torch.randn(3, 4)]), Settings(), Two())


def test_capture_consolidation_and_protection_read_one_frozen_object() -> None:
    model = nn.Linear(4, 2)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), 0.1), model, project="both", rows="all", bias="joint")
    options = optimizer._core.options
    assert options is optimizer._core.protection.options
    assert (options.project, options.rows, options.bias) == ("both", "all", "joint")
    with pytest.raises(AttributeError):
        options.rows = "relevant"  # type: ignore[misc]
