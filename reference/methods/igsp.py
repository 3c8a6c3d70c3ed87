"""iGSP: experts found and trained in two phases beside the frozen CLIP; with and without the task's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nullspace_optim import IGSP, NullSpaceOptimizer, clip_forward
from nullspace_optim.errors import OptionError
from nullspace_optim.igsp import ExpertReport
from reference.data.tasks import Task
from reference.errors import ExperimentError
from reference.methods.adapters import PLAIN, TASK_KNOWN, TASK_UNKNOWN, Routing, Selector
from reference.methods.base import Method, Setting
from reference.training.clip import Clip
from reference.training.steps import Batch, Batches

BY_LAYER = "each layer by itself"
EVERY = 5  # steps between two points of the routing curves


class NamedTasks(Selector):
    """The selector of the adapter methods, which names the task of each sample to the optimizer."""

    def __init__(self, clip: Clip, optimizer: NullSpaceOptimizer) -> None:
        super().__init__(clip, Routing())
        self.optimizer = optimizer
        self.names: list[str] = []

    @contextmanager
    def using(self, task: int | Tensor) -> Iterator[None]:
        """Route for `task` inside this context, a number or one a sample."""
        named = {PLAIN: None, **dict(enumerate(self.names))}
        given = [named[number] for number in task.tolist()] if isinstance(task, Tensor) else named[task] or ""
        with self.optimizer.task(given):
            yield


class ExpertsOfTasks(Method):
    """iGSP with the options `igsp` of the settings.

    With the task's name, tasks that have no router yet run the plain backbone, so Transfer is the pretrained accuracy
    by construction. "task unknown" gives each image and each prompt to the nearest task by the backbone's features, as
    for the other adapter methods; "each layer by itself" leaves that to the prototypes of iGSP's layers.
    """

    name = "igsp"
    evaluations = (TASK_KNOWN, TASK_UNKNOWN, BY_LAYER)
    saved = ("tasks", "curve")
    optimizer: NullSpaceOptimizer

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.selector = NamedTasks(self.clip, self.optimizer)
        self.tasks: list[dict[str, Any]] = []
        self.curve: list[tuple[int, dict[str, tuple[float, ...]]]] = []

    def make_optimizer(self) -> Optimizer:
        """AdamW on experts and routers; the backbone needs no gradients."""
        base = super().make_optimizer()
        self.clip.model.requires_grad_(False)
        try:
            options = IGSP(**self.config.igsp)
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
        self.selector.learn(Batches(self.clip, drawn), self.clip.tokens(task.prompts()))
        self.selector.names.append(task.name)
        return {"report": str(report), "images": len(drawn)}

    def evaluating(self, evaluation: str, task: Task) -> AbstractContextManager[object]:
        """Route for `task`, or for no task in particular."""
        if evaluation == TASK_UNKNOWN:
            return self.without_task()
        return self.optimizer.task(task.name if evaluation == TASK_KNOWN else None)

    def without_task(self) -> AbstractContextManager[object]:
        """Route each input for the nearest task, or for none."""
        return self.selector.guessing()

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
            "final_with_routers": last["experts"] + last["routers"] + self.selector.parameters,
            "tasks": self.tasks,
        }

    def state(self) -> dict[str, Any]:
        """The model, the optimizer with all experts, and what is known of finished tasks."""
        return {**super().state(), "selector": self.selector.state(), "names": self.selector.names}

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take it up again."""
        super().load_state(state, number)
        self.selector.load_state(state["selector"])
        self.selector.names = state["names"]


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
    return {
        "task": report.task,
        "trainable_phase_1": report.trainable.first,
        "trainable_phase_2": report.trainable.second,
        "steps_phase_1": report.trainable.first_steps,
        "steps_phase_2": report.trainable.second_steps,
        "trainable_mean": report.trainable.mean,
        "phase_1_ended": report.reason,
        "routing_steps": [step for step, _ in curve],
        "experts": report.experts,
        "routers": report.routers,
        "kept": sum(layer.kept for layer in report.layers),
        "pruned": sum(layer.pruned for layer in report.layers),
        "reused": sum(layer.reused for layer in report.layers),
        "layers": layers,
    }
