"""Single methods on two small tasks of the demo, by hand: settings, the method, training one task, its weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reference.config import Config, load_config
from reference.experiment import Experiment
from reference.methods import METHODS, Setting
from reference.training.steps import learn


def two_tasks() -> Config:
    """Ten steps a task at a rate and a decay under which everything that trains moves."""
    settings = {
        "tasks": ["colours", "photographs"], "iterations": 10, "pretrain_iterations": 10, "warmup": 2, "batch_size": 8,
        "evaluation_images": 40, "consolidation_images": 32, "reference_images": 32, "learning_rate": 1e-2,
        "weight_decay": 0.1, "output": "unused",
    }  # fmt: skip
    return load_config("demo", settings)


def method(name: str, experiment: Experiment, config: Config) -> Any:
    return METHODS[name](Setting(experiment.pretrained(0).copy(), config, experiment.tasks, experiment.pool, 0))


def train(made: Any, number: int) -> None:
    made.before_task(number)
    learn(made, made.setting.tasks[number], made.config, made.schedule(number), seed=0, number=number)


def state(made: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.clip.model.state_dict().items()}
