"""Ten thousand random mutations (a few hundred in CI) of a valid basis file and of a state dict: one kind of error."""

from __future__ import annotations

import io
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import damaged_bytes, damaged_state, places
from stores import full_store
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import NullSpaceError, NullSpaceOptimizer, NumericalRank
from nullspace_optim.files.basis_file import load, save

SEEDS = [pytest.param(range(200), id="200"), pytest.param(range(200, 10_000), id="10000", marks=pytest.mark.nightly)]
MOST_MEMORY = 30_000_000  # bytes of Python objects, for a file of 14 kB
LONGEST = 5.0  # seconds, where one mutation takes a millisecond


@pytest.mark.fault(87, 88, 96)
@pytest.mark.parametrize("seeds", SEEDS)
def test_a_damaged_basis_file_is_refused_whatever_was_done_to_it(seeds: range, tmp_path: Path) -> None:
    """Bytes that come out as they were are no mutation; everything else is refused: no bit of the file is idle."""
    path = tmp_path / "bases"
    save(full_store(), path)
    content = path.read_bytes()
    tracemalloc.start()
    try:
        for seed in seeds:
            mutant = damaged_bytes(content, seed)
            if mutant != content:
                path.write_bytes(mutant)
                began = time.perf_counter()
                with pytest.raises(NullSpaceError):
                    load(path)
                    pytest.fail(f"seed {seed}: a mutant was accepted")
                assert time.perf_counter() - began < LONGEST, seed
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def protected_run() -> tuple[nn.Module, NullSpaceOptimizer]:
    """Return a small model with joint biases, full, protected and frozen parameters, in the middle of a task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank(), precision="fast")
    optimizer.consolidate([torch.randn(6, 12)], progress=False)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def same(one: Any, two: Any) -> bool:
    """Return whether two nested states are equal in structure, types and every bit."""
    if isinstance(one, Tensor):
        return (
            isinstance(two, Tensor) and one.dtype == two.dtype and _bits(one) == _bits(two) and one.shape == two.shape
        )
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def protection(state: dict[str, Any]) -> Any:
    """Return all that a state dict says about protection."""
    return state.get("nullspace"), [group.get("nullspace") for group in state["param_groups"]]


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.fault(95, 100)
@pytest.mark.parametrize("seeds", SEEDS)
def test_damaged_protection_in_a_state_dict_is_refused_or_provably_neutral(seeds: range) -> None:
    """Every node of the protection: removed, replaced, renamed, edited; loaded into an optimizer without bases.

    Neutral is only a changed fingerprint of a parameter group beside an untouched ``"nullspace"`` entry, and only if
    the result is the same to the bit. The base optimizer's own part is not touched: what `AdamW` accepts is for torch
    to say.
    """
    model, optimizer = protected_run()
    state = optimizer.state_dict()
    paths = [("nullspace",), *(("nullspace", *path) for path in places(state["nullspace"]))]
    paths += [("param_groups", 0, "nullspace")] * 3
    fresh = plain(model, optimizer)
    for seed in seeds:
        mutant = damaged_state(state, paths, seed)
        if same(protection(mutant), protection(state)):
            continue
        try:
            fresh.load_state_dict(mutant)
        except NullSpaceError:
            assert not fresh.bases, seed
        else:
            assert same(mutant.get("nullspace"), state["nullspace"]), f"seed {seed} was accepted"
            assert same(protection(fresh.state_dict()), protection(state)), f"seed {seed} changed what is protected"
            fresh = plain(model, fresh)
    fresh.load_state_dict(state)
    assert same(protection(fresh.state_dict()), protection(state)), "otherwise the test proves nothing"


def plain(model: nn.Module, old: NullSpaceOptimizer) -> NullSpaceOptimizer:
    """Return an optimizer without bases for the model of `old`."""
    old.detach()
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank(), precision="fast")


@pytest.mark.nightly
def test_damaged_checkpoint_files_never_execute_or_load_other_bases(tmp_path: Path) -> None:
    """A `torch.save` file with flipped bytes: torch refuses it, or we do, or the bases are the same to the bit."""
    _model, optimizer = protected_run()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    before, content = optimizer.state_dict()["nullspace"], buffer.getvalue()
    for seed in range(1000):
        try:
            state = torch.load(io.BytesIO(damaged_bytes(content, 3 * seed + 2)), weights_only=True)
            optimizer.load_state_dict(state)
        except Exception as error:  # torch has no error of its own for this
            assert not isinstance(error, (MemoryError, RecursionError)), seed
        assert same(optimizer.state_dict()["nullspace"], before), seed
