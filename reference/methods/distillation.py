"""Distillation from an earlier model: LwF on the new task's images, ZSCL on a reference pool; and the pool's losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nullspace_optim.clip import alignment_loss, distillation_loss
from reference.errors import ExperimentError
from reference.methods.base import Method, Setting
from reference.training.features import image_features, text_features
from reference.training.steps import Batch, seeded, shuffled_passes

OLD_CLASSES = 64  # prompts of earlier tasks that LwF distils on in one step


class ReferenceBatches:
    """The pool in batches, with the pretrained model's features of every image and caption, computed once.

    Each task goes through the pool again and again in a fixed order of its own.
    """

    def __init__(self, setting: Setting) -> None:
        pool = setting.pool
        if pool is None:
            raise ExperimentError("this method needs the reference pool; give --reference-root")
        self.clip, self.config, self.pool = setting.clip, setting.config, pool
        sentences, self.kind = pool.kinds()
        self.tokens = self.clip.tokens(sentences)
        self.images = image_features(self.clip, pool.images, self.config)
        self.texts = text_features(self.clip, self.tokens, self.config)
        self._orders: dict[int, list[Tensor]] = {}

    def drawn(self, batch: Batch) -> Tensor:
        """Numbers of the pool's images that stand beside this step."""
        count = len(self.pool.images)
        size = min(count, self.config.reference_batch or self.config.batch_size)
        steps = count // size
        if batch.task not in self._orders:
            self._orders = {batch.task: shuffled_passes(count, steps, size, seeded(42, batch.task))}
        return self._orders[batch.task][batch.step % steps]

    def student_images(self, index: Tensor) -> Tensor:
        """The trained model's unit features of those images, `[n, e]`, with gradient."""
        return self.clip.model.encode_image(self.clip.normalised(self.pool.images[index]), normalize=True)  # type: ignore[operator]

    def student_texts(self, index: Tensor) -> Tensor:
        """The same of those images' captions, `[n, e]`."""
        return self.clip.model.encode_text(self.tokens[self.kind[index]], normalize=True)  # type: ignore[operator]

    def teacher(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The pretrained model's unit features of images and captions, `[n, e]` each."""
        return self.images[index], self.texts[self.kind[index]]


def reference_losses(pool: ReferenceBatches, index: Tensor, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """GNSP's two losses on reference pairs `index`, given the student's features: distillation and alignment."""
    scale = pool.clip.model.logit_scale.exp()  # type: ignore[operator]
    student = {"image_features": images, "text_features": texts, "logit_scale": scale}
    teacher = (*pool.teacher(index), scale)
    config = pool.config
    return (
        distillation_loss(student, teacher, temperature=config.temperature),
        alignment_loss(student, pool.kind[index], smoothing=config.label_smoothing),
    )


class GuidedLoss:
    """Cross entropy of the task, and GNSP's two losses on pairs of the pool that stand beside the batch.

    `cross entropy + distillation_weight x distillation + alignment_weight x alignment`; without a pool the first alone.
    """

    def __init__(self, setting: Setting, pool: ReferenceBatches | None) -> None:
        self.clip, self.config, self.pool = setting.clip, setting.config, pool
        self.texts: tuple[int, Tensor, Tensor | None] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The scalar that is minimised."""
        model, pool = self.clip.model, self.pool
        images = model.encode_image(batch.images, normalize=True)  # type: ignore[operator]
        classes, captions = self._texts(batch)
        logits = (model.logit_scale.exp() * images @ classes.T).float()  # type: ignore[operator]
        loss = F.cross_entropy(logits, batch.labels.to(logits.device), label_smoothing=self.config.label_smoothing)
        if pool is None:
            return loss
        index = pool.drawn(batch)
        texts = pool.student_texts(index) if captions is None else captions[pool.kind[index]]
        distilled, aligned = reference_losses(pool, index, pool.student_images(index), texts)
        return loss + self.config.distillation_weight * distilled + self.config.alignment_weight * aligned

    def _texts(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Features of the classes and of all captions; computed once a task where the text tower does not move."""
        model = self.clip.model
        if any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("visual.")):
            return model.encode_text(batch.tokens, normalize=True), None  # type: ignore[operator]
        if self.texts is None or self.texts[0] != batch.task:
            captions = text_features(self.clip, self.pool.tokens, self.config) if self.pool else None
            self.texts = (batch.task, text_features(self.clip, batch.tokens, self.config), captions)
            self.clip.train()
        return self.texts[1], self.texts[2]


class LwF(Method):
    """Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282) for CLIP.

    What the model before the task said of the new images in terms of the earlier tasks' classes is kept by
    distillation. As in the paper, its answers are recorded once a task, on images that are not cropped; a step distils
    on at most 64 of the earlier classes, drawn at random.
    """

    name = "lwf"
    saved = ("recorded",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.recorded: dict[str, Tensor] = {}

    def before_task(self, number: int) -> None:
        """Record the present model's features of the task's images and of the earlier classes."""
        super().before_task(number)
        if number:
            images = self.setting.tasks[number].train.images
            self.recorded = {
                "images": image_features(self.clip, images, self.config),
                "texts": text_features(self.clip, self._earlier(number), self.config),
            }

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy, and distillation on the same images (their features are computed once)."""
        if not batch.task:
            return super().loss(batch)
        model, tokens = self.clip.model, self._earlier(batch.task)
        draw = seeded(self.setting.seed, batch.task, batch.step, 5)
        drawn = torch.randperm(len(tokens), generator=draw)[:OLD_CLASSES]
        images = model.encode_image(batch.images, normalize=True)  # type: ignore[operator]
        texts = model.encode_text(torch.cat([batch.tokens, tokens[drawn]]), normalize=True)  # type: ignore[operator]
        scale, classes = model.logit_scale.exp(), len(batch.tokens)  # type: ignore[operator]
        logits = (scale * images @ texts[:classes].T).float()
        labels = batch.labels.to(logits.device)
        new = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        teacher = (self.recorded["images"][batch.index], self.recorded["texts"][drawn], scale)
        student = (images, texts[classes:], scale)
        return new + distillation_loss(student, teacher, temperature=self.config.temperature, rows="image")

    def _earlier(self, number: int) -> Tensor:
        return self.clip.tokens([prompt for task in self.setting.tasks[:number] for prompt in task.prompts()])


class ZSCL(Method):
    """ZSCL (Zheng et al. 2023, arXiv 2303.06628): distillation on a reference pool and an ensemble of weights.

    Loss: cross entropy + distillation over images + the same over texts (both with the *pretrained* model's text
    features, as in the released code, so that only images are distilled) + `zscl_l2 sum (W - W_start)^2` to the weights
    at the task's start. The model that is scored, and that the next task begins with, is the mean of the weights at
    the start and at steps that lie `ensemble_share` of the schedule apart.
    """

    name = "zscl"
    saved = ("start", "mean", "count")
    needs_reference = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.pool = ReferenceBatches(setting)
        self.start: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.count = 0

    def before_task(self, number: int) -> None:
        """Remember the weights, and begin the mean with them."""
        super().before_task(number)
        self.start = {name: p.detach().clone() for name, p in self.clip.model.named_parameters() if p.requires_grad}
        self.mean = {name: value.clone() for name, value in self.start.items()}
        self.count = 1

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy and the three terms."""
        index = self.pool.drawn(batch)
        scale = self.clip.model.logit_scale.exp()  # type: ignore[operator]
        images, texts = self.pool.teacher(index)
        student = (self.pool.student_images(index), texts, scale)
        held = distillation_loss(student, (images, texts, scale), temperature=self.config.temperature)
        now = dict(self.clip.model.named_parameters())
        moved = torch.stack([(now[name] - value).square().sum() for name, value in self.start.items()]).sum()
        return super().loss(batch) + held + self.config.zscl_l2 * moved

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Take the weights into the mean, every so often."""
        steps = self.schedule(batch.task).iterations
        if batch.step % max(1, round(self.config.ensemble_share * steps)) == 0:
            self.count += 1
            for name, parameter in self.clip.model.named_parameters():
                if name in self.mean:
                    self.mean[name].lerp_(parameter, 1 / self.count)

    @torch.no_grad()
    def after_task(self, number: int) -> dict[str, Any]:
        """Go on with the mean."""
        for name, parameter in self.clip.model.named_parameters():
            if name in self.mean:
                parameter.copy_(self.mean[name])
        return {"ensemble": self.count}
