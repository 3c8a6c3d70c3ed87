"""Hooks act for a living wrapper on its own model, and on nothing else."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from nullspace_optim import NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import NullSpaceError


def network(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def wrap(model: nn.Module, **options: Any) -> NullSpaceOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return NullSpaceOptimizer(base, model, policy=NumericalRank(), **options)


def train(optimizer: NullSpaceOptimizer, model: nn.Module, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
        optimizer.step()


def images(scale: float = 3.0) -> Tensor:
    return torch.randn(64, 3, 8, 8) * scale + 1


def statistics(model: nn.Module) -> Tensor:
    return model[1].running_mean.clone()


def test_an_averaged_model_gets_fresh_statistics() -> None:
    model, x = network(), images()
    optimizer = wrap(model)
    train(optimizer, model, x, 5)
    optimizer.consolidate([x[:8]], progress=False)
    average, plain = AveragedModel(model), network()
    for _ in range(3):
        train(optimizer, model, x, 1)
        average.update_parameters(model)
    plain.load_state_dict(average.module.state_dict())
    update_bn([x], average)
    update_bn([x], plain)
    assert float(plain[1].running_mean.abs().max()) > 0.1
    torch.testing.assert_close(average.module[1].running_mean, plain[1].running_mean, rtol=0, atol=0)
    torch.testing.assert_close(average.eval()(x), plain.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_statistics_of_a_copy_move_and_those_of_the_model_do_not(make: Any) -> None:
    model = network()
    optimizer = wrap(model)
    optimizer.consolidate([images()[:8]], progress=False)
    twin, mean = make(model), statistics(model)
    twin.train()(images())
    model.train()(images())
    assert not torch.equal(statistics(twin), mean)
    assert torch.equal(statistics(model), mean)
    optimizer.detach()


def test_a_wrapper_that_is_gone_gives_the_model_back() -> None:
    model = network()
    optimizer = wrap(model)
    optimizer.consolidate([images()[:8]], progress=False)
    del optimizer
    gc.collect()
    mean = statistics(model)
    model.train()(images())
    assert not torch.equal(statistics(model), mean)
    assert model[1].training


def test_spectral_norm_of_a_wrapper_that_is_gone_moves_again() -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 6)), nn.Linear(6, 20))
    optimizer = wrap(model)
    optimizer.consolidate([torch.randn(4, 8)], progress=False)
    held = model[0].weight_u.clone()
    model.train()(torch.randn(4, 8))
    assert torch.equal(model[0].weight_u, held)
    del optimizer
    gc.collect()
    with torch.no_grad():
        model[0].weight_orig.add_(torch.randn(6, 8))
    model(torch.randn(4, 8))
    assert not torch.equal(model[0].weight_u, held)


READ = """
import sys, torch
sys.modules["nullspace_optim"] = None
model = torch.load(sys.argv[1], weights_only=False)
print(float(model.train()(torch.ones(2, 3, 8, 8)).sum()), float(model.eval()(torch.ones(2, 3, 8, 8)).sum()))
"""


def test_a_pickled_model_loads_where_this_package_is_not_installed(tmp_path: Any) -> None:
    model = network()
    optimizer = wrap(model)
    optimizer.consolidate([images()[:8]], progress=False)
    file = tmp_path / "model.pt"
    torch.save(model, file)
    assert b"nullspace_optim" not in file.read_bytes()
    subprocess.run([sys.executable, "-c", READ, str(file)], check=True, capture_output=True)
    optimizer.detach()


@pytest.mark.parametrize("copied", [False, True])
def test_scripting_says_what_to_do_and_works_after_detach(copied: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 30))
    optimizer = wrap(model)
    optimizer.consolidate([torch.randn(4, 8)], progress=False)
    with pytest.raises(NullSpaceError, match=r"detach\(\)"):
        torch.jit.script(copy.deepcopy(model) if copied else model)
    traced = torch.jit.trace(model.eval(), torch.randn(2, 8))
    optimizer.detach()
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(model))(x), model(x))
    torch.testing.assert_close(traced(x), model(x))


def test_a_new_wrapper_clears_away_what_a_copy_brought_along() -> None:
    model = network()
    optimizer = wrap(model)
    optimizer.consolidate([images()[:8]], progress=False)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        wrap(twin).consolidate([images()[:8]], progress=False)
        hooks = [hook for module in twin.modules() for hook in module._forward_pre_hooks.values()]
        assert len(hooks) == 2  # of the model and of its norm layer, by the new wrapper
