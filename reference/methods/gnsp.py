"""GNSP (arXiv 2507.19839) as its released code does it, and what is left of it when one part is taken away.

After the first task only the input matrices of the vision tower's MLPs and `visual.proj` are trained (25 tensors in
ViT-B/16); their gradients are projected, before AdamW, onto the directions that hold the last `gnsp_rho` of the earlier
tasks' energy; every step adds distillation and modality alignment on a batch of the reference pool. What the paper
leaves open is a setting: `gnsp_rho`, `gnsp_gram`, `gnsp_first_task`, `schedule`, `evaluation_templates`. Two habits of
the released code are not reproduced: older tasks count half at each merge of `visual.proj` alone, and the pool is drawn
anew for every task, in the order in which the system lists files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.policies import TailEnergy
from reference.data.tasks import Split
from reference.errors import ExperimentError
from reference.methods.base import LAYERS, Method, Setting
from reference.methods.distillation import GuidedLoss, ReferenceBatches
from reference.methods.nullspace import NullSpace
from reference.training.steps import Schedule, crop, seeded, uniform

GRAM_BATCH = 16

# Rate and share of the iterations by order and task.
TUNED: dict[str, dict[str, list[float]]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))


@dataclass(frozen=True)
class CountedTail(TailEnergy):
    """GNSP's rank rule on plain second moments: every row counts the same, whatever batch or task it came from."""

    batch_frobenius: ClassVar[bool] = False

    def accumulated(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return the plain sum `[g, s, s]`."""
        return new if old is None else old + new


def tuned(schedule: Schedule, order: str, task: str) -> Schedule:
    """GNSP's schedule of `task`, in proportion to the common one (1e-5 and 1,000 iterations in the paper)."""
    rate, share = TUNED[order].get(task, [1.0, 1.0])
    return replace(schedule, rate=rate * schedule.rate, iterations=max(1, round(share * schedule.iterations)))


class Gnsp(NullSpace):
    """GNSP as published: projected gradient, then AdamW; distillation and alignment on the reference pool."""

    name = "gnsp"
    needs_reference = True
    project = "gradient"
    losses: ClassVar[bool] = True
    protects: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.restricted = {n: p for n, p in self.clip.model.named_parameters() if re.fullmatch(LAYERS["gnsp"], n)}
        self.trainable = {n: p for n, p in self.clip.model.named_parameters() if p.requires_grad}
        if not self.restricted:
            raise ExperimentError(
                f"{self.name} trains the MLPs of a vision transformer (visual.transformer.resblocks.*.mlp) and "
                "visual.proj, and the model has none; choose another --model or leave this method out"
            )

    def guide(self) -> GuidedLoss:
        """Cross entropy and, unless the child leaves them out, the losses on the pool."""
        return GuidedLoss(self.setting, ReferenceBatches(self.setting) if self.losses else None)

    def make_optimizer(self) -> Optimizer:
        """AdamW behind the projection; all tokens count."""
        rule = TailEnergy if self.config.gnsp_gram == "batch-frobenius" else CountedTail
        base, model, project = Method.make_optimizer(self), self.clip.model, self.project or self.config.project
        return NullSpaceOptimizer(base, model, policy=rule(self.config.gnsp_rho), project=project, rows="all")

    def schedule(self, number: int) -> Schedule:
        """The common schedule, or with `schedule=gnsp` the one that was tuned for this task in this order."""
        common = uniform(self.config)
        name = self.setting.tasks[number].name
        return tuned(common, self.config.order, name) if self.config.schedule == "gnsp" else common

    def before_sequence(self) -> dict[str, Any]:
        """With `gnsp_first_task=reference` the pool's Gram matrices come first; otherwise nothing."""
        pool = self.setting.pool
        if self.config.gnsp_first_task != "reference" or pool is None or not self.protects:
            return {}
        return self._add("reference", Split(pool.images, torch.zeros(len(pool.images), dtype=torch.int64)), -1)

    def before_task(self, number: int) -> None:
        """Choose what is trained: everything in the first task, unless `gnsp_first_task` says otherwise."""
        super().before_task(number)
        self._choose(number)

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take up what `state` returned during task `number`."""
        self._restrict()
        super().load_state(state, number)
        self._choose(number)

    def _choose(self, number: int) -> None:
        self._restrict()
        if number == 0 and self.config.gnsp_first_task == "full":
            for parameter in self.trainable.values():
                parameter.requires_grad_(True)

    def _restrict(self) -> None:
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name in self.restricted)
            parameter.grad = None

    def after_task(self, number: int) -> dict[str, Any]:
        """Add the task's Gram matrices: its training images, cropped as in training, in batches of 16."""
        if not self.protects:
            return {}
        task = self.setting.tasks[number]
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        return self._add(task.name, drawn, number)

    def _add(self, name: str, split: Split, number: int) -> dict[str, Any]:
        self._restrict()
        cropped = crop(split.images[slice(None)], seeded(self.setting.seed, number, 6))
        loader = [self.clip.normalised(part) for part in torch.split(cropped, GRAM_BATCH)]
        forward = partial(self.clip.model.encode_image, normalize=True)
        report = self.optimizer.consolidate(loader, name=name, forward=forward, progress=False)
        return {"report": str(report), "images": len(split)}


class GnspExact(Gnsp):
    """The same recipe with the anchor correction after AdamW: kept directions do not move."""

    name = "gnsp-exact"
    project = None


class LossesOnly(Gnsp):
    """GNSP without its projection: the reference losses alone, on the same tensors."""

    name = "losses-only"
    protects = False


class ProjectionOnly(Gnsp):
    """GNSP without its reference losses: the projected gradient alone, on the same tensors."""

    name = "projection-only"
    needs_reference = False
    losses = False
