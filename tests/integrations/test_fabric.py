"""Lightning Fabric: what `fabric.save` writes brings model, optimizer and bases back, also from FSDP2 shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import SHARDS_NEEDED, SHARDS_ON_CPU
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from training import relative_drift
from two_tasks import Net, build_net, data, loader, same_weights, wrap

from nullspace_optim import unwrap

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")
OLD = data(0).tensors[0]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process group of one, which Fabric takes over."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "rendezvous"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(fabric: Any, model: Any, optimizer: Any, task: int, epochs: int = 3) -> None:
    for _ in range(epochs):
        for inputs, labels in loader(task):
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()


def resumes(fabric: Any, make: Any, path: Path) -> None:
    """Save in the middle of the second task, load into new objects, train both on and compare."""
    model, optimizer = make()
    train(fabric, model, optimizer, 0)
    unwrap(optimizer).consolidate(loader(0), progress=False)
    train(fabric, model, optimizer, 1)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    old = model(OLD).detach()
    other, again = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    fabric.load(path, {"model": other, "optimizer": again})
    train(fabric, model, optimizer, 1)
    train(fabric, other, again, 1)
    assert [task["name"] for task in unwrap(again)._core.store.tasks] == ["task 1"]
    assert relative_drift(other(OLD).detach(), old) < 1e-5 and unwrap(again).verify().ok
    assert all(torch.equal(_whole(a), _whole(b)) for a, b in zip(model.parameters(), other.parameters()))


def _whole(parameter: Any) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def test_one_process(tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def make() -> Any:
        model = build_net()
        return fabric.setup(model, wrap(model))

    resumes(fabric, make, tmp_path / "all.ckpt")


@pytest.mark.skipif(not SHARDS_ON_CPU, reason=SHARDS_NEEDED)
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded files", "one file"])
@pytest.mark.fault(100)
def test_fsdp2(sharded: bool, group: None, tmp_path: Path) -> None:
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    def shard(model: Net, mesh: Any) -> Net:
        fully_shard(model.first, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    strategy = ModelParallelStrategy(
        shard, data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=sharded
    )
    fabric = lightning.Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()

    def make() -> Any:
        with fabric.init_module(empty_init=False):
            model = Net()
        model = fabric.setup_module(model)
        return model, fabric.setup_optimizers(wrap(model))

    resumes(fabric, make, tmp_path / "all")


def test_the_recipe_of_torch_reaches_through_the_wrappers_of_frameworks() -> None:
    """Accelerate and Fabric hand their own wrapper to `get_optimizer_state_dict`, as they do for FSDP2."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.Accelerator(cpu=True)
    AcceleratedOptimizer = accelerate.optimizer.AcceleratedOptimizer
    model = build_net()
    optimizer = AcceleratedOptimizer(wrap(model))
    unwrap(optimizer).consolidate(loader(0), progress=False)
    state = get_optimizer_state_dict(model, optimizer)
    other = build_net()
    again = AcceleratedOptimizer(wrap(other))
    set_optimizer_state_dict(other, again, state)
    assert set(unwrap(again).bases) == set(unwrap(optimizer).bases)
    assert same_weights(model, other)
