"""One method with one seed over all tasks: train, consolidate, evaluate, save; stop and go on.

Files in the run's folder: `log.jsonl` always, `checkpoint.pt` until the run is finished, `results.json` then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from reference import metrics
from reference.clip import Clip
from reference.config import Config, identity, recorded
from reference.engine import batches, evaluate, train
from reference.errors import ExperimentError
from reference.experiment import Experiment
from reference.methods import FineTune
from reference.tasks import Split, Task
from reference.tracking import Log, machine, peak_memory, write_json

ACTIVITIES = ("training", "consolidation", "evaluation")


class StoppedError(Exception):
    """The run was asked to stop; everything needed to go on is saved."""


@dataclass
class Progress:
    """How far a run is: `rows[j][i]` accuracy on task i after task j, next task and step, seconds by activity."""

    rows: list[list[float]] = field(default_factory=list)
    pretrained: list[float] = field(default_factory=list)
    step: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))

    @property
    def task(self) -> int:
        """Number of finished tasks, which is the number of the task at work."""
        return len(self.rows)


class Sequence:
    """The run of one method with one seed.

    Args:
        experiment: tasks, pool and pretrained model.
        method: class of the method.
        config: settings.
        seed: of batch order and crops (and, in demo, of pretraining).
        folder: where the files go.
        stop: asked after each step whether to stop.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: type[FineTune],
        config: Config,
        seed: int,
        folder: Path,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.experiment, self.config, self.seed, self.folder, self.stop = experiment, config, seed, folder, stop
        self.clip: Clip = experiment.pretrained(seed).copy()
        self.method = method(self.clip, config)
        self.progress = Progress()
        self.log = Log(folder / "log.jsonl")

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Go through all tasks and return what `results.json` holds.

        Raises:
            StoppedError: after `stop()` became true; the state is saved.
            ExperimentError: resuming a run of other settings.
        """
        finished = self.folder / "results.json"
        if resume and finished.exists():
            return self._checked(json.loads(finished.read_text(encoding="utf-8")))
        if not (resume and self._load()):
            self._begin()
        for number in range(self.progress.task, len(self.experiment.tasks)):
            self._one_task(number)
        results = self._results()
        write_json(finished, results)
        (self.folder / "checkpoint.pt").unlink()
        self.log("finished", seconds=self.progress.seconds)
        return results

    def _begin(self) -> None:
        """Score the pretrained model, and protect the reference pool where the method asks for it."""
        self.log("started", method=self.method.name, seed=self.seed, config=recorded(self.config))
        self.progress.pretrained = self._evaluate_all()
        pool = self.experiment.pool
        if self.method.needs_reference and pool is not None:
            images = Split(pool.images, torch.zeros(len(pool.images), dtype=torch.int64))
            self._consolidate("reference", images, list(dict.fromkeys(pool.captions)))
        self._save()

    def _one_task(self, number: int) -> None:
        task = self.experiment.tasks[number]
        if self.method.trains:
            if self.progress.step == 0:
                self.method.before_task()
            self._train(number, task)
            consolidated = task.train.drawn(self.config.consolidation_images, seed=self.seed)
            self._consolidate(task.name, consolidated, task.prompts())
            row = self._evaluate_all()
        else:
            row = self.progress.pretrained
        self.progress.rows.append(row)
        self.progress.step = 0
        self.log("evaluated", task=task.name, accuracy=row)
        tqdm.write(f"{self.method.name}, seed {self.seed}: {task.name} ({number + 1}/{len(row)}) {row[number]:.1f} %")
        self._save()
        if self.stop():
            raise StoppedError

    def _train(self, number: int, task: Task) -> None:
        started = time.perf_counter()

        def after_step(step: int, loss: float, rate: float) -> None:
            self.log("step", task=task.name, step=step, loss=loss, rate=rate)
            if self.stop() and step + 1 < self.config.iterations:
                self.progress.step = step + 1
                self.progress.seconds["training"] += time.perf_counter() - started
                self._save()
                raise StoppedError

        train(
            self.clip, self.method.optimizer, task, self.config, self.method.loss, self.seed, number,
            first_step=self.progress.step, after_step=after_step,
        )  # fmt: skip
        self.progress.seconds["training"] += time.perf_counter() - started

    def _consolidate(self, name: str, split: Split, prompts: list[str]) -> None:
        started = time.perf_counter()
        facts = self.method.after_task(name, list(batches(self.clip, split)), self.clip.tokens(prompts))
        seconds = time.perf_counter() - started
        self.progress.seconds["consolidation"] += seconds
        self.log("consolidated", task=name, seconds=seconds, **facts)

    def _evaluate_all(self) -> list[float]:
        started = time.perf_counter()
        bar = tqdm(self.experiment.tasks, desc="evaluate", leave=False, disable=None)
        row = [evaluate(self.clip, task, self.config) for task in bar]
        self.progress.seconds["evaluation"] += time.perf_counter() - started
        return row

    def _results(self) -> dict[str, Any]:
        accuracy = np.array(self.progress.rows)
        figures = metrics.summary(accuracy, self.progress.pretrained)
        return {
            "method": self.method.name,
            "seed": self.seed,
            "tasks": [task.name for task in self.experiment.tasks],
            "accuracy": self.progress.rows,
            "pretrained": self.progress.pretrained,
            **{name: mean.value for name, mean in figures.items()},
            "seconds": sum(self.progress.seconds.values()),
            "seconds_by_activity": self.progress.seconds,
            "peak_memory": peak_memory(),
            "parameters": sum(p.numel() for p in self.clip.model.parameters()),
            "machine": machine(),
            "torch": torch.__version__,
            "config": recorded(self.config),
        }

    def _save(self) -> None:
        """Write the state of this moment in one move; the optimizer's state holds the bases as well."""
        state = {
            "identity": json.dumps(identity(self.config)),
            "progress": asdict(self.progress),
            "model": self.clip.model.state_dict(),
            "optimizer": self.method.optimizer.state_dict(),
        }
        draft = self.folder / "checkpoint.tmp"
        torch.save(state, draft)
        os.replace(draft, self.folder / "checkpoint.pt")

    def _load(self) -> bool:
        """Take up the saved state, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.clip.device, weights_only=True)
        self._checked({"config": json.loads(state["identity"])})
        self.progress = Progress(**state["progress"])
        self.clip.model.load_state_dict(state["model"])
        self.method.optimizer.load_state_dict(state["optimizer"])
        self.log("resumed", task=self.progress.task, step=self.progress.step)
        return True

    def _checked(self, saved: dict[str, Any]) -> dict[str, Any]:
        """`saved`, if its settings are those of this run."""
        for key, value in json.loads(json.dumps(identity(self.config, self.method.needs_reference))).items():
            if saved["config"].get(key) != value:
                raise ExperimentError(
                    f"{self.folder} was made with {key}={saved['config'].get(key)!r}, this run has {value!r}; "
                    "resume with the same settings or choose another --output"
                )
        return saved
