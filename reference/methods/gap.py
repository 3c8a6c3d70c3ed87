"""MG-CLIP (arXiv 2507.09118): a LoRA that stops while the modality gap is near the pretrained one, and visual classes.

As released: a LoRA of rank 8 with the factor 1/8 on keys and values of all blocks of both towers, never reset. Ours:
an "epoch" is a tenth of `iterations`; drift is measured in cosine, not relative to the mean wrong logit, which may be
negative (then the released rule never stops); tasks run the schedule on which the rule was measured, where the released
code has another one; the common loss and AdamW.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from nullspace_optim.methods import begin_low_rank
from reference.data.tasks import Task
from reference.evaluation.geometry import gap_figures
from reference.methods.base import Method, Setting
from reference.training.clip import Clip, classification_loss
from reference.training.features import image_features
from reference.training.steps import Learner, Schedule, class_vectors, learn, seeded, set_rate, shuffled_passes, uniform

CHECKS = 10
RATE, PASSES, BATCH = 1e-3, 3, 64  # of the visual classes
# The released score is p + 4 cos(V), p the posterior of the texts. At p = 1/2 it moves like (s cos(T) + 16 cos(V)) / 4.
WEIGHT = 16.0


class LoraKeyValue(Method):
    """MG-CLIP's LoRA without its rule and its classes; the control is this with `iterations` chosen on validation."""

    name = "lora-kv"

    def make_optimizer(self) -> Optimizer:
        """AdamW on the LoRA alone."""
        torch.manual_seed(self.setting.seed)
        model, rank = self.clip.model.requires_grad_(False), self.config.lora_rank
        packed = {name: p for name, p in model.named_parameters() if name.endswith("attn.in_proj_weight")}
        rows = {name: torch.arange(len(weight) // 3, len(weight)) for name, weight in packed.items()}
        begin_low_rank(model, rows, rank, factor=1 / rank)
        return super().make_optimizer()


class MgClip(LoraKeyValue):
    """MG-CLIP: as many steps a task as move the mean negative cosine by `gap_bound`; classes by text and by image."""

    name = "mg-clip"
    evaluations = ("task known", "task known, visual classes")
    saved = ("steps", "visual")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.steps, self.visual = self.config.iterations, dict[str, Tensor]()

    def before_sequence(self) -> dict[str, Any]:
        """Find the number of steps on a copy that learns the first task."""
        clip, common, task, drifts = self.clip.copy(), uniform(self.config), self.setting.tasks[0], []
        smoothing, total = self.config.label_smoothing, common.iterations
        trained = [p for p in clip.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=self.config.weight_decay, fused=True)
        learner = Learner(clip, optimizer, lambda i, k, t: classification_loss(clip.model, i, k, t, smoothing))
        before, ends = self._negative(clip, task), sorted({-(-total * n // CHECKS) for n in range(1, CHECKS + 1)})
        for done, end in zip([0, *ends], ends):
            part = replace(common, iterations=end, total=total)
            learn(learner, task, self.config, part, self.setting.seed, first_step=done)
            drifts.append(abs(self._negative(clip, task) - before))
            if drifts[-1] > self.config.gap_bound:
                break
        within = sum(drift <= self.config.gap_bound for drift in drifts)
        self.steps = ends[max(1, within) - 1]
        return {"steps": self.steps, "drifts": drifts}

    def _negative(self, clip: Clip, task: Task) -> float:
        split = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        with torch.no_grad():
            texts = class_vectors(clip, task, 1)
        return gap_figures(image_features(clip, split.images, self.config), split.labels, texts)["negative_cosine"]

    def schedule(self, number: int) -> Schedule:
        """The first `steps` of the common schedule."""
        return replace(super().schedule(number), iterations=self.steps, total=self.config.iterations)

    def after_task(self, number: int) -> dict[str, Any]:
        """Fit the task's visual classes; those of earlier tasks stay."""
        task = self.setting.tasks[number]
        features = image_features(self.clip, task.train.images, self.config)
        draw = seeded(self.setting.seed, number, 10)
        self.visual[task.name] = visual_classes(features, task.train.labels, len(task.class_names), draw)
        return {}

    def class_vectors(self, evaluation: str, task: Task, vectors: Tensor) -> Tensor:
        """`s T + w V` for finished tasks in the second way of scoring, texts alone otherwise."""
        if evaluation == self.evaluations[0] or task.name not in self.visual:
            return vectors
        return self.clip.model.logit_scale.exp() * vectors + WEIGHT * self.visual[task.name]  # type: ignore[no-any-return, operator]

    def facts(self) -> dict[str, Any]:
        """Steps a task."""
        return {"steps": self.steps}


def visual_classes(features: Tensor, labels: Tensor, count: int, draw: torch.Generator, passes: int = PASSES) -> Tensor:
    """Unit vectors `[count, e]`: class means of unit features `[n, e]` (0 of none), trained by bare cosines."""
    labels = labels.to(features.device)
    own = F.one_hot(labels, count).to(features)
    classes = (own.T @ features / own.sum(dim=0).clamp(min=1)[:, None]).requires_grad_()
    optimizer, size = Adam([classes]), min(BATCH, len(features))
    plan = Schedule(passes * (len(features) // size), RATE, warmup=0)
    for step, index in enumerate(shuffled_passes(len(features), plan.iterations, size, draw) if passes else ()):
        set_rate(optimizer, plan.at(step))
        optimizer.zero_grad()
        F.cross_entropy(features[index] @ F.normalize(classes, dim=1).T, labels[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return F.normalize(classes.detach(), dim=1)
