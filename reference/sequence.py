"""One method with one seed over all tasks: train, consolidate, evaluate, save; stop and go on.

Files in the run's folder: `log.jsonl` always, `checkpoint.pt` until the run is finished, `results.json` then.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from reference.config import Config, for_method, identity, recorded, refuse_other_settings
from reference.data.tasks import Task
from reference.errors import ExperimentError
from reference.evaluation import metrics
from reference.evaluation.costs import costs, summary_of_steps
from reference.evaluation.dense import patch_figures
from reference.evaluation.geometry import pool_figures
from reference.evaluation.robust import robust_accuracy
from reference.evaluation.scoring import Board, Scorer
from reference.experiment import Experiment
from reference.methods import Method, Setting
from reference.methods.refine import refine
from reference.training.clip import Clip
from reference.training.saved_run import SavedRun
from reference.training.steps import Step, learn
from reference.training.tracking import Log, machine, peak_memory, provenance, reset_peak_memory

ACTIVITIES = ("training", "consolidation", "evaluation")
LOOKED_AT = ("pool", "dense", "robust")


class StoppedError(Exception):
    """The run was asked to stop; everything needed to go on is saved."""


@dataclass
class Progress:
    """Progress of a run: finished tasks, next step, scores, trained parameters of each task, figures of both ends.

    `steps` are loss and seconds of each step of the task at work; `training` and `consolidations` what finished ones
    came to.
    """

    task: int = 0
    step: int = 0
    steps: list[tuple[float, float]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    consolidations: list[dict[str, Any]] = field(default_factory=list)
    boards: dict[str, Board] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    ends: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        """The progress that `asdict` wrote."""
        return cls(**{**saved, "boards": {name: Board(**board) for name, board in saved["boards"].items()}})


class Sequence(SavedRun):
    """The run of one method with one seed.

    Args:
        experiment: tasks, pool and pretrained model; method: class of the method; config: settings.
        seed: of batch order and crops (and, in demo, of pretraining); folder: where the files go.
        stop: asked after each step whether to stop.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: type[Method],
        config: Config,
        seed: int,
        folder: Path,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config = for_method(config, method.name)
        tasks = [replace(task, train=task.train.few(config.shots, seed)) for task in experiment.tasks]
        self.experiment = experiment = replace(experiment, tasks=tasks)
        self.seed, self.folder, self.stop = seed, folder, stop
        self.finished, self.checkpoint = folder / "results.json", folder / "checkpoint.pt"
        self.clip: Clip = experiment.pretrained(seed).copy()
        if config.gradient_checkpointing:
            self.clip.recompute()
        if config.refine_steps:
            refine(Setting(self.clip, config, experiment.tasks, experiment.pool, seed))
        self.method = method(Setting(self.clip, config, experiment.tasks, experiment.pool, seed))
        self.scorer = Scorer(self.method, experiment.tasks, config)
        self.progress = Progress()
        self.log = Log(folder / "log.jsonl")
        self.made = provenance()
        self.count, self.device = len(experiment.tasks), self.clip.device

    @property
    def done(self) -> int:
        """Number of finished tasks."""
        return self.progress.task

    @property
    def main(self) -> Board:
        """The scores that are the run's accuracy matrix."""
        return self.progress.boards[self.scorer.names[0]]

    def _needs_room(self) -> None:
        """A checkpoint holds weights; of what trains AdamW's two moments, bases, anchors and second moments."""
        parameters = list(self.clip.model.parameters())
        trained = sum(p.nbytes for p in parameters if p.requires_grad) if self.method.trains else 0
        needed = sum(p.nbytes for p in parameters) + 6 * trained
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ExperimentError(
                f"{self.folder} has {free / 2**20:.0f} MiB of free space, and a run of {self.method.name} needs about "
                f"{needed / 2**20:.0f} MiB for its checkpoint; free space or choose another --output"
            )

    def _begin(self, resumed: bool = False) -> None:
        """Score the pretrained model, and let the method do what it does before the first task."""
        self._needs_room()
        reset_peak_memory()
        if resumed:
            self.log("resumed", task=self.progress.task, step=self.progress.step)
            return
        self.log("started", method=self.method.name, seed=self.seed, config=recorded(self.config))
        self._evaluate(None)
        self._look()
        self._consolidate("reference", self.method.before_sequence)
        self._save()

    def _one_task(self, number: int) -> None:
        task = self.experiment.tasks[number]
        if self.method.trains:
            if self.progress.step == 0:
                self.method.before_task(number)
                self.progress.trained.append(self.method.trained_parameters())
            with self._timed("training"):
                self._train(number, task)
            self.progress.training.append({"task": task.name, **summary_of_steps(self.progress.steps)})
            self._consolidate(task.name, lambda: self.method.after_task(number))
        self._evaluate(number)
        self.progress.task += 1
        self.progress.step, self.progress.steps = 0, []
        row = self.main.accuracy[-1]
        self.log("evaluated", task=task.name, accuracy=row)
        tqdm.write(f"{self.method.name}, seed {self.seed}: {task.name} ({number + 1}/{len(row)}) {row[number]:.1f} %")
        self._save()
        if self.stop():
            raise StoppedError

    def _train(self, number: int, task: Task) -> None:
        schedule = self.method.schedule(number)
        started = time.perf_counter()

        def after_step(step: Step) -> None:
            self.log("step", task=task.name, step=step.number, loss=step.loss, rate=step.rate)
            self.progress.steps.append((step.loss, step.seconds))
            if self.stop() and step.number + 1 < schedule.iterations:
                self.progress.step = step.number + 1
                self.progress.seconds["training"] += time.perf_counter() - started
                self._save()
                self.progress.seconds["training"] -= time.perf_counter() - started
                raise StoppedError

        learn(
            self.method, task, self.config, schedule, self.seed, number,
            first_step=self.progress.step, after_step=after_step,
        )  # fmt: skip

    @contextmanager
    def _timed(self, activity: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.progress.seconds[activity] += time.perf_counter() - started

    def _consolidate(self, name: str, what: Callable[[], dict[str, Any]]) -> None:
        before = self.progress.seconds["consolidation"]
        with self._timed("consolidation"):
            facts = what()
        if not facts:
            return
        seconds = self.progress.seconds["consolidation"] - before
        self.log("consolidated", task=name, seconds=seconds, **facts)
        if "images" in facts:
            self.progress.consolidations.append({"task": name, "images": facts["images"], "seconds": seconds})

    def _evaluate(self, number: int | None) -> None:
        with self._timed("evaluation"):
            if self.method.trains or number is None:
                self.scorer.add_row(self.progress.boards, number)
            else:
                for board in self.progress.boards.values():
                    board.add(list(board.right[0]), board.gaps[0])

    def _look(self) -> None:
        """At both ends: retrieval on the pool, patches, and attacked images, where the settings ask for it."""
        found: dict[str, dict[str, Any]] = {name: {} for name in LOOKED_AT}
        experiment, clip, config = self.experiment, self.clip, self.config
        with self._timed("evaluation"), self.method.without_task():
            if experiment.pool is not None:
                found["pool"] = pool_figures(clip, experiment.pool, config)
            if config.dense_collages:
                found["dense"] = patch_figures(clip, experiment.tasks, config)
        for task in experiment.tasks if config.robust_images else ():
            with self._timed("evaluation"), self.method.evaluating(self.method.evaluations[0], task):
                found["robust"][task.name] = robust_accuracy(clip, task, config)
        self.progress.ends.append(found)

    def _results(self) -> dict[str, Any]:
        self._look()
        self.log("finished", seconds=self.progress.seconds)
        matrix, pretrained = np.array(self.main.accuracy), self.main.pretrained
        chance = [100 / len(task.class_names) for task in self.experiment.tasks]
        known = metrics.known(pretrained, chance)
        others = {name: vars(self.progress.boards[name]) for name in self.scorer.names[1:]}
        return {
            "method": self.method.name,
            "seed": self.seed,
            "tasks": [task.name for task in self.experiment.tasks],
            **vars(self.main),
            **{name: mean.value for name, mean in metrics.summary(matrix, pretrained).items()},
            "chance": chance,
            "transfer_known": metrics.transfer_known(matrix, pretrained, chance).value,
            "unknown_tasks": [task.name for i, task in enumerate(self.experiment.tasks) if i not in known],
            **{name: dict(zip(("before", "after"), (end[name] for end in self.progress.ends))) for name in LOOKED_AT},
            "scored_otherwise": others,
            "facts": self.method.facts(),
            "seconds": sum(self.progress.seconds.values()),
            "seconds_by_activity": self.progress.seconds,
            "training": self.progress.training,
            "consolidations": self.progress.consolidations,
            **costs(self.progress.training, self.progress.consolidations),
            "peak_memory": peak_memory(),
            "parameters": sum(p.numel() for p in self.clip.model.parameters()),
            "trained_parameters": self.progress.trained,
            "machine": machine(),
            "torch": torch.__version__,
            **self.made,
            "config": recorded(self.config),
        }

    def _identity(self) -> dict[str, Any]:
        return identity(self.config)

    def _checked(self, saved: dict[str, Any], path: Path) -> dict[str, Any]:
        """`saved`, if its settings are those of this run."""
        refuse_other_settings(saved.get("config", saved), self.config, self.method.needs_reference, self.folder)
        return saved

    def _state(self) -> dict[str, Any]:
        return {"progress": asdict(self.progress), "method": self.method.state()}

    def _take_up(self, state: dict[str, Any]) -> None:
        self.progress = Progress.of(state["progress"])
        self.method.load_state(state["method"], self.progress.task)
