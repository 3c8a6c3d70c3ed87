"""Null-space methods with the library's own policy: ours, and its controls."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.optim import Optimizer

from nullspace_optim import Energy, NullSpaceOptimizer, clip_forward
from reference.engine import batches
from reference.methods.base import Method
from reference.tasks import Split

Project = Literal["update", "gradient", "both"]


class NullSpace(Method):
    """Ours: after each AdamW step the weights are corrected; kept directions of earlier tasks do not move."""

    name = "nullspace"
    optimizer: NullSpaceOptimizer

    @property
    def project(self) -> Project:
        """What is projected: the update, or the gradient as well."""
        return self.config.project

    def make_optimizer(self) -> Optimizer:
        """AdamW under protection."""
        base = super().make_optimizer()
        return NullSpaceOptimizer(base, self.clip.model, policy=Energy(self.config.energy), project=self.project)

    def before_sequence(self) -> dict[str, Any]:
        """Protect what the reference pool uses, where the method asks for it."""
        pool = self.setting.pool
        if not self.needs_reference or pool is None:
            return {}
        images = Split(pool.images, torch.zeros(len(pool.images), dtype=torch.int64))
        return self.consolidate("reference", images, list(dict.fromkeys(pool.captions)))

    def after_task(self, number: int) -> dict[str, Any]:
        """Protect what the finished task's images and prompts use."""
        task = self.setting.tasks[number]
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        return self.consolidate(task.name, drawn, task.prompts())

    def consolidate(self, name: str, split: Split, prompts: list[str]) -> dict[str, Any]:
        """Protect what the images of `split` and the sentences `prompts` use; returns the report."""
        forward = clip_forward(self.clip.model, self.clip.tokens(prompts))
        loader = list(batches(self.clip, split))
        report = self.optimizer.consolidate(loader, name=name, forward=forward, progress=False)
        return {"report": str(report), "bytes": report.bytes}

    def facts(self) -> dict[str, Any]:
        """Mean share of directions still free over all parameters that have a basis."""
        shares = [self.optimizer.capacity()[name] for name, basis in self.optimizer.bases.items() if basis.subspaces]
        return {"free_share": sum(shares) / len(shares)} if shares else {}


class NullSpaceReference(NullSpace):
    """Ours, with a pool of general images and captions consolidated before task 1: protects what was pretrained."""

    name = "nullspace-reference"
    needs_reference = True


class Gradient(NullSpace):
    """As published by the gradient-projection family (GPM, GNSP): the gradient is projected, then AdamW steps."""

    name = "gradient"

    @property
    def project(self) -> Project:
        """The gradient alone."""
        return "gradient"


class GradientReference(Gradient):
    """The projected gradient with the pool consolidated first: what the pool does without exactness."""

    name = "gradient-reference"
    needs_reference = True
