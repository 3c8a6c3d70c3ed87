"""Weight averaging by its real clients: hooks do nothing on the copies, and the model itself stays protected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from training import relative_drift
from two_tasks import data, holding, loader, wrap

from nullspace_optim import NullSpaceOptimizer, unwrap
from nullspace_optim.errors import NullSpaceWarning, OptionError, StaleAnchorError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OLD = data(0).tensors[0]


class Net(nn.Module):
    """`[n, 24]` to `[n, 8]`, with a norm layer of running statistics (or none)."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()
        self.second = nn.Linear(32, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(inputs))))


def build(norm: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(norm)


def train(
    model: nn.Module, optimizer: Any, task: int, epochs: int = 5, after: Callable[[], Any] = lambda: None
) -> None:
    model.train()
    for _ in range(epochs):
        for inputs, labels in loader(task):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        after()


def consolidated(norm: bool = True) -> tuple[Net, NullSpaceOptimizer]:
    model = build(norm)
    optimizer = wrap(model)
    train(model, optimizer, 0)
    optimizer.consolidate(loader(0), progress=False)
    return model, optimizer


def plain_copy(model: nn.Module) -> Net:
    """The same weights in a model that never met this library."""
    fresh = build(isinstance(model.norm, nn.BatchNorm1d))
    fresh.load_state_dict(model.state_dict())
    return fresh


def ema_of_timm(version: str) -> Any:
    utils = pytest.importorskip("timm.utils")
    return lambda model: getattr(utils, version)(model, decay=0.5)


AVERAGES: dict[str, Callable[[], Any]] = {
    "AveragedModel": lambda: AveragedModel,
    "AveragedModel with buffers": lambda: lambda m: AveragedModel(m, use_buffers=True),
    "AveragedModel as EMA": lambda: lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "ModelEmaV2": lambda: ema_of_timm("ModelEmaV2"),
    "ModelEmaV3": lambda: ema_of_timm("ModelEmaV3"),
}


@pytest.mark.fault(132)
@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("early", [False, True], ids=["copied after", "copied before the task is consolidated"])
def test_a_copy_averages_and_fills_its_statistics_as_a_plain_model_would(name: str, early: bool) -> None:
    make = AVERAGES[name]()
    model = build()
    optimizer = wrap(model)
    train(model, optimizer, 0)
    average = make(model) if early else None
    optimizer.consolidate(loader(0), progress=False)
    average = make(model) if average is None else average
    update = average.update_parameters if hasattr(average, "update_parameters") else lambda m: average.update(m)
    schedule = SWALR(optimizer, swa_lr=1e-3, anneal_epochs=2)

    def end_of_epoch() -> None:
        update(model)
        schedule.step()

    with holding(model, lambda: model(OLD), optimizer=lambda: optimizer):
        train(model, optimizer, 1, after=end_of_epoch)
    twin = plain_copy(average.module)
    for averaged in (average, twin):
        update_bn([data(1).tensors[0]], averaged)
    average.eval()
    twin.eval()
    assert torch.equal(average.module.norm.running_mean, twin.norm.running_mean)
    assert torch.equal(average.module(data(1).tensors[0]), twin(data(1).tensors[0]))
    assert float(twin.norm.running_mean.norm()) > 0
    assert optimizer.verify(loader(0)).ok


def test_averaged_weights_that_are_loaded_back_are_accepted_by_reanchor() -> None:
    """An average over the steps since a consolidation keeps its directions; one over earlier steps does not."""
    model, optimizer = consolidated(norm=False)
    average = AveragedModel(model)
    train(model, optimizer, 1, after=lambda: average.update_parameters(model))
    before = model(OLD).detach()
    model.load_state_dict(average.module.state_dict())
    train(model, optimizer, 1)
    assert relative_drift(model(OLD).detach(), before) < 1e-5
    older = build(norm=False)
    model.load_state_dict(older.state_dict())
    with pytest.raises(StaleAnchorError, match=r"EMA swap.*opt\.reanchor\(\)"):
        train(model, optimizer, 1)
    optimizer.reanchor()
    kept = model.first.weight.detach() @ optimizer.bases["first.weight"].U
    train(model, optimizer, 1)
    assert relative_drift(model.first.weight.detach() @ optimizer.bases["first.weight"].U, kept) < 1e-5
    assert optimizer.verify().ok


@pytest.mark.fault(132)
@pytest.mark.parametrize("meant", [False, True])
def test_statistics_of_the_model_itself_are_put_back_unless_they_are_meant(meant: bool) -> None:
    model, optimizer = consolidated()
    with holding(model, lambda: model(OLD), 10.0 if meant else 1e-5, lambda: optimizer):
        train(model, optimizer, 1)
        kept = copy.deepcopy(model.norm.state_dict())
        update_bn([data(1).tensors[0]], model)
        with torch.no_grad():
            model.norm.running_mean += 1
        assert "norm.running_mean" in optimizer.verify().buffers
        if meant:
            optimizer.reanchor()
            moved = model.norm.running_mean.clone()
            optimizer.consolidate(loader(1), progress=False)
            assert torch.equal(model.norm.running_mean, moved)
            return
        with pytest.warns(NullSpaceWarning, match=r"2 running statistics.*norm\.running_mean.*put back.*reanchor"):
            optimizer.consolidate(loader(1), progress=False)
        assert all(torch.equal(value, kept[key]) for key, value in model.norm.state_dict().items() if "running" in key)


def test_a_consolidation_that_fails_leaves_the_statistics_as_it_found_them() -> None:
    model, optimizer = consolidated()
    with torch.no_grad():
        model.norm.running_mean += 1
    moved = model.norm.running_mean.clone()
    with pytest.raises(Exception, match=r"no batches|empty"):
        optimizer.consolidate([], progress=False)
    assert torch.equal(model.norm.running_mean, moved)


def lightning_callbacks(name: str) -> Any:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    options = {"swa_lrs": 1e-3, "swa_epoch_start": 0.5} if name == "StochasticWeightAveraging" else {"decay": 0.5}
    return getattr(callbacks, name)(**options)


def fit(module: Any, task: int, *callbacks: Any) -> Any:
    trainer = pytest.importorskip("lightning.pytorch").Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(task))
    return trainer


def lightning_module(norm: bool) -> Any:
    base = pytest.importorskip("lightning.pytorch").LightningModule

    class Module(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.net = build(norm)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return wrap(self)

    return Module()


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "batch norm"])
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_callbacks_of_lightning_average_before_the_task_is_consolidated(name: str, norm: bool) -> None:
    averaging = lightning_callbacks(name)
    from nullspace_optim.integrations.lightning import ConsolidateCallback

    module, consolidate = lightning_module(norm), ConsolidateCallback(progress=False)
    fit(module, 0, averaging, consolidate)
    trainers: list[Any] = []
    with holding(module, lambda: module(OLD), optimizer=lambda: unwrap(trainers[0].optimizers[0])):
        trainers.append(fit(module, 1, lightning_callbacks(name), consolidate))
    assert unwrap(trainers[0].optimizers[0]).verify(loader(0)).ok


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averaging_after_the_consolidation_is_refused_before_training(name: str) -> None:
    averaging = lightning_callbacks(name)
    from nullspace_optim.integrations.lightning import ConsolidateCallback

    module = lightning_module(False)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(OptionError, match=rf"{name} exchanges the weights after.*\[averaging, consolidate\]"):
        fit(module, 0, ConsolidateCallback(progress=False), averaging)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
