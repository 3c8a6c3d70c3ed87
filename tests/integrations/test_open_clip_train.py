"""open_clip's own training: `train_one_epoch` and the whole `main`, on synthetic images and captions."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset
from training import relative_drift
from two_tasks import example, holding, same_weights

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank

open_clip = pytest.importorskip("open_clip")
training = pytest.importorskip("open_clip_train.main")
from open_clip_train.data import DataInfo  # noqa: E402
from open_clip_train.params import parse_args  # noqa: E402
from open_clip_train.train import train_one_epoch  # noqa: E402

SIZE, CONTEXT, VOCABULARY, PAIRS = 16, 8, 64, 4
CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 1},
}


def clip() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG)


def pairs(task: int) -> tuple[Tensor, Tensor]:
    """Images `[4, 3, 16, 16]` and token sequences `[4, 8]` of a task; the largest token ends a text."""
    generator = torch.Generator().manual_seed(task)
    images = torch.randn(PAIRS, 3, SIZE, SIZE, generator=generator)
    tokens = torch.randint(20 * task, 20 * task + 20, (PAIRS, CONTEXT), generator=generator)
    tokens[:, -1] = VOCABULARY - 1
    return images, tokens


def info(task: int) -> dict[str, DataInfo]:
    loader: Any = DataLoader(TensorDataset(*pairs(task)), batch_size=2)
    loader.num_batches, loader.num_samples = len(loader), PAIRS
    return {"train": DataInfo(loader)}


def both_towers(model: Any) -> Callable[[Any], Any]:
    return lambda batch: model(*batch)


def outputs(model: Any) -> Tensor:
    """Image and text features `[8, 32]` of the first task."""
    images, tokens = pairs(0)
    return torch.cat([model.encode_image(images), model.encode_text(tokens)])


def wrapped(model: Any) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=3e-3, weight_decay=0.2), model, policy=NumericalRank())


def fit(model: Any, optimizer: NullSpaceOptimizer, task: int, *options: str, epochs: int = 4) -> None:
    args = parse_args(["--device", "cpu", "--skip-scheduler", "--precision", "fp32", *options])
    args.distributed, args.rank, args.world_size, args.horovod, args.batch_size = False, 0, 1, False, 2
    args.distill, args.wandb = False, False
    loss = open_clip.create_loss(args)
    for epoch in range(epochs):
        train_one_epoch(model, info(task), loss, epoch, optimizer, None, None, None, args)


VARIANTS = [(), ("--accum-freq", "2"), ("--grad-clip-norm", "0.1"), ("--precision", "amp_bf16")]


@pytest.mark.parametrize("options", VARIANTS, ids=["plain", "accumulation", "clipping", "bf16"])
def test_two_tasks_through_train_one_epoch(options: tuple[str, ...]) -> None:
    model = clip()
    model.output_dict = True
    optimizer = wrapped(model)
    fit(model, optimizer, 0, *options)
    optimizer.consolidate([pairs(0)], forward=both_towers(model), progress=False)
    protected = {name for name, basis in optimizer.bases.items() if basis.fate is Fate.PROTECTED}
    assert any("visual" in name for name in protected) and any(not name.startswith("visual") for name in protected)
    with holding(model, lambda: outputs(model), optimizer=lambda: optimizer):
        fit(model, optimizer, 1, *options, epochs=8)


def test_saved_and_resumed_bitwise(tmp_path: Path) -> None:
    model = clip()
    model.output_dict = True
    optimizer = wrapped(model)
    fit(model, optimizer, 0)
    optimizer.consolidate([pairs(0)], forward=both_towers(model), progress=False)
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "epoch.pt")
    other = clip()
    other.output_dict = True
    resumed = wrapped(other)
    saved = torch.load(tmp_path / "epoch.pt", weights_only=True)
    other.load_state_dict(saved["state_dict"])
    resumed.load_state_dict(saved["optimizer"])
    for its, one in ((model, optimizer), (other, resumed)):
        with holding(its, lambda its=its: outputs(its), optimizer=lambda one=one: one):
            fit(its, one, 1)
    assert same_weights(model, other)


class Wrapping:
    """What `open_clip_train.main` finds in the place of `torch.optim`."""

    def __init__(self, bases: Path | None) -> None:
        self.bases = bases
        self.made: list[NullSpaceOptimizer] = []
        self.models: list[Any] = []

    def AdamW(self, *args: Any, **kwargs: Any) -> NullSpaceOptimizer:
        optimizer = NullSpaceOptimizer(AdamW(*args, **kwargs), policy=NumericalRank())
        if self.bases is not None:
            optimizer.load(self.bases)
        self.made.append(optimizer)
        self.models.append(optimizer.model)
        return optimizer


def loggers() -> list[logging.Logger]:
    made = (logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger))
    return [logging.getLogger(), *made]


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """`main` sets up logging for the whole process, with a level for every logger there is."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {logger: logger.level for logger in loggers()}
    yield
    root.handlers[:] = handlers
    for logger in loggers():
        logger.setLevel(levels.get(logger, logging.NOTSET))


def run_main(
    monkeypatch: pytest.MonkeyPatch, folder: Path, task: int, weights: Path | None, bases: Path | None
) -> tuple[Any, NullSpaceOptimizer]:
    """Run `open_clip_train.main` on a task; return its model and optimizer."""
    wrapping = Wrapping(bases)
    monkeypatch.setattr(training, "optim", wrapping)
    monkeypatch.setattr(training, "get_data", lambda *args, **kwargs: info(task))
    training.main(
        [
            "--dataset-type", "synthetic", "--model", "tiny-two-tasks", "--device", "cpu", "--batch-size", "2",
            "--epochs", "8", "--lr", "3e-3", "--wd", "0.2", "--warmup", "0", "--precision", "fp32", "--workers", "0",
            "--logs", str(folder), "--name", f"task{task}", *(["--pretrained", str(weights)] if weights else []),
        ]
    )  # fmt: skip
    return wrapping.models[0], wrapping.made[0]


@pytest.mark.usefixtures("_logging_as_before")
def test_two_runs_of_main_are_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-two-tasks.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    open_clip.add_model_config(tmp_path)
    first, optimizer = run_main(monkeypatch, tmp_path, 0, None, None)
    optimizer.consolidate([pairs(0)], forward=both_towers(first), progress=False)
    optimizer.save(tmp_path / "bases.safetensors")
    weights = tmp_path / "weights.pt"
    torch.save(first.state_dict(), weights)
    with torch.no_grad():
        then = outputs(first.eval())
    second, later = run_main(monkeypatch, tmp_path, 1, weights, tmp_path / "bases.safetensors")
    with torch.no_grad():
        assert relative_drift(outputs(second.eval()), then) <= 1e-5
    assert later.verify().ok and len(later._core.store.tasks) == 1
    moved = {n: relative_drift(p.detach(), first.get_parameter(n).detach()) for n, p in second.named_parameters()}
    assert moved["visual.conv1.weight"] > 1e-4
    checkpoint = torch.load(tmp_path / "task1" / "checkpoints" / "epoch_8.pt", weights_only=True)
    assert "nullspace" in checkpoint["optimizer"] and math.isfinite(checkpoint["epoch"])


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("open_clip.md"), "open_clip.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "bases.safetensors").is_file()
