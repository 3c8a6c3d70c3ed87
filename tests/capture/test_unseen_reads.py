"""A parameter that reaches the output past the operators is frozen and named, never silently free."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank


class Through(nn.Module):
    """A layer that reads its weight `[o, i]` by a function of itself and `x`."""

    def __init__(self, size: int, out: int, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, size) * 0.2)
        self.spare = nn.Parameter(torch.randn(out, size))  # nothing ever reads it
        self.read = read
        self.early, self.pointer = self.weight.detach().numpy(), self.weight.data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.as_tensor(x.detach().numpy() @ w.detach().numpy().T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x


class ByAddress(torch.autograd.Function):
    """What compiled code does: nothing of the Python interface hands the memory out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, address: int, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ _values(address, shape).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x, None, None


def _values(address: int, shape: tuple[int, int]) -> Tensor:
    """Return a copy, made without torch, of the floats at an address."""
    raw = ctypes.string_at(address, 4 * shape[0] * shape[1])
    return torch.tensor(np.frombuffer(raw, dtype=np.float32).reshape(shape).copy())


def _of_list(values: list[list[float]]) -> Tensor:
    return torch.tensor(np.array(values, dtype=np.float32))


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a Function over NumPy": lambda s, x: ByNumpy.apply(x, s.weight),
    "a Function over NumPy, of a view": lambda s, x: ByNumpy.apply(x, s.weight.view(-1).view_as(s.weight)),
    "a Function over NumPy, of a copied transpose": lambda s, x: ByNumpy.apply(x, s.weight.t().contiguous().t()),
    "a Function that knows the address": lambda s, x: ByAddress.apply(x, s.weight, s.pointer, tuple(s.weight.shape)),
    "numpy": lambda s, x: x @ torch.tensor(s.weight.detach().numpy().copy()).T,
    "numpy.asarray": lambda s, x: x @ torch.tensor(np.asarray(s.weight.detach()).copy()).T,
    "from_dlpack": lambda s, x: x @ torch.tensor(np.from_dlpack(s.weight.detach()).copy()).T,
    "tolist": lambda s, x: x @ _of_list(s.weight.tolist()).T,
    "a pickled copy": lambda s, x: x @ pickle.loads(pickle.dumps(s.weight.detach())).T,
    "a deep copy": lambda s, x: x @ copy.deepcopy(s.weight.detach()).T,
    "an array made before": lambda s, x: x @ torch.tensor(s.early.copy()).T,
    "an address taken before": lambda s, x: x @ _values(s.pointer, tuple(s.weight.shape)).T,
    "data_ptr": lambda s, x: x @ _values(s.weight.data_ptr(), tuple(s.weight.shape)).T,
    "item": lambda s, x: x * s.weight[0, 0].item(),
    "numpy beside a product": lambda s, x: x @ s.weight.T + x @ torch.tensor(s.weight.detach().numpy().copy()).T,
}


def _model(read: str) -> nn.Sequential:
    out = 32 if read == "item" else 40
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), Through(32, out, READS[read]))


def _wrapped(model: nn.Module, rows: Any) -> NullSpaceOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return NullSpaceOptimizer(base, model, policy=NumericalRank(), rows=rows)


def _train_at_random(optimizer: NullSpaceOptimizer, model: nn.Module, steps: int = 10) -> None:
    """Let a later task move everything that may move."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("rows", ["relevant", "all"])
@pytest.mark.parametrize("read", READS)
def test_a_weight_read_past_the_operators_is_frozen_and_named(read: str, rows: Any) -> None:
    model, x = _model(read), torch.randn(8, 20)
    optimizer = NullSpaceOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, policy=NumericalRank(), rows=rows
    )
    report = optimizer.consolidate([x, x[:4]], progress=False)
    before, fates = model(x).detach(), {row.name: row for row in report.parameters}
    assert fates["2.weight"].fate is Fate.FROZEN and fates["2.weight"].reason
    assert fates["2.spare"].fate is Fate.FREE
    _train_at_random(optimizer, model)
    assert float((model(x) - before).norm() / before.norm()) < 1e-5
    assert optimizer.verify().ok


@pytest.mark.parametrize("rows", ["relevant", "all"])
def test_a_weight_that_is_replaced_in_the_forward_pass_is_no_free_weight(rows: Any) -> None:
    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(40, 20))

        def forward(self, x: Tensor) -> Tensor:
            kept = self.weight.data
            self.weight.data = torch.tensor((kept.numpy() * 16).round() / 16)
            try:
                return x @ self.weight.T
            finally:
                self.weight.data = kept

    model, x = Swapping(), torch.randn(8, 20)
    optimizer = NullSpaceOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, policy=NumericalRank(), rows=rows
    )
    optimizer.consolidate([x], progress=False)
    assert optimizer.bases["weight"].fate is Fate.FROZEN


def test_the_reason_says_that_the_path_is_not_seen() -> None:
    model = _model("a Function that knows the address")
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.consolidate([torch.randn(8, 20)], progress=False)
    assert optimizer.bases["2.weight"].reason.startswith("reached the output by a path that capture cannot see")


@pytest.mark.parametrize("many", [1, 3])
def test_of_many_unread_parameters_those_that_matter_are_found(many: int) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(torch.randn(3) for _ in range(13))
            self.arrays = [part.detach().numpy() for part in self.parts]
            self.head = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            chosen = np.stack([self.arrays[4 * k] for k in range(many)]).sum(0)
            return self.head(x) * float(chosen.sum())

    model = Many()
    values = [part.detach().clone() for part in model.parts]
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    report = optimizer.consolidate([torch.randn(8, 3)], progress=False)
    frozen = {row.name for row in report.of(Fate.FROZEN)} - {"head.bias"}
    assert frozen == {f"parts.{4 * k}" for k in range(many)}
    assert all(torch.equal(part, value) for part, value in zip(model.parts, values, strict=True))


def test_outputs_that_differ_from_run_to_run_are_said_to_tell_nothing() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.calls = nn.Linear(4, 8), nn.Linear(4, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.used(x) * self.calls

    model = Counting()
    report = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model).consolidate(
        [torch.randn(8, 4)], progress=False
    )
    assert any("differ from run to run" in note and "'unused." in note for note in report.notes)
    assert {row.name for row in report.of(Fate.FREE)} == {"unused.weight", "unused.bias"}


def test_random_outputs_are_compared_under_the_same_random_numbers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + torch.randn(8) + np.random.rand()

    model = Noisy()
    state = torch.get_rng_state()
    report = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model).consolidate(
        [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))], progress=False
    )
    assert not [note for note in report.notes if "run to run" in note]
    assert len(report.of(Fate.FREE)) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_pass_that_fails_on_other_values_has_read_them() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = nn.Parameter(torch.tensor([1.0]))
            self.array, self.head = self.choice.detach().numpy(), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            if self.array[0] != 1.0:
                raise ValueError("no such choice")
            return self.head(x)

    model = Table()
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.consolidate([torch.randn(8, 4)], progress=False)
    assert optimizer.bases["choice"].fate is Fate.FROZEN and float(model.choice) == 1.0
