"""timm: its EMA and training script's options are tested elsewhere; here every optimizer that its factory knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import relative_drift
from two_tasks import example

from nullspace_optim import NullSpaceOptimizer, NumericalRank

optim = pytest.importorskip("timm.optim")
pytestmark = pytest.mark.filterwarnings("ignore")
OLD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
NEW = torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
ABSENT = ("bnb", "fused")  # bitsandbytes and apex, which tests/contract tries where they are installed


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


def wrapped(name: str, model: nn.Module) -> NullSpaceOptimizer:
    try:
        base = optim.create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.01)
    except (ImportError, AssertionError, RuntimeError) as error:
        if not name.startswith(ABSENT):
            raise
        pytest.skip(f"{name}: {error}")
    return NullSpaceOptimizer(base, model, policy=NumericalRank())


def learn(model: nn.Module, optimizer: Any, inputs: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward(create_graph=optimizer.is_second_order)  # as timm's training script does
        optimizer.step()


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_every_optimizer_of_the_factory_keeps_old_outputs(name: str) -> None:
    model = build()
    optimizer = wrapped(name, model)
    learn(model, optimizer, OLD, 2)
    optimizer.consolidate([OLD], progress=False)
    old, weight = model(OLD).detach(), model[0].weight.detach().clone()
    learn(model, optimizer, NEW, 3)
    assert relative_drift(model(OLD).detach(), old) < 1e-5
    assert not torch.equal(model[0].weight, weight)
    assert optimizer.verify().ok


def test_adahessian_is_told_from_optimizers_of_first_order() -> None:
    model = build()
    assert wrapped("adahessian", model).is_second_order
    assert not wrapped("adamw", build()).is_second_order


def test_lookahead_of_the_factory_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Lookahead.step\(\) runs no step hooks"):
        wrapped("lookahead_adamw", build())


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("timm.md"), "timm.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "bases.safetensors").is_file()
