"""The models, data and training that the scenarios share with their one-process twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, AdamW, Optimizer

from nullspace_optim import FixedRank, NullSpaceOptimizer

Tensors = dict[str, Tensor]


class Everything(nn.Module):
    """One parameter of every kind: embedding, grouped and transposed convolution, `x @ P`, norm, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.grouped = nn.Conv1d(12, 12, 3, groups=4, padding=1)
        self.block = nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 12))
        self.norm = nn.LayerNorm(12)
        self.projection = nn.Parameter(torch.randn(12, 6) / 4)
        self.transposed = nn.ConvTranspose1d(12, 6, 3, padding=1)
        self.head = nn.Linear(6, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.grouped(self.embedding(tokens).mT).mT
        rows = self.norm(self.block(rows) + rows)
        rows = rows @ self.projection + self.transposed(rows.mT).mT
        return self.head(rows[:, -1])


class Plain(nn.Module):
    """Matrices that are all stored `[d_out, d_in]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 17)
        self.block = nn.Sequential(nn.Linear(17, 17), nn.GELU(), nn.Linear(17, 12))
        self.head = nn.Linear(12, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.block(self.first(rows).tanh()))


class Codebook(nn.Module):
    """20 codes of 12 numbers, looked up by number, or mixed by shares that a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.choose = nn.Embedding(20, 12), nn.Linear(12, 20)

    def forward(self, tokens: Tensor, mixed: bool = True) -> Tensor:
        found: Tensor = self.codes(tokens)
        return torch.softmax(3 * self.choose(found), -1) @ self.codes.weight if mixed else found


def seeded(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind()


def tokens(seed: int, batches: int = 5) -> list[Tensor]:
    """Return batches `[4, 5]` of tokens below 9 (old tasks leave some rows of the embedding unused)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 9, (4, 5), generator=generator) for _ in range(batches)]


def rows(seed: int, batches: int = 5) -> list[Tensor]:
    """Return batches `[4, 12]` of input rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 12, generator=generator) for _ in range(batches)]


def share(batches: list[Tensor], rank: int) -> list[Tensor]:
    """Return uneven shares: 2 of 5 batches for rank 0, 3 for rank 1."""
    return batches[:2] if rank == 0 else batches[2:]


def wrap(model: nn.Module, base: Optimizer | None = None, **options: Any) -> NullSpaceOptimizer:
    """Wrap AdamW (or `base`) for `model`, which the optimizer then keeps alive."""
    options.setdefault("policy", FixedRank(3))
    base = AdamW(model.parameters(), lr=0.01, weight_decay=0.1) if base is None else base
    optimizer: Any = NullSpaceOptimizer(base, model, **options)
    optimizer.held = model
    return optimizer


def momentum(model: nn.Module) -> SGD:
    """Return SGD, which does not blow the rounding of a projected gradient up to a step as Adam does."""
    return SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)


def train(model: nn.Module, optimizer: NullSpaceOptimizer, batches: list[Tensor], rank: int | None = None) -> None:
    """Take a step for each batch; a rank takes its half of every batch."""
    for batch in batches:
        half = batch if rank is None else batch.chunk(2)[rank]
        optimizer.zero_grad()
        (model(half) - 1).square().mean().backward()
        optimizer.step()


def two_tasks(
    model: nn.Module, optimizer: NullSpaceOptimizer, data: Any, rank: int | None = None, steps: int = 6
) -> None:
    """Consolidate, train, consolidate, train; ranks have uneven loaders."""
    for task in (1, 2):
        loader = data(task) if rank is None else share(data(task), rank)
        optimizer.consolidate(loader, progress=False)
        train(model, optimizer, data(10 + task, steps), rank)


def results(optimizer: NullSpaceOptimizer, weights: Tensors) -> Tensors:
    """Return what must not depend on the number of processes: projectors, anchors lifted to weights, weights."""
    found = {f"weight {name}": weight.detach().clone() for name, weight in weights.items()}
    for name, basis in optimizer._core.snapshot().items():
        for side, subspace in basis.subspaces.items():
            u, a = subspace.basis, subspace.anchor
            if side == "rows":
                found[f"index {name}"], found[f"anchor {name} rows"] = u, a
                continue
            share = 1.0 if subspace.scale is None else subspace.scale.unsqueeze(1)
            found[f"projector {name} {side}"] = (u * share) @ u.mT
            found[f"anchor {name} {side}"] = a @ u.mT if side == "right" else u @ a
        if basis.kept is not None:
            found[f"kept {name}"] = basis.kept
    return found


def compare(found: Tensors, expected: Tensors, tolerance: float = 1e-5, what: str = "") -> None:
    """Assert that every tensor is within a relative `tolerance`."""
    assert found.keys() == expected.keys(), (what, sorted(found.keys() ^ expected.keys()))
    for name, value in expected.items():
        error = float((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12))
        assert error <= tolerance, f"{what} {name}: {error:.1e}"


def save_by_torch(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Save as PyTorch's own recipe does, which knows the optimizer's state and groups only."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load_by_torch(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Load what `save_by_torch` saved."""
    weights, state = get_state_dict(model, optimizer)
    both = {"model": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])


class Breaking(SGD):
    """Moves the weights and then fails, once it is told to."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                parameter.sub_(parameter.grad, alpha=0.05)
                parameter.mul_(0.99)
        if self.broken:
            self.broken = False
            raise MemoryError("out of memory")
