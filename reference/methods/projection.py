"""Null-space methods with the library's own policy: ours, and its controls."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from nullspace_optim import Energy, NullSpaceOptimizer, clip_forward
from reference.engine import batches, seeded
from reference.methods.base import Method, Setting
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


class RandomBasis(NullSpaceReference):
    """Ours with every basis replaced by a random one of the same rank while a task is trained.

    The control for "any restriction of the update would do". The true bases are put back to be grown, so that the ranks
    are those that our rule gives on this model.
    """

    name = "random-basis"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.true: dict[str, dict[str, Tensor]] = {}

    def before_task(self, number: int) -> None:
        """Put random bases in place of the true ones."""
        super().before_task(number)
        self.true = {}
        for n, (name, basis) in enumerate(sorted(self.optimizer.bases.items())):
            draw = seeded(self.setting.seed, number, n, 7)
            self.true[name] = {side: subspace.basis for side, subspace in basis.subspaces.items()}
            for subspace in basis.subspaces.values():
                subspace.basis = random_like(subspace.basis, subspace.ranks, subspace.size, draw)
        self.optimizer.reanchor()

    def after_task(self, number: int) -> dict[str, Any]:
        """Put the true bases back, anchored where the weights now are, and grow them."""
        for name, sides in self.true.items():
            for side, tensor in sides.items():
                self.optimizer.bases[name].subspaces[side].basis = tensor  # type: ignore[index]
        self.optimizer.reanchor()
        return super().after_task(number)

    def state(self) -> dict[str, Any]:
        """The true bases as well."""
        return {**super().state(), "true": self.true}

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take up what `state` returned."""
        super().load_state(state, number)
        self.true = state["true"]


def random_like(basis: Tensor, ranks: tuple[int, ...], size: int, draw: torch.Generator) -> Tensor:
    """A random basis of the same shape and ranks: orthonormal columns `[g, s, k]`, or as many other rows `[k]`."""
    if basis.ndim == 1:
        return torch.randperm(size, generator=draw)[: len(basis)].sort().values.to(basis.device)
    drawn = torch.zeros(basis.shape)
    for group, rank in enumerate(ranks):
        drawn[group, :, :rank] = torch.linalg.qr(torch.randn(size, rank, generator=draw))[0]
    return drawn.to(basis)
