"""What protection holds and waits for: bytes by formula against every live tensor, and no wait for the device."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from counts import counted
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from nullspace_optim import SGP, FixedRank, NullSpaceOptimizer
from nullspace_optim.protection.guard import Workspace

SHAPES = ((48, 96), (72, 48), (40, 72))  # outputs m, inputs d
ROWS = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))


def trained(k: int, base: Any = AdamW, **options: Any) -> tuple[nn.Module, NullSpaceOptimizer]:
    """Three matrices, `k` directions of each kept, optimizer state and gradients there."""
    torch.manual_seed(0)
    layers = [part for m, d in SHAPES for part in (nn.Linear(d, m, bias=False), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    options = {"policy": FixedRank(k), **options}
    optimizer = NullSpaceOptimizer(base(model.parameters(), lr=1e-3), model, **options)
    step(optimizer)
    return model, optimizer


def step(optimizer: NullSpaceOptimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    optimizer.model(ROWS).square().sum().backward()
    optimizer.step()


def defined(tensor: Tensor) -> bool:
    """False for the empty shells that torch 2.6 keeps of tensors that were never there."""
    try:
        return tensor.is_leaf is not None
    except RuntimeError:
        return False


def live() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process holds, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and defined(thing)]
    found = {}
    for tensor in tensors + [t.grad for t in tensors if t.is_leaf and t.grad is not None]:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("k", [12, 30])
def test_protection_holds_what_the_formula_says_and_not_a_byte_more(k: int, precision: str) -> None:
    _model, optimizer = trained(k, precision=precision)
    before = live()
    held = [t.untyped_storage() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and defined(t)]
    held += [p.grad.untyped_storage() for p in _model.parameters() if p.grad is not None]  # no address is used again
    report = optimizer.consolidate([ROWS], progress=False)
    step(optimizer)
    core = optimizer._core
    small = [t for probe in core.store.probes.values() for t in probe.values()]
    small += [subspace.spectrum for basis in core.store.values() for subspace in basis.subspaces.values()]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in small}
    grown = {pointer: size for pointer, size in live().items() if pointer not in before}
    stored = sum(4 * k * (d + m) for m, d in SHAPES)
    copies = sum(4 * m * d for m, d in SHAPES if precision == "fast" or 2 * k > d)
    complements = sum(4 * d * (d - k) for _, d in SHAPES if 2 * k > d)
    anchor_form = [4 * k * m for m, d in SHAPES if precision == "exact" and 2 * k <= d]
    residual = max(anchor_form, default=0)  # one, for all matrices
    samples = 4 * 32 * SHAPES[0][1]  # of the task, whose drift the next report tells
    kept = sum(size for pointer, size in grown.items() if pointer not in pointers)
    assert held and kept == stored + copies + complements + residual + samples
    assert sum(grown.values()) - kept <= sum(4 * 2 * d for _, d in SHAPES) + 4 * 65 * 4 + 32 * 16
    assert (report.bytes, report.transient_bytes) == (stored, copies)


def test_a_workspace_is_as_large_as_its_largest_user() -> None:
    workspace = Workspace()
    like = torch.zeros(1)
    first = workspace.take((2, 3), like)
    assert first.shape == (2, 3) and workspace.take((3, 2), like).data_ptr() == first.data_ptr()
    assert workspace.take((1, 4, 5), like).shape == (1, 4, 5) and workspace.nbytes == 80
    assert workspace.take((4,), like.double()).dtype == torch.float64 and workspace.nbytes == 80 + 32


class Waits(TorchDispatchMode):
    """Collects operators that wait for the device because Python wants a value."""

    NAMES = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("options", [{}, {"precision": "fast"}, {"project": "both"}, {"policy": SGP(0.9)}])
@pytest.mark.parametrize("k", [12, 30])
def test_no_step_waits_for_the_device(k: int, options: dict[str, Any]) -> None:
    _model, optimizer = trained(k, base=SGD, **options)
    optimizer.consolidate([ROWS], progress=False)
    step(optimizer)  # the first one reads once how much of the gradient is free
    with Waits() as waits:
        for _ in range(17):  # one of them exact
            step(optimizer)
    assert waits.found == []
    with Waits() as waits:
        optimizer.verify()
    assert waits.found, "this test cannot see any wait"


def test_the_first_step_after_a_consolidation_costs_what_every_step_costs() -> None:
    model, optimizer = trained(12, base=SGD)
    optimizer.consolidate([ROWS], progress=False)
    optimizer.zero_grad()
    model(ROWS).square().sum().backward()
    with counted() as first:
        optimizer.step()
    assert first.get_total_flops() == sum(4 * m * d * 12 for m, d in SHAPES)


def test_a_protected_step_passes_through_ten_files_or_fewer() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    opt = NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), 1e-3), model)
    opt.consolidate([torch.randn(8, 12)], progress=False)
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "nullspace_optim" in frame.f_code.co_filename:
            files.add(frame.f_code.co_filename)

    for step in range(3):
        model(torch.randn(4, 12)).square().sum().backward()
        sys.setprofile(note if step == 2 else None)
        try:
            opt.step()
        finally:
            sys.setprofile(None)
    assert 0 < len(files) <= 10, sorted(files)
