"""Null-space methods with the library's own policy: ours, and its controls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from nullspace_optim import NullSpaceOptimizer, clip_forward
from nullspace_optim.policies import OSF, SGP, Energy, Policy
from reference.data.tasks import Split
from reference.methods.base import Method, Setting
from reference.methods.distillation import GuidedLoss, ReferenceBatches
from reference.training.steps import Batch, Batches, seeded


class NullSpace(Method):
    """Ours: after each AdamW step the weights are corrected; kept directions of earlier tasks do not move."""

    name = "nullspace"
    project: ClassVar[Literal["update", "gradient", "both"] | None] = None  # as the settings say
    optimizer: NullSpaceOptimizer

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.guided = self.guide()

    def guide(self) -> GuidedLoss | None:
        """The loss with the pool beside it, where the settings ask for it."""
        return GuidedLoss(self.setting, ReferenceBatches(self.setting)) if self.config.pool_losses else None

    @property
    def policy(self) -> Policy:
        """Rule of protection: fully, or each direction by its importance."""
        energy, alpha = self.config.energy, self.config.sgp_alpha
        return Energy(energy) if alpha is None else SGP(energy, alpha=alpha)

    def make_optimizer(self) -> Optimizer:
        """AdamW under protection."""
        base, project = super().make_optimizer(), self.project or self.config.project
        return NullSpaceOptimizer(base, self.clip.model, policy=self.policy, project=project)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy, and the losses on the pool where the settings ask for them."""
        return super().loss(batch) if self.guided is None else self.guided(batch)

    def before_sequence(self) -> dict[str, Any]:
        """Protect what the reference pool uses, where the method asks for it."""
        return self.consolidate(*next(self._sources(-1))) if self.needs_reference else {}

    def after_task(self, number: int) -> dict[str, Any]:
        """Protect what the finished task's images and prompts use, and give back what hardly any task uses."""
        sources = list(self._sources(number))
        facts = self.consolidate(*sources[-1])
        return {**facts, **self.prune(sources)} if self.config.prune_bound else facts

    def _sources(self, number: int) -> Iterator[tuple[str, Split, list[str]]]:
        """Name, images and sentences of everything that is protected once task `number` is finished."""
        pool = self.setting.pool
        if self.needs_reference and pool is not None:
            images = Split(pool.images, torch.zeros(len(pool.images), dtype=torch.int64))
            yield "reference", images, list(dict.fromkeys(pool.captions))
        for task in self.setting.tasks[: number + 1]:
            yield task.name, task.train.drawn(self.config.consolidation_images, seed=self.setting.seed), task.prompts()

    def consolidate(self, name: str, split: Split, prompts: list[str]) -> dict[str, Any]:
        """Protect what the images of `split` and the sentences `prompts` use; returns the report."""
        forward = clip_forward(self.clip.model, self.clip.tokens(prompts))
        report = self.optimizer.consolidate(Batches(self.clip, split), name=name, forward=forward, progress=False)
        return {"report": str(report), "images": len(split)}

    def prune(self, sources: list[tuple[str, Split, list[str]]]) -> dict[str, Any]:
        """Give back directions within `prune_bound` of the energy of every one of `sources`; returns how many."""
        report = self.optimizer.prune(
            {name: Batches(self.clip, split) for name, split, _ in sources},
            bound=self.config.prune_bound,
            forward={name: clip_forward(self.clip.model, self.clip.tokens(prompts)) for name, _, prompts in sources},
            progress=False,
        )
        return {"given_back": report.freed}

    def facts(self) -> dict[str, Any]:
        """Mean share of directions still free over all parameters that have a basis, and bytes of bases and anchors."""
        shares = [self.optimizer.capacity()[name] for name, basis in self.optimizer.bases.items() if basis.subspaces]
        return {"free_share": sum(shares) / len(shares), "bytes": stored_bytes(self.optimizer)} if shares else {}


class NullSpaceReference(NullSpace):
    """Ours, with a pool of general images and captions consolidated before task 1: protects what was pretrained."""

    name = "nullspace-reference"
    needs_reference = True


class NullSpaceLosses(NullSpaceReference):
    """Ours with the pool, and GNSP's two losses on it: they hold what the kept directions leave open."""

    name = "nullspace-losses"

    def guide(self) -> GuidedLoss:
        """The losses, whatever the settings say."""
        return GuidedLoss(self.setting, ReferenceBatches(self.setting))


class Gradient(NullSpace):
    """As published by the gradient-projection family (GPM, GNSP): the gradient is projected, then AdamW steps."""

    name = "gradient"
    project = "gradient"


class GradientReference(Gradient):
    """The projected gradient with the pool consolidated first: what the pool does without exactness."""

    name = "gradient-reference"
    needs_reference = True


class LeadingDirections(NullSpaceReference):
    """OSF: half of each weight's own directions stay, on both sides; the pool only shows which weights are read."""

    name = "osf"
    policy = OSF()


class RandomBasis(NullSpaceReference):
    """Ours with every basis replaced by a random one of the same rank while a task is trained.

    The control for "any restriction of the update would do". The true bases are put back to be grown, so that the ranks
    are those that our rule gives on this model.
    """

    name = "random-basis"
    saved = ("true",)

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


def stored_bytes(optimizer: NullSpaceOptimizer) -> int:
    """Bytes of all bases, anchors and kept values (shared tensors once)."""
    sides = [side for basis in optimizer.bases.values() for side in basis.subspaces.values()]
    parts = [part for side in sides for part in (side.basis, side.anchor, side.covariance, side.scale)]
    parts += [basis.kept for basis in optimizer.bases.values()]
    return sum({part.data_ptr(): part.nbytes for part in parts if part is not None and part.numel()}.values())


def random_like(basis: Tensor, ranks: tuple[int, ...], size: int, draw: torch.Generator) -> Tensor:
    """A random basis of the same shape and ranks: orthonormal columns `[g, s, k]`, or as many other rows `[k]`."""
    if basis.ndim == 1:
        return torch.randperm(size, generator=draw)[: len(basis)].sort().values.to(basis.device)
    drawn = torch.zeros(basis.shape)
    for group, rank in enumerate(ranks):
        drawn[group, :, :rank] = torch.linalg.qr(torch.randn(size, rank, generator=draw))[0]
    return drawn.to(basis)
