"""The Hugging Face Trainer on a real transformer: a `train()` is a task; checkpoints, clipping, accumulation, bf16."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.utils.data import Dataset
from training import relative_drift
from two_tasks import example, holding, same_weights

from nullspace_optim import NullSpaceOptimizer, NumericalRank, unwrap
from nullspace_optim.errors import OptionError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402

from nullspace_optim.integrations.transformers import ConsolidateCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 4


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers before transformers 5 leave their precision behind, bfloat16 of one test for the next."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)


class Sentences(Dataset[Any]):
    """Four token sequences of a task and their labels."""

    def __init__(self, task: int) -> None:
        generator = torch.Generator().manual_seed(task)
        self.tokens = torch.randint(20 * task, 20 * task + 20, (4, LENGTH), generator=generator)
        self.labels = torch.randint(0, 3, (4,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trainer(model: Any, task: int, folder: Path, call: Any, precision: Any = "exact", **options: Any) -> Any:
    options = {"save_strategy": "no", "num_train_epochs": 10, **options}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, **options
    )
    project: Any = "update" if options.get("bf16") else "both"  # AdamW scales up the rounding of such gradients
    base = AdamW(model.parameters(), lr=3e-3)
    optimizer = NullSpaceOptimizer(base, policy=NumericalRank(), project=project, precision=precision)
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=Sentences(task),
        eval_dataset=Sentences(task),
        optimizers=(optimizer, None),
        callbacks=[call],
    )


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=Sentences(0).tokens).logits


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
    model, call = bert(), ConsolidateCallback(path=tmp_path / "bases.safetensors", progress=False)
    first = trainer(model, 0, tmp_path, call, **options)
    first.train()
    second = trainer(model, 1, tmp_path, call, **options)
    with holding(model, lambda: logits(model), limit, lambda: unwrap(second.optimizer)):
        second.train()
    assert [report.task for report in call.reports] == ["task 1", "task 2"]
    assert (tmp_path / "bases.safetensors").is_file()


def test_without_the_callback_nothing_is_held(tmp_path: Path) -> None:
    model, call = bert(), transformers.TrainerCallback()
    trainer(model, 0, tmp_path, call).train()
    then = logits(model).detach()
    trainer(model, 1, tmp_path, call).train()
    assert relative_drift(logits(model).detach(), then) > 1e-2


def test_a_checkpoint_of_the_second_task_resumes_bitwise_and_protected(tmp_path: Path) -> None:
    model, call = bert(), ConsolidateCallback(progress=False)
    trainer(model, 0, tmp_path, call).train()
    whole = trainer(model, 1, tmp_path / "two", call, save_strategy="steps", save_steps=10)
    with holding(model, lambda: logits(model), optimizer=lambda: unwrap(whole.optimizer)):
        whole.train()
    other, again = bert(), ConsolidateCallback(progress=False)
    resumed = trainer(other, 1, tmp_path / "two", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-10"))
    assert same_weights(model, other)
    assert [task["name"] for task in unwrap(resumed.optimizer)._core.store.tasks] == ["task 1", "task 2"]


def test_an_optimizer_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    model = bert()
    plain = trainer(model, 0, tmp_path, ConsolidateCallback(progress=False))
    plain.optimizer = AdamW(model.parameters())
    with pytest.raises(OptionError, match="no NullSpaceOptimizer inside"):
        plain.train()


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
    model, call = bert(), ConsolidateCallback(progress=False)
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "loss", "greater_is_better": greater, "num_train_epochs": 6}
    trainer(model, 0, tmp_path / "one", call, **best, precision=precision).train()
    old = logits(model.eval()).detach()
    second = trainer(model, 1, tmp_path / "two", call, **best, precision=precision)
    second.train()
    assert relative_drift(logits(model.eval()).detach(), old) < 1e-5
    assert [report.task for report in call.reports] == ["task 1", "task 2"]
    assert unwrap(second.optimizer).verify().ok
    if greater:
        assert second.state.best_model_checkpoint != f"{tmp_path}/two/checkpoint-12"
