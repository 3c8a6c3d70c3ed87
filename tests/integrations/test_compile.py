"""`torch.compile` of the model, of the step, and of both: protected, and nothing is compiled anew step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from two_tasks import build_net, data, holding, loader, same_weights, wrap

from nullspace_optim import FixedRank, NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import OptionError

RANKS = (None, 20)  # exactly what was used (few directions), or most of them: an exact step every 16th


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


ALL = [
    (what, backend, rank) for what in ("model", "step", "both") for backend in ("eager", "aot_eager") for rank in RANKS
]
SHORT = [("model", "aot_eager", None), ("both", "eager", 20)]


@pytest.mark.parametrize(
    ("what", "backend", "rank"),
    [case if case in SHORT else pytest.param(*case, marks=pytest.mark.nightly) for case in ALL],
)
def test_compiled_once_a_task_and_protected(what: str, backend: str, rank: int | None) -> None:
    model = build_net()
    policy = NumericalRank() if rank is None else FixedRank(rank)
    optimizer = wrap(model, policy=policy)
    counter = CompileCounter() if backend == "eager" else CompileCounterWithBackend(backend)
    run = model if what == "step" else torch.compile(model, backend=counter)
    step = optimizer.step if what == "model" else torch.compile(optimizer.step, backend=counter)

    def train(task: int, steps: int) -> None:
        inputs, labels = data(task).tensors
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(inputs), labels).backward()
            step()

    train(0, 2)
    assert counter.frame_count > 0
    compiled = counter.frame_count
    train(0, 5)
    assert counter.frame_count == compiled, "compiled anew within the first task"
    optimizer.consolidate([data(0).tensors[0]], progress=False)
    with holding(model, lambda: model(data(0).tensors[0]), optimizer=lambda: optimizer):
        train(1, 20)
        compiled = counter.frame_count
        train(1, 20)
        assert counter.frame_count == compiled, "compiled anew within the second task"


def test_a_tensor_rate_that_a_scheduler_moves_compiles_nothing_anew() -> None:
    model = build_net()
    base = torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-3))
    optimizer = NullSpaceOptimizer(base, model, policy=NumericalRank())
    optimizer.consolidate([data(0).tensors[0]], progress=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    inputs, labels = data(1).tensors
    counts = []
    with holding(model, lambda: model(data(0).tensors[0]), optimizer=lambda: optimizer):
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            step()
            scheduler.step()
            counts.append(counter.frame_count)
    assert counts[2] == counts[-1], counts


@pytest.mark.parametrize("what", ["model", "step"])
def test_saved_in_the_middle_and_resumed_bitwise(what: str, tmp_path: Path) -> None:
    """The state dict of a compiled model has prefixes of its own, its optimizer's the names of the model inside."""

    def build() -> tuple[nn.Module, NullSpaceOptimizer, Callable[[int, int], None]]:
        model = build_net()
        optimizer = wrap(model)
        run = torch.compile(model, backend="eager") if what == "model" else model
        step = torch.compile(optimizer.step, backend="eager") if what == "step" else optimizer.step

        def train(task: int, steps: int) -> None:
            inputs, labels = data(task).tensors
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.cross_entropy(run(inputs), labels).backward()
                step()

        return run, optimizer, train

    model, optimizer, train = build()
    train(0, 5)
    optimizer.consolidate([data(0).tensors[0]], progress=False)
    train(1, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "middle.pt")
    torch._dynamo.reset()
    other, resumed, go_on = build()
    saved = torch.load(tmp_path / "middle.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for its, one, steps in ((model, optimizer, train), (other, resumed, go_on)):
        with holding(its, lambda its=its: its(data(0).tensors[0]), optimizer=lambda one=one: one):
            steps(1, 20)
    assert same_weights(model, other)


@pytest.mark.parametrize("method", ["consolidate", "measure"])
def test_a_consolidation_within_a_compiled_function_is_refused(method: str) -> None:
    model = build_net()
    optimizer = wrap(model)

    @torch.compile(backend="eager")
    def step(inputs: torch.Tensor) -> torch.Tensor:
        outputs = model(inputs)
        getattr(optimizer, method)(loader(0), progress=False)
        return outputs

    with pytest.raises(OptionError, match="compiled called consolidate"):
        step(data(1).tensors[0])
    assert not optimizer.bases
    optimizer.consolidate(loader(0), progress=False)
    assert optimizer.bases
