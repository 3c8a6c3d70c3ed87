"""Basis stores with every kind of content, for the tests of files, plots and the command line."""

from __future__ import annotations

import torch
from torch import Tensor

from nullspace_optim.subspace.basis import Basis, BasisStore, Fate, Subspace
from nullspace_optim.subspace.layout import Layout, Side


def orthonormal(groups: int, size: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `[groups, size, max(ranks)]`: orthonormal columns, then columns of zeros up to the largest rank."""
    U = torch.zeros(groups, size, max(ranks), dtype=dtype)
    for group, rank in enumerate(ranks):
        U[group, :, :rank] = torch.linalg.qr(torch.randn(size, rank, dtype=dtype)).Q
    return U


def subspace(side: Side, matrix: Tensor, ranks: tuple[int, ...], covariance: bool = False) -> Subspace:
    """Return a subspace of `matrix` `[g, m, d]` with random directions."""
    groups, size = matrix.shape[0], matrix.shape[2 if side == "right" else 1]
    U = orthonormal(groups, size, ranks, matrix.dtype)
    anchor = matrix @ U if side == "right" else U.mH @ matrix
    spectrum = torch.logspace(2, -4, size).repeat(groups, 1)
    square = torch.eye(size).repeat(groups, 1, 1) if covariance else None
    return Subspace(side, U, anchor, ranks, size, spectrum, 0.9991, square)


def protected(name: str, shape: tuple[int, ...], side: Side, *ranks: int, layout: Layout | None = None) -> Basis:
    """Return the basis of a random weight of `shape`, used by two tasks."""
    layout = layout or Layout()
    part = subspace(side, layout.to_matrix(torch.randn(shape)), ranks)
    tasks, history = ("aircraft", "birds"), (sum(ranks) // 2, sum(ranks))
    return Basis(name, shape, Fate.PROTECTED, "met rows", layout, {side: part}, tasks, history)


def full_store() -> BasisStore:
    """Return a store with all fates, sides, layouts, odd names and odd dtypes."""
    store = BasisStore()
    store.tasks = [
        {"name": "aircraft", "policy": {"name": "Energy", "threshold": 0.999}, "rows": 640, "note": None},
        {
            "name": "birds",
            "policy": {"name": "Energy", "threshold": 0.999},
            "rows": 320,
            "ok": True,
            "drift": [0.5, 1e-8],
        },
    ]
    store.put(protected("visual.fc.weight", (6, 8), "right", 3))
    store.put(protected("visual.proj", (8, 5), "left", 4))
    store.put(protected("conv.weight", (6, 2, 3, 3), "right", 5, 2, layout=Layout("grouped", 2)))
    store.put(protected("up.weight", (4, 3, 2, 2), "right", 2, 6, layout=Layout("transposed", 2)))
    store.put(protected("expert.weight", (3, 4, 5), "right", 1, 0, 5, layout=Layout("batched")))
    joint = protected("joint.weight", (4, 7), "right", 2)
    joint.subspaces["right"] = subspace("right", torch.randn(1, 4, 8), (2,), covariance=True)
    joint.bias = "joint.bias"
    store.put(joint)
    tied = protected("tied.weight", (9, 4), "right", 4)
    index = torch.tensor([0, 3, 8])
    tied.subspaces["rows"] = Subspace("rows", index, torch.randn(3, 4), (3,), 9, torch.zeros(1, 0), 1.0)
    tied.fate, tied.reason = Fate.FULL, "no free direction left"
    store.put(tied)
    soft = protected("soft.weight", (4, 7), "right", 3)
    soft.subspaces["right"].scale = torch.tensor([[1.0, 0.75, 0.2]])
    soft.subspaces["right"].members = torch.tensor([[[True, True, False]], [[False, True, True]]])
    store.put(soft)
    store.put(
        Basis("visual.ln.weight", (8,), Fate.FROZEN, "read by aten.native_layer_norm", kept=torch.ones(8).bfloat16())
    )
    store.put(Basis("scale\n\x1b[31m/../é", (), Fate.FROZEN, "read by aten.exp", kept=torch.tensor(2.5)))
    store.put(Basis("head.weight", (3, 8), Fate.FREE, "not read"))
    store.buffers = {"bn.num_batches_tracked": torch.tensor(7), "mask": torch.full((2, 2), -torch.inf)}
    store.probes = {"aircraft": {"inputs": torch.randn(2, 3), "outputs": torch.zeros(0, 4).half()}, "birds": {}}
    return store
