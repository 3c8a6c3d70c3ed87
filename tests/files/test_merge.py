"""Experts renamed in a basis file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from training import mlp

from nullspace_optim import IGSP, NullSpaceOptimizer
from nullspace_optim.cli import main
from nullspace_optim.files.basis_file import load

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return mlp(12, 10, 4)


def experts(prefix: str, folder: Path) -> tuple[nn.Module, NullSpaceOptimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(prefix, network())
    mode = IGSP(target_modules=f"{prefix}.0", rank=2, candidates=2, cap=2, window=50)
    return model, NullSpaceOptimizer(AdamW(model.parameters(), 1e-4), model, mode=mode), torch.randn(16, 12)


def test_experts_are_renamed_with_their_layers_and_nothing_of_them_is_lost(tmp_path: Path) -> None:
    model, opt, rows = experts("net", tmp_path)
    for _ in range(2):  # the second task is left in its second phase, whose bases stand below the layer's name
        for _ in range(4):
            opt.zero_grad()
            model(rows).square().mean().backward()
            opt.step()
        if not opt._core.store.tasks:
            opt.consolidate([rows], name="one", progress=False)
    opt.save(tmp_path / "in.safetensors")
    assert any(name.startswith("igsp.net/0.") for name in load(tmp_path / "in.safetensors"))
    command = [
        "export",
        str(tmp_path / "out.safetensors"),
        str(tmp_path / "in.safetensors"),
        "--rename",
        "^net[.]",
        "tower.",
    ]
    assert main(command) == 0
    other, later, _ = experts("tower", tmp_path)
    later.load(tmp_path / "out.safetensors")
    with opt.task("one"), later.task("one"):
        assert torch.equal(model(rows), other(rows))
    assert later.status().phase == opt.status().phase == 2 and later.verify().ok
