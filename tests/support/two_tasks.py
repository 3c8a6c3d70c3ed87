"""Two small tasks for every training stack, and what must be true after the second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset
from training import relative_drift

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank

WIDTH, HIDDEN, CLASSES, OLD = 24, 32, 8, 8


class Net(nn.Module):
    """`[n, 24]` to `[n, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.second = nn.Linear(HIDDEN, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


def build_net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(task: int, count: int = OLD) -> TensorDataset:
    """Inputs `[count, 24]` and labels of a task."""
    generator = torch.Generator().manual_seed(task)
    inputs = torch.randn(count, WIDTH, generator=generator)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (count,), generator=generator))


def loader(task: int, count: int = OLD) -> DataLoader[Any]:
    return DataLoader(data(task, count), batch_size=4)


def wrap(model: nn.Module, rate: float = 3e-3, eps: float = 1e-8, **options: Any) -> NullSpaceOptimizer:
    base = AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.01, eps=eps)
    return NullSpaceOptimizer(base, **{"policy": NumericalRank(), **options})


@contextmanager
def holding(
    model: nn.Module, forward: Callable[[], Tensor], limit: float = 1e-5, optimizer: Any = None
) -> Iterator[None]:
    """The body trains a later task: old outputs stay within `limit`, free directions move, frozen parameters do not.

    `optimizer` is a callable that gives the `NullSpaceOptimizer` at the end. Kept directions are checked in float32 (or
    within the rounding of half-precision weights) whatever `limit` allows the outputs.
    """
    then, before = _outputs(model, forward), {n: p.detach().clone() for n, p in model.named_parameters()}
    yield
    assert relative_drift(_outputs(model, forward), then) <= limit
    wrapper = optimizer()
    assert len(wrapper.bases) and wrapper.verify().ok
    for name, basis in wrapper.bases.items():
        parameter = wrapper._core.parameters[name]
        old = next(before[n] for n, p in model.named_parameters() if p is parameter)
        if basis.fate is Fate.PROTECTED:
            assert relative_drift(parameter.detach(), old) > 1e-4, f"{name} was not trained"
        elif basis.kept is not None:
            assert torch.equal(parameter, old), f"{name} is frozen"


def _outputs(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    training = model.training
    with torch.no_grad():
        model.eval()
        result = forward().detach().clone()
    model.train(training)
    return result


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def example(page: str) -> str:
    """The first Python block of a page of `docs/stacks`."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "stacks" / page).read_text(encoding="utf-8")
    return text.split("```python\n", 1)[1].split("```", 1)[0]
