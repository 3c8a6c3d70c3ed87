"""`torch.inference_mode` around every call: nothing that outlives the call is made in it, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from training import NEW, OLD, mlp, relative_drift, train, wrap

from nullspace_optim import NullSpaceOptimizer

Call = Callable[[NullSpaceOptimizer, nn.Module, Path], object]


def evaluate(optimizer: NullSpaceOptimizer, model: nn.Module, path: Path) -> None:
    model.eval()
    model(OLD)
    model.train()


CALLS: dict[str, Call] = {
    "evaluate": evaluate,
    "verify": lambda optimizer, model, path: (optimizer.verify(), optimizer.verify([OLD])),
    "consolidate": lambda optimizer, model, path: optimizer.consolidate([OLD[:2]], progress=False),
    "save": lambda optimizer, model, path: optimizer.save(path),
    "load": lambda optimizer, model, path: (optimizer.save(path), optimizer.load(path)),
    "state": lambda optimizer, model, path: optimizer.load_state_dict(optimizer.state_dict()),
    "reanchor": lambda optimizer, model, path: optimizer.reanchor(),
    "prune": lambda optimizer, model, path: optimizer.prune({"task 1": [OLD]}, progress=False),
    "measure": lambda optimizer, model, path: optimizer.measure([OLD], progress=False),
    "release": lambda optimizer, model, path: optimizer.release("2.bias"),
    "another": lambda optimizer, model, path: wrap(model),
}


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", CALLS)
def test_training_goes_on_after_a_call(name: str, steps: int, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = wrap(model, precision=precision, policy=None)
    optimizer.consolidate([OLD], progress=False)
    hidden = model[0](OLD).detach()
    train(optimizer, model, steps)
    with torch.inference_mode():
        made = CALLS[name](optimizer, model, tmp_path / "bases.safetensors")
    optimizer = made if isinstance(made, NullSpaceOptimizer) else optimizer
    train(optimizer, model, 20)
    assert optimizer.verify().ok
    if name != "prune":  # which gives directions back
        assert relative_drift(model[0](OLD), hidden) < 1e-5
    optimizer.consolidate([NEW[:3]], name="later", progress=False)
    train(optimizer, model, 3)
    assert optimizer.verify([NEW[:3]]).ok
