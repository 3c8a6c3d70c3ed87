"""Ways to remember without projection: replay of stored images, and elastic weight consolidation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.methods.base import Method, Setting
from reference.methods.nullspace import NullSpaceReference
from reference.training.clip import class_logits
from reference.training.steps import Batch, attention, precision, seeded

FISHER_BATCH = 8


class Replay(Method):
    """Keeps `replay_bytes` of training images (uint8), shared equally by the tasks so far, and trains on them as well.

    The control for "the bases could have been images": give it as many bytes as our bases take (`facts.bytes` in our
    results). Every step adds the loss on a batch of one earlier task, drawn at random.
    """

    name = "replay"

    def stored(self, task: int, number: int) -> Tensor:
        """Numbers of the images of `task` that are kept while task `number` is trained; later ones keep fewer."""
        images = self.setting.tasks[task].train
        room = self.config.replay_bytes // (3 * self.clip.size**2 * max(1, number))
        order = torch.randperm(len(images), generator=seeded(self.setting.seed, task, 2))
        return order[: max(1, room)]

    def loss(self, batch: Batch) -> Tensor:
        """The new task's loss plus that of a stored batch."""
        loss = super().loss(batch)
        if batch.task == 0:
            return loss
        draw = seeded(self.setting.seed, batch.task, batch.step, 3)
        old = int(torch.randint(batch.task, (1,), generator=draw))
        kept, task = self.stored(old, batch.task), self.setting.tasks[old]
        index = kept[torch.randint(len(kept), (self.config.batch_size,), generator=draw)]
        return loss + self.loss_on(task, index, draw)

    def facts(self) -> dict[str, Any]:
        """Bytes of images that were kept in the end, and of bases beside them."""
        last, found = len(self.setting.tasks) - 1, super().facts()
        images = sum(3 * self.clip.size**2 * len(self.stored(task, last)) for task in range(last))
        return {**found, "bytes": found.get("bytes", 0) + images}


class NullSpaceReplay(Replay, NullSpaceReference):
    """Ours with the pool, and replay beside it."""

    name = "nullspace-replay"


class EWC(Method):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), online: `loss + l/2 sum F (W - W_t)^2`.

    `F` is the sum over tasks of the diagonal of the Fisher information, from gradients on labels drawn from the model
    itself, in batches of 8 (unbiased, since the scores of single images have mean zero); `W_t` are the weights after
    the last task, `l` is `ewc_weight`.
    """

    name = "ewc"
    saved = ("fisher", "centre")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.fisher: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy and the penalty."""
        loss = super().loss(batch)
        if not self.fisher:
            return loss
        now = dict(self.clip.model.named_parameters())
        terms = [(self.fisher[name] * (now[name] - self.centre[name]).square()).sum() for name in self.fisher]
        return loss + 0.5 * self.config.ewc_weight * torch.stack(terms).sum()

    def after_task(self, number: int) -> dict[str, Any]:
        """Add the task's Fisher information and remember the weights."""
        task, model = self.setting.tasks[number], self.clip.model
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        tokens = self.clip.tokens(task.prompts())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        new = {name: torch.zeros_like(p) for name, p in trained.items()}
        model.eval()
        for first in range(0, len(drawn), FISHER_BATCH):
            images = self.clip.normalised(drawn.images[slice(first, first + FISHER_BATCH)])
            with precision(self.clip, self.config):
                logits = class_logits(model, images, tokens).float()
            chances = logits.detach().softmax(dim=1).cpu()
            labels = torch.multinomial(chances, 1, generator=seeded(self.setting.seed, number, first, 4))[:, 0]
            score = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            with attention(self.clip):
                gradients = torch.autograd.grad(score, list(trained.values()), allow_unused=True)
            for name, gradient in zip(new, gradients):
                if gradient is not None:
                    new[name] += gradient.square() / len(drawn)
        self.fisher = {name: new[name] + self.fisher.get(name, 0.0) for name in new}
        self.centre = {name: p.detach().clone() for name, p in trained.items()}
        return {"fisher_trace": float(sum(value.sum() for value in new.values())), "images": len(drawn)}
