"""A tiny transformer, two tasks for it and the Hugging Face Trainer that trains it; import only with transformers."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from training import relative_drift
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from nullspace_optim import NumericalRank, unwrap
from nullspace_optim.integrations.transformers import NullSpaceCallback

LENGTH = 4


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
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def call(before: Any = None, after: Any = True, **options: Any) -> NullSpaceCallback:
    return NullSpaceCallback(before, after, progress=False, **options)


def keep(before: Any = None, after: Any = True, **options: Any) -> NullSpaceCallback:
    """A callback that keeps every direction of what it consolidates."""
    return call(before, after, policy=NumericalRank(), **options)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {"save_strategy": "no", "num_train_epochs": 5, "report_to": [], "learning_rate": 8e-3, **options}
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, disable_tqdm=True, use_cpu=True, seed=0, **options
    )


def trainer(
    model: Any, task: int, folder: Path, callback: Any, kind: Any = Trainer, given: Any = None, **options: Any
) -> Any:
    """A trainer of `task`; `given` are arguments of the class `kind`, `options` those of `TrainingArguments`."""
    return kind(
        model,
        arguments(folder, **options),
        train_dataset=Sentences(task),
        eval_dataset=Sentences(task),
        callbacks=[callback],
        **(given or {}),
    )


def logits(model: Any) -> Tensor:
    return model(input_ids=Sentences(0).tokens).logits


def loss(model: Any, task: int) -> float:
    with torch.no_grad():
        return float(model(input_ids=Sentences(task).tokens, labels=Sentences(task).labels).loss)


def names(running: Any) -> list[str]:
    """The tasks that the optimizer of a trainer keeps."""
    return [str(task["name"]) for task in unwrap(running.optimizer)._core.store.tasks]


@contextmanager
def keeping_and_learning(model: nn.Module, running: Any, limit: float = 1e-5, better: float = 0.05) -> Any:
    """The body trains task 1: outputs of task 0 stay within `limit`, and the loss of task 1 falls by `better`."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=running.args.bf16)  # as the trainer lets the model see it
    with torch.no_grad(), half:
        old, first = logits(model.eval()), loss(model, 1)
    yield
    model = running.model.eval()  # FSDP2 gives another class
    with torch.no_grad(), half:
        drift, last = relative_drift(logits(model), old), loss(model, 1)
    assert drift <= limit, f"the old outputs have moved by {drift}"
    assert last < first - better, f"the loss of the new task went from {first} to {last}"
    assert unwrap(running.optimizer).verify().ok
