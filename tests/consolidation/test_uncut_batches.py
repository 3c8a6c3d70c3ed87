"""Batches whose first axis is not one of samples: graphs, time steps, crops; their probe is the whole first batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim import AdamW
from training import relative_drift

from nullspace_optim import IGSP, NullSpaceOptimizer, NumericalRank

NOTE = "look at the whole first batch"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def narrow(*shape: int) -> Tensor:
    """Return inputs `[..., 20]` in four directions, so that room is left."""
    return torch.randn(*shape, 4) @ torch.randn(4, 20)


class Graph(nn.Module):
    """Every node takes the mean over all nodes it is joined to by a buffer."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.register_buffer("joined", torch.softmax(torch.randn(nodes, nodes), 1))
        self.layer, self.head = nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, nodes: Tensor) -> Tensor:
        return self.head(torch.tanh(self.joined @ self.layer(nodes)))


class Edges(Graph):
    """Nodes and a list of edges, which have different first axes."""

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        rows = self.layer(nodes)
        return self.head(torch.tanh(torch.zeros_like(rows).index_add(0, edges[1], rows[edges[0]])))


class Steps(nn.Module):
    """Attention over the first axis, with a learned position for each step."""

    def __init__(self, steps: int, positions: bool = True) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(steps, 1, 20) / 9) if positions else 0
        self.mix, self.head = nn.MultiheadAttention(20, 2), nn.Linear(20, 4)

    def forward(self, steps: Tensor) -> Tensor:
        steps = steps + self.position
        return self.head(torch.tanh(self.mix(steps, steps, steps)[0]))


class Crops(nn.Module):
    """The mean over two crops of each image, which lie in the batch one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(crops)).unflatten(0, (2, -1)).mean(0))


class Packed(nn.Module):
    """A recurrent network over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(20, 12), nn.Linear(12, 4)

    def forward(self, rows: PackedSequence) -> Tensor:
        return self.head(self.cell(rows)[1][-1])


class Last(nn.Module):
    """The last state of a recurrent network whose first axis are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNN(20, 12), nn.Linear(12, 4)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.cell(steps)[1][-1])


def edges(nodes: int) -> Tensor:
    return torch.randint(0, nodes, (2, 3 * nodes))


CASES: dict[str, tuple[Any, Any, bool]] = {
    "graph": (lambda: Graph(70), lambda: narrow(70), True),
    "graph with edges": (lambda: Edges(70), lambda: (narrow(70), edges(70)), False),
    "positions": (lambda: Steps(48), lambda: narrow(48, 3), True),
    "attention over time": (lambda: Steps(48, positions=False), lambda: narrow(48, 3), True),
    "crops": (Crops, lambda: narrow(64), True),
    "an odd number in the cut": (Crops, lambda: narrow(66), True),
    "last state": (Last, lambda: narrow(48, 3), True),
    "packed": (Packed, lambda: pack_sequence([narrow(n) for n in (50, 40, 9)]), False),
    "samples": (lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)), lambda: narrow(70), False),
    "at most 32": (lambda: Graph(32), lambda: narrow(32), False),
}


def feed(model: nn.Module) -> Any:
    return lambda batch: model(*batch) if type(batch) is tuple else model(batch)


@pytest.mark.fault(127)
@pytest.mark.parametrize("case", CASES)
def test_tasks_of_any_first_axis_are_consolidated_and_verified(case: str) -> None:
    build, data, noted = CASES[case]
    model, old, new = build(), data(), data()
    run = feed(model)
    base = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = NullSpaceOptimizer(base, model, policy=NumericalRank())
    report = optimizer.consolidate([old], forward=run, progress=False)
    assert any(NOTE in note for note in report.notes) == noted
    before = run(old).detach()
    for _ in range(20):
        optimizer.zero_grad()
        (run(new) - 1).square().mean().backward()
        optimizer.step()
    assert relative_drift(run(old), before) < 1e-5
    found = optimizer.verify([old], forward=run)
    assert found.ok and found.drift("task 1") < 1e-5
    assert optimizer.consolidate([new], forward=run, progress=False).drift["task 1"] < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not optimizer.verify([old], forward=run).ok


@pytest.mark.fault(127)
@pytest.mark.parametrize("nodes", [32, 70])
def test_experts_on_a_graph_are_consolidated(nodes: int) -> None:
    model, old = Graph(nodes), narrow(nodes)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-2), model, mode=IGSP(target_modules="layer", rank=2))
    for _ in range(3):
        optimizer.zero_grad()
        (model(old) - 1).square().mean().backward()
        optimizer.step()
    optimizer.consolidate([old], name="one", progress=False)
    assert optimizer.verify([old]).ok


@pytest.mark.fault(127)
def test_samples_that_draw_random_numbers_are_verified_as_a_whole_batch() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(20, 4)

        def forward(self, rows: Tensor) -> Tensor:
            return self.head(rows) * (1 + 0.1 * torch.randn(len(rows), 1))

    model, old = Noisy(), narrow(70)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-2), model, policy=NumericalRank())
    state = torch.get_rng_state()
    report = optimizer.consolidate([old], progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert any("random numbers" in note for note in report.notes)
    assert optimizer.verify([old]).ok
