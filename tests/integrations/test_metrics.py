"""The figures in the trainer's own logger: names, values, and what a TensorBoard file shows of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from two_tasks import build_net, loader, wrap

from nullspace_optim.errors import OptionError
from nullspace_optim.integrations import metrics

pytestmark = pytest.mark.filterwarnings("ignore")
STATE = ["nullspace/drift", "nullspace/free", "nullspace/frozen"]


def test_the_figures_are_those_of_the_reports() -> None:
    model = build_net()
    optimizer = wrap(model)
    assert metrics(optimizer) == {"nullspace/free": 1.0, "nullspace/frozen": 0.0, "nullspace/drift": 0.0}
    for task in (0, 1):
        report = optimizer.consolidate(loader(task), progress=False)
        found = metrics(optimizer, report)
        assert found["nullspace/free"] == optimizer.capacity().mean < 1.0
        assert found["nullspace/frozen"] == report.still_share > 0.0
    assert 0.0 <= 1.0 - found["nullspace/kept"] < 1e-5
    with torch.no_grad():
        model.second.weight.add_(1.0)
    assert metrics(optimizer)["nullspace/drift"] == optimizer.verify().worst > 0.1


def test_looked_up_rows_count_as_frozen_numbers() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 6), torch.nn.Linear(6, 3))
    optimizer = wrap(model)
    report = optimizer.consolidate([torch.tensor([[0, 1], [4, 1]])], progress=False)
    assert metrics(optimizer)["nullspace/frozen"] == report.still_share
    assert [p.still for p in report.parameters if p.name == "0.weight"] == [3 * 6]


def test_an_optimizer_without_bases_is_refused() -> None:
    with pytest.raises(OptionError, match="no NullSpaceOptimizer inside"):
        metrics(torch.optim.SGD(build_net().parameters()))


def scalars(folder: Path) -> dict[str, list[float]]:
    """Read every scalar of the event files below a folder."""
    reading: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("events.out.*")):
        events = reading.EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend(event.value for event in events.Scalars(name))
    return found


@pytest.fixture
def accelerated() -> Iterator[None]:
    pytest.importorskip("transformers")
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(True)
    yield
    state.AcceleratorState._reset_state(True)


def test_tensorboard_shows_them_beside_the_loss_of_a_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerated: None
) -> None:
    pytest.importorskip("tensorboard")
    from trainers import Sentences, bert, keep, trainer

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    options = {"report_to": ["tensorboard"], "logging_strategy": "epoch", "num_train_epochs": 3}
    running = trainer(bert(), 1, tmp_path, keep(Sentences(0)), **options)
    running.train()
    assert len(list((tmp_path / "log").rglob("events.out.*"))) == 1, "the callback wrote after the file was closed"
    found = scalars(tmp_path / "log")
    ours = {name.removeprefix("train/"): values for name, values in found.items() if "nullspace" in name}
    assert sorted(ours) == sorted([*STATE, "nullspace/kept"])
    assert [len(ours[name]) for name in STATE] == [5, 5, 5] and len(ours["nullspace/kept"]) == 1
    assert ours["nullspace/free"][0] == ours["nullspace/free"][3] > ours["nullspace/free"][4] > 0.0
    assert max(ours["nullspace/drift"]) < 1e-5 and ours["nullspace/kept"][0] == pytest.approx(1.0, abs=1e-5)
    assert len(found["train/loss"]) == 3, "the trainer's own logs are as before"


def test_tensorboard_shows_them_of_a_lightning_trainer(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import TensorBoardLogger

    callback = importlib.import_module("nullspace_optim.integrations.lightning").ConsolidateCallback(progress=False)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = build_net()

        def forward(self, inputs: Any) -> Any:
            return self.net(inputs)

        def training_step(self, batch: Any, index: int) -> Any:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return wrap(self)

    module = Module()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    for task in (0, 1):
        logger = TensorBoardLogger(str(tmp_path), name=f"task{task}")
        lightning.Trainer(max_epochs=2, accelerator="cpu", logger=logger, callbacks=[callback], **quiet).fit(
            module, loader(task)
        )
    first, second = (scalars(tmp_path / f"task{task}") for task in (0, 1))
    assert [len(first[name]) for name in STATE] == [1, 1, 1] and "nullspace/kept" not in first
    assert [len(second[name]) for name in STATE] == [3, 3, 3]
    assert second["nullspace/kept"][0] == pytest.approx(1.0, abs=1e-5) and max(second["nullspace/drift"]) < 1e-5
