"""Long runs at small learning rates, low precision, several heads, DDP, and steps with nothing to learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import take_steps
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW
from training import mlp, relative_drift

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank

RATE, STEPS, OUT, IN = 1e-6, 2_000, 64, 128


def _displacement(kept: int, dtype: torch.dtype) -> Tensor:
    """Train 2,000 steps with `kept` protected directions; return how the free part of the weight moved, float64."""
    torch.manual_seed(0)
    start = torch.randn(OUT, IN, dtype=torch.float64) / IN**0.5
    old, inputs = torch.randn(kept, IN, dtype=torch.float64), torch.randn(64, IN, dtype=torch.float64)
    targets = torch.randn(64, OUT, dtype=torch.float64)
    layer = nn.Linear(IN, OUT, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(start.float())
    inputs, targets = inputs.float().to(dtype), targets.float().to(dtype)
    optimizer = NullSpaceOptimizer(AdamW(layer.parameters(), lr=RATE, weight_decay=0.01), layer, policy=NumericalRank())
    if kept:
        optimizer.consolidate([old.float().to(dtype)], progress=False)
        assert optimizer.bases["weight"].rank == kept
    take_steps(optimizer, lambda: (layer(inputs) - targets).square().mean(), STEPS)
    moved = layer.weight.detach().double() - start.float().double()
    free = torch.linalg.svd(old, full_matrices=True).Vh[kept:].T if kept else torch.eye(IN, dtype=torch.float64)
    return moved @ free


@pytest.fixture(scope="module")
def unprotected_error() -> float:
    """Relative error of plain float32 training against float64."""
    return relative_drift(_displacement(0, torch.float32), _displacement(0, torch.float64))


@pytest.mark.parametrize("share", ["1/16", "1/4", "1/2", "3/4", "15/16"])
def test_free_directions_are_trained_as_exactly_as_without_protection(share: str, unprotected_error: float) -> None:
    over, under = map(int, share.split("/"))
    kept = IN * over // under
    error = relative_drift(_displacement(kept, torch.float32), _displacement(kept, torch.float64))
    assert error <= 2 * unprotected_error


@pytest.mark.fault(14)
def test_bfloat16_weights_stay_within_their_rounding() -> None:
    layer, old, inputs = nn.Linear(64, 32, bias=False).bfloat16(), torch.randn(16, 64), torch.randn(64, 64)
    optimizer = NullSpaceOptimizer(AdamW(layer.parameters(), lr=1e-2, weight_decay=0.01), layer, policy=NumericalRank())
    optimizer.consolidate([old.bfloat16()], progress=False)
    start, targets = layer.weight.detach().double(), torch.randn(64, 32).bfloat16()
    basis = optimizer.bases["weight"].U.double()

    def loss() -> Tensor:
        return (layer(inputs.bfloat16()) - targets).square().mean()

    before = loss().item()
    take_steps(optimizer, loss, 500)
    now = layer.weight.detach().double()
    assert loss().item() <= before / 2
    assert ((now - start) @ basis).norm() / (start @ basis).norm() <= 2**-8 * now.norm() / start.norm()
    assert optimizer.verify(tolerance=2**-8 * float(now.norm() / start.norm())).ok


class TwoHeads(nn.Module):
    """A trunk `[24] -> [16]` and one head a task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(24, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])

    def forward(self, inputs: Tensor, task: int = 0) -> Tensor:
        logits: Tensor = self.heads[task](self.trunk(inputs).tanh())
        return logits


def test_the_second_head_trains_after_the_first_task_is_consolidated() -> None:
    model, old = TwoHeads(), torch.randn(5, 24)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank())
    report = optimizer.consolidate([old], progress=False)
    assert {row.name for row in report.of(Fate.FREE)} == {"heads.1.weight", "heads.1.bias"}
    with torch.no_grad():
        outputs = model(old)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, targets = torch.randn(32, 24), torch.randn(32, 4)
    first = (model(inputs, 1) - targets).square().mean().item()
    take_steps(optimizer, lambda: (model(inputs, 1) - targets).square().mean(), 300)
    assert (model(inputs, 1) - targets).square().mean().item() < first / 2
    assert not torch.equal(model.heads[1].bias, start["heads.1.bias"])
    assert not torch.equal(model.trunk.weight, start["trunk.weight"])
    assert torch.equal(model.heads[0].weight, start["heads.0.weight"])
    with torch.no_grad():
        assert relative_drift(model(old), outputs) <= 1e-5


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_with_frozen_parameters() -> None:
    model, old = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 8)), torch.randn(5, 24)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = NullSpaceOptimizer(AdamW(parallel.parameters(), lr=0.01), policy=NumericalRank())
    report = optimizer.consolidate([old], progress=False)
    assert report.model == "Sequential"
    assert {row.name for row in report.of(Fate.FROZEN)} == {"0.bias", "1.weight", "1.bias", "2.bias"}
    outputs, inputs, targets = model(old).detach(), torch.randn(32, 24), torch.randn(32, 8)
    first = (parallel(inputs) - targets).square().mean().item()
    take_steps(optimizer, lambda: (parallel(inputs) - targets).square().mean(), 200)
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert (parallel(inputs) - targets).square().mean().item() < first / 2
    assert relative_drift(model(old).detach(), outputs) <= 1e-5


@pytest.mark.parametrize("build", [
    lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    lambda p: Adam(p, lr=0.1, weight_decay=0.1, foreach=True),
    lambda p: AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    lambda p: LBFGS(p, lr=0.1),
], ids=["SGD", "AdamW", "Adam-foreach", "AdamW-fused", "LBFGS"])  # fmt: skip
def test_zero_gradients_with_momentum_and_decay_do_not_move_what_is_frozen(build) -> None:  # type: ignore[no-untyped-def]
    model, old = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 8)), torch.randn(5, 24)
    optimizer = NullSpaceOptimizer(build(model.parameters()), model, policy=NumericalRank())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.randn(8, 24)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)  # momentum points somewhere
    optimizer.consolidate([old], progress=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs = model(old).detach()

    def nothing() -> Tensor:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return torch.zeros(())

    for _ in range(20):
        optimizer.step(nothing)
    for name in ("0.bias", "1.weight", "1.bias", "2.bias"):
        assert torch.equal(model.get_parameter(name), start[name])
    assert relative_drift(model(old).detach(), outputs) <= 1e-5
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_history_from_before_does_not_move_what_is_frozen(search: str | None) -> None:
    model, old = mlp(), torch.randn(5, 24)
    optimizer = NullSpaceOptimizer(
        LBFGS(model.parameters(), lr=0.3, max_iter=3, line_search_fn=search), model, policy=NumericalRank()
    )
    inputs, targets = torch.randn(32, 24), torch.randn(32, 8)
    take_steps(optimizer, lambda: (model(inputs) - targets).square().mean(), 3, closure=True)
    optimizer.consolidate([old], progress=False)
    outputs, bias, weight = model(old).detach(), model[0].bias.detach().clone(), model[0].weight.detach().clone()
    take_steps(optimizer, lambda: (model(inputs) - targets).square().mean(), 5, closure=True)
    assert torch.equal(model[0].bias, bias)
    assert not torch.equal(model[0].weight, weight)
    assert relative_drift(model(old).detach(), outputs) <= 1e-5
