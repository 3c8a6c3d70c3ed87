"""`torch.compile` of a model with experts: compiled a few times a phase, not once a step, to the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import AdamW

from nullspace_optim import IGSP, NullSpaceOptimizer


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def make(**options: object) -> tuple[nn.Module, NullSpaceOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    mode = IGSP(rank=2, candidates=2, cap=12, window=3, on_cap="prune", **options)  # type: ignore[arg-type]
    return model, NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode)


def batch(step: int) -> Tensor:
    return torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(step))


def step(run: nn.Module, opt: NullSpaceOptimizer, number: int) -> Tensor:
    loss = (run(batch(number)) - 1).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.detach()


@pytest.mark.parametrize("options", [{}, {"kind": "bottleneck", "router": "shared"}], ids=["default", "shared"])
def test_a_phase_is_compiled_once_and_trains_to_the_same_numbers(options: dict[str, object]) -> None:
    model, opt = make(**options)
    twin, other = make(**options)
    compiled = torch.compile(model, backend="eager")
    for task in ("one", "two"):
        phases = set()
        for number in range(24):
            first = opt.status().phase not in phases  # the first step of a phase may compile
            phases.add(opt.status().phase)
            with torch._dynamo.config.patch(error_on_recompile=not first):
                loss = step(compiled, opt, number)
            torch.testing.assert_close(loss, step(twin, other, number))
        assert phases == {1, 2}
        opt.consolidate([batch(99)], name=task, progress=False)
        other.consolidate([batch(99)], name=task, progress=False)
    assert counters["stats"]["unique_graphs"] <= 16
    for value, expected in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(value, expected)


def test_consolidation_of_a_compiled_model_is_compiled_once() -> None:
    model, opt = make()
    compiled = torch.compile(model, backend="eager")
    for number in range(16):
        step(compiled, opt, number)
    graphs = []
    for name, count in (("one", 2), ("two", 12)):
        before = counters["stats"]["unique_graphs"]
        opt.consolidate([batch(n) for n in range(count)], name=name, forward=compiled, progress=False)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        for number in range(16):
            step(compiled, opt, number)
    assert graphs[1] <= graphs[0], "six times the batches, no more graphs"


@pytest.mark.parametrize("kind", ["per-task", "shared"])
def test_evaluation_is_one_graph_whatever_tasks_are_named_for_the_samples(kind: str) -> None:
    model, opt = make(router=kind)
    for task in ("one", "two"):
        for number in range(16):
            step(model, opt, number)
        opt.consolidate([batch(99)], name=task, progress=False)
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for number, names in enumerate((["one"] * 6, ["two", None] * 3, ["one", "two", "never"] * 2)):
        with (
            torch.no_grad(),
            opt.task(names),
            torch._dynamo.config.patch(error_on_recompile=number > 0),
        ):
            torch.testing.assert_close(compiled(batch(number)), model(batch(number)))
    for name in ("one", None, "never"):
        with torch.no_grad(), opt.task(name):
            torch.testing.assert_close(compiled(batch(7)), model(batch(7)))
