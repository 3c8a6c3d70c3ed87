"""Lightning: a fit is a task; automatic and manual optimization, clipping, accumulation, precisions, checkpoints."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from training import relative_drift
from two_tasks import build_net, data, example, holding, loader, same_weights, wrap

from nullspace_optim import NullSpaceOptimizer, NumericalRank, unwrap
from nullspace_optim.errors import OptionError

pytest.importorskip("lightning")
NAMES = ["lightning.pytorch", "pytorch_lightning"]
pytestmark = pytest.mark.filterwarnings("ignore")


def framework(name: str = NAMES[0]) -> Any:
    return pytest.importorskip(name)


def callback(**options: Any) -> Any:
    module = importlib.import_module("nullspace_optim.integrations.lightning")
    return module.ConsolidateCallback(progress=False, **options)


def lit(name: str = NAMES[0], manual: bool = False, rate: float = 3e-3, eps: float = 1e-8, given: bool = True) -> Any:
    """A module that makes a new optimizer for every fit, as most do."""

    class Module(framework(name).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = build_net()
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            inputs, labels = batch
            loss = nn.functional.cross_entropy(self.net(inputs), labels)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            return None

        def configure_optimizers(self) -> Any:
            return wrap(self, rate, eps)

    class WithForward(Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

    return WithForward() if given else Module()


def trainer(name: str = NAMES[0], epochs: int = 5, folder: Any = None, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, **options}
    return framework(name).Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0, **quiet, **options
    )


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "automatic": ({}, {}, 1e-5),
    "manual": ({"manual": True}, {}, 1e-5),
    "clipping": ({}, {"gradient_clip_val": 0.1}, 1e-5),
    "accumulation": ({}, {"accumulate_grad_batches": 2}, 1e-5),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}, 1e-5),
    "bf16-true": ({"rate": 0.03}, {"precision": "bf16-true"}, 2**-6),
    "16-true": ({"rate": 0.03, "eps": 1e-4}, {"precision": "16-true"}, 2**-9),
}


OTHER_NAME = [(NAMES[1], "automatic"), (NAMES[1], "manual")]  # the same code


@pytest.mark.parametrize(("name", "variant"), [*((NAMES[0], variant) for variant in VARIANTS), *OTHER_NAME])
@pytest.mark.fault(36)
def test_two_fits_are_two_tasks(name: str, variant: str, tmp_path: Path) -> None:
    module_options, trainer_options, limit = VARIANTS[variant]
    module, call = lit(name, **module_options), callback(path=tmp_path / "bases.safetensors")
    first = trainer(name, callbacks=[call], **trainer_options)
    first.fit(module, loader(0))
    half = {torch.bfloat16, torch.float16} & {p.dtype for p in module.parameters()}
    old = data(0).tensors[0].to(next(iter(half), torch.float32))
    second = trainer(name, callbacks=[call], **trainer_options)
    with holding(module, lambda: module(old), limit, lambda: unwrap(second.optimizers[0])):
        second.fit(module, loader(1))
    assert unwrap(second.optimizers[0]) is not unwrap(first.optimizers[0])
    assert [report.task for report in call.reports] == ["task 1", "task 2"]
    assert (tmp_path / "bases.safetensors").is_file()


def test_without_the_callback_nothing_is_held() -> None:
    """The control: the same two fits move the old outputs."""
    module = lit()
    trainer().fit(module, loader(0))
    old = data(0).tensors[0]
    then = module(old).detach()
    trainer().fit(module, loader(1))
    assert relative_drift(module(old).detach(), then) > 1e-2


def test_a_checkpoint_of_the_second_task_resumes_bitwise_and_protected(tmp_path: Path) -> None:
    module, call = lit(), callback()
    trainer(callbacks=[call]).fit(module, loader(0))
    old = data(0).tensors[0]
    checkpoints = framework().callbacks.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    whole = trainer(callbacks=[call, checkpoints], enable_checkpointing=True)
    with holding(module, lambda: module(old), optimizer=lambda: unwrap(whole.optimizers[0])):
        whole.fit(module, loader(1))
    resumed, again = lit(), callback()
    second = trainer(callbacks=[again])
    second.fit(resumed, loader(1), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert same_weights(module, resumed)
    assert relative_drift(resumed(old).detach(), module(old).detach()) == 0.0
    assert [task["name"] for task in unwrap(second.optimizers[0])._core.store.tasks] == ["task 1", "task 2"]


def test_a_checkpoint_saved_after_fit_carries_the_task(tmp_path: Path) -> None:
    module, call = lit(), callback()
    first = trainer(callbacks=[call])
    first.fit(module, loader(0))
    first.save_checkpoint(tmp_path / "task1.ckpt")
    other = lit()
    other.load_state_dict(torch.load(tmp_path / "task1.ckpt", weights_only=False)["state_dict"])
    old = data(0).tensors[0]
    second = trainer(epochs=10, callbacks=[callback()])
    with holding(other, lambda: other(old), optimizer=lambda: unwrap(second.optimizers[0])):
        second.fit(other, loader(1), ckpt_path=str(tmp_path / "task1.ckpt"))


def test_a_module_that_keeps_one_optimizer_keeps_it() -> None:
    module = lit()
    kept = wrap(module)
    module.configure_optimizers = lambda: kept
    call = callback(name="one")
    trainer(callbacks=[call]).fit(module, loader(0))
    with holding(module, lambda: module(data(0).tensors[0]), optimizer=lambda: kept):
        trainer(callbacks=[]).fit(module, loader(1))
    assert [task["name"] for task in kept._core.store.tasks] == ["one"]


def test_a_module_without_forward_is_asked_for_one() -> None:
    module = lit(given=False)
    with pytest.raises(OptionError, match=r"ConsolidateCallback\(forward="):
        trainer(epochs=1, callbacks=[callback()]).fit(module, loader(0))
    call = callback(forward=lambda batch: module.net(batch[0]))
    trainer(epochs=1, callbacks=[call]).fit(module, loader(0))
    assert len(call.reports) == 1


def test_an_optimizer_that_is_not_ours_is_refused() -> None:
    module = lit()
    module.configure_optimizers = lambda: AdamW(module.parameters())
    with pytest.raises(OptionError, match="gave 0 NullSpaceOptimizers"):
        trainer(epochs=1, callbacks=[callback()]).fit(module, loader(0))


def test_fabric_keeps_protection_and_unwrap_finds_it() -> None:
    model = build_net()
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, wrap(model))
    unwrap(optimizer).consolidate(loader(0), progress=False)
    with holding(model, lambda: model(data(0).tensors[0]), optimizer=lambda: unwrap(optimizer)):
        for _ in range(5):
            for inputs, labels in loader(1):
                optimizer.zero_grad()
                fabric.backward(nn.functional.cross_entropy(wrapped(inputs), labels))
                fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
                optimizer.step()


def test_the_command_line_takes_a_scheduler_as_the_page_says(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    cli = importlib.import_module("lightning.pytorch.cli")

    class Wrapping(cli.LightningCLI):  # type: ignore[misc]
        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            wrapped = NullSpaceOptimizer(optimizer, lightning_module, policy=NumericalRank())
            lr_scheduler.optimizer = wrapped
            return [wrapped], [lr_scheduler]

    class Module(type(lit())):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return loader(0)

        configure_optimizers = framework().LightningModule.configure_optimizers

    quiet = {"logger": "false", "enable_checkpointing": "false", "enable_progress_bar": "false", "accelerator": "cpu"}
    quiet |= {"max_epochs": "3", "default_root_dir": str(tmp_path)}
    optimizer = ["--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.008"]
    schedule = ["--lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--lr_scheduler.gamma", "0.5"]
    trainer_options = [part for key, value in quiet.items() for part in (f"--trainer.{key}", value)]
    run = Wrapping(Module, args=["fit", *optimizer, *schedule, *trainer_options])
    assert unwrap(run.trainer.optimizers[0]).param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_missing_lightning_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "nullspace_optim.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match="needs Lightning: pip install lightning"):
        importlib.import_module("nullspace_optim.integrations.lightning")


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(example("lightning.md"), "lightning.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "bases.safetensors").is_file()
