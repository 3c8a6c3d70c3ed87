"""A real run of the model that a plan describes, with everything counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counts import counted
from torch import Tensor, nn

from nullspace_optim import FixedRank, NullSpaceOptimizer
from nullspace_optim.consolidation.describe import stored_bytes
from nullspace_optim.planning.predict import Conditions, by_rank, predict
from nullspace_optim.planning.shapes import Survey

BATCH = 8


class Measured:
    """A real model of the same architecture: one consolidation, then 16 counted steps."""

    def __init__(self, model: nn.Module, batch: Any, run: Callable[[Any], Any], k: int, **options: Any) -> None:
        torch.manual_seed(0)
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"policy": FixedRank(k), "rows": "all", **options}
        self.opt = NullSpaceOptimizer(torch.optim.SGD(trained, 1e-3), model, project="update", **options)
        self.opt.consolidate([batch], forward=run, progress=False)
        self.protection = self.opt._core.protection
        guards = self.protection.guards.values()
        with counted() as mode:
            outputs = run(batch)
            self.forward = mode.get_total_flops()
            total(outputs).backward()
        self.step = mode.get_total_flops()
        self.opt.step()  # the first step after a consolidation also sketches the weights, the origin of their movement
        with counted() as mode:
            for _ in range(16):
                self.opt.step()
        self.correction = mode.get_total_flops() / 16
        self.rows_used = {
            name: basis.subspaces["rows"].rank for name, basis in self.opt.bases.items() if "rows" in basis.subspaces
        }
        self.stored = stored_bytes(self.opt._core.store) + sum(b.nbytes for b in self.opt._core.store.buffers.values())
        self.copies = sum(t.nbytes for guard in guards for t in guard.previous)
        complements = [t for guard in guards for t in guard.complements.values()]
        stacks = self.protection.forms.stacks
        self.workspaces = self.protection.workspace.nbytes + sum(t.nbytes for t in [*complements, *stacks])


def total(outputs: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return torch.stack([t.float().sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad]).sum()


def agrees(found: Survey, real: Measured, k: int) -> None:
    """Compare every figure of a plan with a real run."""
    assert found.forward_flops == pytest.approx(real.forward, rel=0.01)
    assert found.step_flops == pytest.approx(real.step, rel=0.01)
    predicted = predict(found, by_rank(k), Conditions(rows_used=real.rows_used))
    memory = predicted.memory
    assert memory.bases + memory.anchors + memory.kept == real.stored
    assert memory.copies == real.copies
    assert memory.workspaces == real.workspaces
    assert predicted.step_flops == pytest.approx(real.correction, rel=0.01)
    fates = {basis.name: basis.fate.value for basis in real.opt.bases.values()}
    joint = {basis.bias for basis in real.opt.bases.values() if basis.bias}
    assert {weight.name for weight in found.weights} == {
        n for n, fate in fates.items() if fate in ("protected", "full") and n not in joint
    }
    assert {item.name for item in found.frozen} == {name for name, fate in fates.items() if fate == "frozen"}
