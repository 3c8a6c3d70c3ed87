"""Fifty tasks in sequence on a small model: orthonormal, exact, and no task costs more than the one before."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_impl import orthogonality_error
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nullspace_optim import NullSpaceOptimizer, NumericalRank

WIDTH, TASKS, SETTLED = 64, 50, 20
MOMENTS = (20, 34, 49)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def live() -> tuple[int, int]:
    """Return how many tensors live and how many bytes they hold."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return len(found), sum(tensor.nbytes for tensor in found)


def test_fifty_tasks_stay_exact_and_cost_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 48), nn.Linear(48, 40), nn.Linear(40, 8))  # linear: spans stay small
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank())
    directions, inputs, targets = torch.randn(SETTLED // 2, WIDTH), torch.randn(32, WIDTH), torch.randn(32, 8)
    seen: list[tuple[Tensor, Tensor]] = []
    costs, records = [], []
    for task in range(TASKS):
        rows = (
            torch.randn(6, min(task + 1, len(directions))) @ directions[: task + 1]
        )  # ten tasks are new, the rest not
        optimizer.consolidate([rows], progress=False)
        seen.append((rows, model(rows).detach()))
        for _ in range(2):
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            with Calls() as calls, FlopCounterMode(display=False) as flops:
                optimizer.step()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        ranks = tuple(basis.rank for basis in optimizer.bases.values())
        cost = (calls.count, flops.get_total_flops(), hooks, ranks)
        costs.append(cost)
        if task in MOMENTS:
            optimizer.save(tmp_path / "bases")
            records.append((*live(), (tmp_path / "bases").stat().st_size))
    for basis in optimizer.bases.values():
        assert basis.subspaces == {} or orthogonality_error(basis.U) <= 1e-6
    for rows, outputs in seen:
        assert float((model(rows) - outputs).norm() / outputs.norm()) <= 1e-5
    assert optimizer.verify().ok
    assert len(set(costs[SETTLED:])) == 1, "operators, operations, hooks and ranks of one step"
    tensors, held, size = (per_task([record[what] for record in records]) for what in range(3))
    assert tensors <= 5.5, "what one task adds: its probe of three tensors, and the two of this test"
    assert held <= 8_000 and size <= 12_000, "bytes"


def per_task(values: list[int]) -> float:
    """Return the growth for each task, the same in both halves of the settled tasks."""
    first, second = ((b - a) / (n - m) for (a, b), (m, n) in zip(pairwise(values), pairwise(MOMENTS)))
    assert second == pytest.approx(first, rel=0.1, abs=0.5), values
    return second
