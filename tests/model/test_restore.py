"""`consolidate` and `verify` leave no trace: flags, buffers, random state, hooks, gradients, global switches."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from nullspace_optim import ConsolidationError, Energy, NullSpaceOptimizer


class Net(nn.Module):
    """Convolution, BatchNorm (one of them frozen by the user), dropout, attention: everything that has a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.BatchNorm2d(8).eval()
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.fail_at = -1
        self.error: BaseException = RuntimeError("the model failed")
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error
        hidden = self.drop(self.frozen(self.norm(self.first(images)))).flatten(2).mT
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        logits: Tensor = self.head(hidden.mean(1))
        return logits


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def _trace(model: Net, optimizer: NullSpaceOptimizer, loader: Any) -> dict[str, Any]:
    """Return everything that must be as before, as comparable values."""
    protection = optimizer._core.protection
    return {
        "flags": [module.training for module in model.modules()],
        "weights": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "gradients": {name: (id(p.grad), p.grad.numpy().tobytes()) for name, p in model.named_parameters()},
        "requires": [p.requires_grad for p in model.parameters()],
        "random": _random_state(),
        "generator": loader.generator.get_state().numpy().tobytes() if hasattr(loader, "generator") else None,
        "hooks": [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()],
        "identity": [id(b) for b in model.buffers()],
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "stance": str(torch._dynamo.eval_frame._stance),
        "precision": torch.get_float32_matmul_precision(),
        "tasks": len(optimizer._core.store.tasks),
        "ranks": {name: basis.rank for name, basis in optimizer.bases.items()},
        "guards": list(protection.guards),
        "attributes": sorted(model.__dict__),
    }


class Interrupted:
    """A loader that raises after its first batch."""

    def __init__(self, batches: list[Tensor], error: BaseException) -> None:
        self.batches, self.error = batches, error

    def __iter__(self) -> Iterator[Tensor]:
        torch.rand(1), random.random(), np.random.rand()
        yield self.batches[0]
        raise self.error


@pytest.fixture
def ready() -> tuple[Net, NullSpaceOptimizer]:
    model = Net().train()
    model.frozen.eval()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=Energy(0.9))
    model(torch.randn(4, 3, 6, 6)).square().mean().backward()
    return model, optimizer


@pytest.mark.parametrize("consolidated", [False, True], ids=["first-task", "second-task"])
@pytest.mark.parametrize("around", ["plain", "autocast", "no-grad"])
@pytest.mark.fault(61, 62, 63, 64, 72, 76)
def test_a_consolidation_leaves_no_trace(
    ready: tuple[Net, NullSpaceOptimizer], consolidated: bool, around: str
) -> None:
    model, optimizer = ready
    data = TensorDataset(torch.randn(12, 3, 6, 6), torch.zeros(12))
    loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    if consolidated:
        optimizer.consolidate(loader, progress=False)
    order: list[str] = []
    model.head.register_forward_pre_hook(lambda *_: order.append("first"))
    model.head.register_forward_hook(lambda *_: order.append("second"))
    before = _trace(model, optimizer, loader)
    with torch.autocast("cpu", enabled=around == "autocast"), torch.set_grad_enabled(around != "no-grad"):
        optimizer.consolidate(loader, progress=False)
        assert torch.is_autocast_enabled("cpu") is (around == "autocast")
        assert torch.is_grad_enabled() is (around != "no-grad")
    after = _trace(model, optimizer, loader)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"tasks", "ranks", "guards", "hooks"}
    assert after["tasks"] == before["tasks"] + 1
    assert order[:2] == ["first", "second"]
    assert [len(table) for table in (model.head._forward_pre_hooks, model.head._forward_hooks)] == [1, 1]
    optimizer.verify(loader)
    assert _trace(model, optimizer, loader) == after


ERRORS = [RuntimeError("the loader failed"), KeyboardInterrupt(), StopAsyncIteration("odd")]


@pytest.mark.parametrize("consolidated", [False, True], ids=["first-task", "second-task"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["loader", "model"])
@pytest.mark.fault(44, 45, 74)
def test_after_an_error_midway_everything_is_as_before(
    ready: tuple[Net, NullSpaceOptimizer], where: str, error: BaseException, consolidated: bool
) -> None:
    model, optimizer = ready
    batches = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    if consolidated:
        optimizer.consolidate(batches, progress=False)
    loader: Any = Interrupted(batches, error) if where == "loader" else batches
    if where == "model":
        model.fail_at, model.error = model.calls + 2, error
    before = _trace(model, optimizer, loader)
    outcome = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(type(error)) as caught:
        optimizer.consolidate(loader, progress=False)
    assert caught.value is error
    if where == "model" and isinstance(error, Exception) and hasattr(error, "__notes__"):
        assert "batch 1" in error.__notes__[-1]
    assert _trace(model, optimizer, loader) == before
    assert optimizer.state_dict()["param_groups"] == outcome
    model.fail_at = -1
    optimizer.consolidate(batches, name="again", progress=False)


def test_pending_corrections_are_undone_when_a_consolidation_fails() -> None:
    model, old = nn.Linear(24, 16), torch.randn(20, 24)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model)
    optimizer.consolidate([old], progress=False)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
    before, owed = model.weight.detach().clone(), optimizer._core.protection.owed
    assert owed["pending"] == ["weight"]
    with pytest.raises(ConsolidationError, match="no batches"):
        optimizer.consolidate([], progress=False)
    assert torch.equal(model.weight, before)
    assert optimizer._core.protection.owed == owed


def test_buffers_that_a_forward_replaces_or_changes_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("last", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.last = x.mean(0)
            return self.layer(x)

    model = Counting()
    seen, last = model.seen, model.last
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model)
    optimizer.consolidate([torch.randn(8, 4)], progress=False)
    assert model.seen is seen
    assert model.last is last
    assert float(seen) == 0.0
    assert not last.any()
