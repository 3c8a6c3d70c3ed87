"""The Hugging Face Trainer on a real transformer: a `train()` is a task; checkpoints, clipping, accumulation, bf16."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW
from training import relative_drift
from two_tasks import example, holding, same_weights

from nullspace_optim import NullSpaceOptimizer, NumericalRank, unwrap

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402
from trainers import Sentences, bert, call, logits  # noqa: E402
from trainers import arguments as arguments_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers before transformers 5 leave their precision behind, bfloat16 of one test for the next."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)


def trainer(model: Any, task: int, folder: Path, callback: Any, precision: Any = "exact", **options: Any) -> Any:
    """A trainer that is given a wrapped optimizer."""
    project: Any = "update" if options.get("bf16") else "both"  # AdamW scales up the rounding of such gradients
    base = AdamW(model.parameters(), lr=3e-3)
    optimizer = NullSpaceOptimizer(base, policy=NumericalRank(), project=project, precision=precision)
    return transformers.Trainer(
        model,
        arguments_of(folder, **{"num_train_epochs": 10, **options}),
        train_dataset=Sentences(task),
        eval_dataset=Sentences(task),
        optimizers=(optimizer, None),
        callbacks=[callback],
    )


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 1e-5),
        ({"max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "num_train_epochs": 20}, 1e-5),
        ({"bf16": True}, 2**-8),  # the rounding of a bfloat16 forward pass
    ],
    ids=["plain", "clipping and accumulation", "bf16 autocast"],
)
@pytest.mark.fault(36)
def test_two_trainings_are_two_tasks(options: dict[str, Any], limit: float, tmp_path: Path) -> None:
    model, callback = bert(), call(path=tmp_path / "bases.safetensors")
    first = trainer(model, 0, tmp_path, callback, **options)
    first.train()
    second = trainer(model, 1, tmp_path, callback, **options)
    with holding(model, lambda: logits(model), limit, lambda: unwrap(second.optimizer)):
        second.train()
    assert [report.task for report in callback.reports] == ["task 1", "task 2"]
    assert (tmp_path / "bases.safetensors").is_file()


def test_without_the_callback_nothing_is_held(tmp_path: Path) -> None:
    model, callback = bert(), transformers.TrainerCallback()
    trainer(model, 0, tmp_path, callback).train()
    then = logits(model).detach()
    trainer(model, 1, tmp_path, callback).train()
    assert relative_drift(logits(model).detach(), then) > 1e-2


def test_a_checkpoint_of_the_second_task_resumes_bitwise_and_protected(tmp_path: Path) -> None:
    model, callback = bert(), call()
    trainer(model, 0, tmp_path, callback).train()
    whole = trainer(model, 1, tmp_path / "two", callback, save_strategy="steps", save_steps=10)
    with holding(model, lambda: logits(model), optimizer=lambda: unwrap(whole.optimizer)):
        whole.train()
    other, again = bert(), call()
    resumed = trainer(other, 1, tmp_path / "two", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-10"))
    assert same_weights(model, other)
    assert [task["name"] for task in unwrap(resumed.optimizer)._core.store.tasks] == ["task 1", "task 2"]


def test_a_missing_transformers_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "nullspace_optim.integrations.transformers")
    with pytest.raises(ImportError, match="needs transformers: pip install"):
        importlib.import_module("nullspace_optim.integrations.transformers")


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("transformers.md"), "transformers.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "bases.safetensors").is_file()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("greater", [False, True], ids=["the best is not the last", "the best comes first"])
def test_the_best_model_that_is_loaded_at_the_end_is_consolidated(
    precision: str, greater: bool, tmp_path: Path
) -> None:
    model, callback = bert(), call()
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "loss", "greater_is_better": greater, "num_train_epochs": 6}
    trainer(model, 0, tmp_path / "one", callback, **best, precision=precision).train()
    old = logits(model.eval()).detach()
    second = trainer(model, 1, tmp_path / "two", callback, **best, precision=precision)
    second.train()
    assert relative_drift(logits(model.eval()).detach(), old) < 1e-5
    assert [report.task for report in callback.reports] == ["task 1", "task 2"]
    assert unwrap(second.optimizer).verify().ok
    if greater:
        assert second.state.best_model_checkpoint != f"{tmp_path}/two/checkpoint-12"
