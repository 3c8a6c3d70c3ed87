"""iGSP: experts found and trained in two phases beside the frozen CLIP; with and without the task's name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from torch.optim import Optimizer

from nullspace_optim import IGSP, NullSpaceOptimizer, clip_forward
from nullspace_optim.errors import OptionError
from nullspace_optim.igsp import ExpertReport
from reference.data.tasks import Split, Task
from reference.errors import ExperimentError
from reference.methods.adapters import TASK_KNOWN, TASK_UNKNOWN
from reference.methods.base import Method, Setting
from reference.training.steps import Batch, Batches

EVERY = 5  # steps between two points of the routing curves
POOL = 256  # images and captions of the pool that are looked at


class ExpertsOfTasks(Method):
    """iGSP with the options `igsp` of the settings.

    With the task's name, tasks that have no router yet run the plain backbone, so Transfer is the pretrained accuracy
    by construction. "task unknown" leaves the task of each image and each prompt to the optimizer; the reference pool,
    where there is one, tells it what belongs to none.
    """

    name = "igsp"
    evaluations = (TASK_KNOWN, TASK_UNKNOWN)
    saved = ("tasks", "curve")
    optimizer: NullSpaceOptimizer

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.tasks: list[dict[str, Any]] = []
        self.curve: list[tuple[int, dict[str, tuple[float, ...]]]] = []

    def make_optimizer(self) -> Optimizer:
        """AdamW on experts and routers; the backbone needs no gradients."""
        base = super().make_optimizer()
        self.clip.model.requires_grad_(False)
        try:
            options = IGSP(**{"steps": self.config.iterations, **self.config.igsp})
        except (TypeError, OptionError) as error:
            raise ExperimentError(f"igsp={dict(self.config.igsp)!r}: {error}") from error
        return NullSpaceOptimizer(base, self.clip.model, mode=options)

    def after_step(self, batch: Batch) -> None:
        """Note the routing of every layer, while it can change."""
        if (batch.step + 1) % EVERY == 0:
            status = self.optimizer.status()
            if status.phase == 1 or status.step < EVERY:
                self.curve.append((batch.step + 1, status.flow))

    def after_task(self, number: int) -> dict[str, Any]:
        """Freeze the experts of the finished task, keep its router; returns the report."""
        task = self.setting.tasks[number]
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        forward = clip_forward(self.clip.model, self.clip.tokens(task.prompts()))
        orthogonal = self.optimizer.verify()
        report = self.optimizer.consolidate(Batches(self.clip, drawn), name=task.name, forward=forward, progress=False)
        assert isinstance(report, ExpertReport)
        self.tasks.append({**described(report, self.curve), "phase_2_drift": orthogonal.worst})
        self.curve = []
        self._calibrate()
        return {"report": str(report), "images": len(drawn)}

    def _calibrate(self) -> None:
        """Show the optimizer images and captions of no task."""
        pool = self.setting.pool
        if pool is not None:
            images = Split(pool.images[:POOL], torch.zeros(len(pool.images[:POOL]), dtype=torch.int64))
            forward = clip_forward(self.clip.model, self.clip.tokens(pool.captions[:POOL]))
            self.optimizer.mode.calibrate(Batches(self.clip, images), forward=forward, progress=False)

    def evaluating(self, evaluation: str, task: Task) -> AbstractContextManager[object]:
        """Route for `task`, or for no task in particular."""
        return self.optimizer.task(task.name if evaluation == TASK_KNOWN else None)

    def without_task(self) -> AbstractContextManager[object]:
        """Route each input for the nearest task, or for none."""
        return self.optimizer.task(None)

    def facts(self) -> dict[str, Any]:
        """Trainable parameters by phase, what is stored in the end, convergence and fate of experts per layer."""
        if not self.tasks:
            return {}
        means = [task["trainable_mean"] for task in self.tasks]
        last = self.tasks[-1]
        return {
            "trainable_mean": sum(means) / len(means),
            "trainable_phase_1": [task["trainable_phase_1"] for task in self.tasks],
            "trainable_phase_2": [task["trainable_phase_2"] for task in self.tasks],
            "final_without_routers": last["experts"],
            "final_with_routers": last["experts"] + last["routers"],
            "tasks": self.tasks,
        }


def described(report: ExpertReport, curve: list[tuple[int, dict[str, tuple[float, ...]]]]) -> dict[str, Any]:
    """The figures of one task as plain values.

    `routing` of a layer: at each step of `curve` the share of the whole history, then that of every candidate.
    """
    layers = [
        {key: value for key, value in asdict(layer).items() if key not in ("size", "rank")} for layer in report.layers
    ]
    for layer in layers:
        layer["curve"] = [[step, round(jaccard, 4), round(kl, 6)] for step, jaccard, kl in layer["curve"]]
        layer["flow"] = [round(share, 4) for share in layer["flow"]]
        shares = [flow[layer["name"]] for _, flow in curve]
        old = layer["history"]
        layer["routing"] = [[round(s, 3) for s in (sum(share[:old]), *share[old:])] for share in shares]
    count = report.trainable
    return {
        "task": report.task,
        "trainable_phase_1": count.first,
        "trainable_phase_2": count.second,
        "steps_phase_1": count.first_steps,
        "steps_phase_2": count.second_steps,
        "trainable_mean": count.mean,
        "phase_1_ended": report.reason,
        "routing_steps": [step for step, _ in curve],
        "experts": report.experts,
        "routers": report.routers,
        **{fate: sum(getattr(layer, fate) for layer in report.layers) for fate in ("kept", "pruned", "reused")},
        "layers": layers,
    }
