"""Fine-tuning without protection: its bounds, and the same with weights averaged towards the pretrained model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.data.tasks import Task
from reference.methods.base import Method, Setting
from reference.methods.distillation import GuidedLoss
from reference.training.clip import replaced
from reference.training.steps import Batch, Schedule, seeded, uniform


class ZeroShot(Method):
    """The pretrained model, never trained: every row of its accuracy matrix is the pretrained row."""

    name = "zero-shot"
    trains = False


class FineTune(Method):
    """Plain continual fine-tuning: AdamW on everything except `logit_scale`, both towers."""

    name = "finetune"


class MatchedPlasticity(FineTune):
    """Plain fine-tuning at a share of the rate, `matched_share`, at which it learns new tasks no better than ours.

    The control for "it forgets less because it learns less"; the share is chosen on validation data.
    """

    name = "matched-plasticity"

    def schedule(self, number: int) -> Schedule:
        """The common schedule at `matched_share` of its rate."""
        common = super().schedule(number)
        return replace(common, rate=self.config.matched_share * common.rate)


class FromPretrained(Method):
    """Base class of those that come back to the pretrained weights."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.pretrained = {name: value.clone() for name, value in self.clip.model.state_dict().items()}


class FineTunePerTask(FromPretrained):
    """The upper bound: every task is trained from the pretrained weights, and scored with its own model."""

    name = "finetune-per-task"
    scored = "own"

    def before_task(self, number: int) -> None:
        """Go back to the pretrained weights."""
        super().before_task(number)
        self.clip.model.load_state_dict(self.pretrained)


class WiseFT(FromPretrained):
    """WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): after each task `W <- (1 - a) W_pretrained + a W`.

    The next task begins from the mean, as in ZSCL's continual version of it. `a` is `wise_share`.
    """

    name = "wise-ft"

    @torch.no_grad()
    def after_task(self, number: int) -> dict[str, Any]:
        """Move all weights towards the pretrained ones."""
        for name, value in self.clip.model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(self.pretrained[name].to(value.device), 1.0 - self.config.wise_share)
        return {}


class Safe(Method):
    """SAFE (arXiv 2311.04464), after its abstract: the attention pooling trains, all else is frozen.

    It is scored as well with `a f + (1 - a) f_pretrained` of the pooled features; `a`, rates and epochs are unknown.
    """

    name = "safe"
    layers = "pooling"
    shares: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)
    evaluations = ("task known", *(f"task known, share {share} of what was tuned" for share in shares))

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.loss = GuidedLoss(setting, None)  # type: ignore[method-assign]  # classes are encoded once a task
        self.pretrained: Any = self.clip.copy().model.eval()

    def evaluating(self, evaluation: str, task: Task) -> AbstractContextManager[object]:
        """Blend the features of the two poolings, but in the first way of scoring."""
        number, models = self.evaluations.index(evaluation), (self.pretrained, self.clip.model)
        encode = [partial(model.encode_image, normalize=False) for model in models]

        def blended(images: Tensor, normalize: bool = False) -> Tensor:
            before, tuned = (one(images) for one in encode)
            features = before.lerp(tuned, self.shares[number - 1])
            return F.normalize(features, dim=-1) if normalize else features

        return replaced(self.clip.model, encode_image=blended) if number else nullcontext()


class Joint(Method):
    """All tasks at once, as an upper bound that sees the future: every step trains a task drawn at random.

    One schedule runs over as many steps as the sequence has in all; only the end, where all have met, is scored.
    """

    name = "joint"
    scored = "end"

    def before_task(self, number: int) -> None:
        """Moments are kept: it is one training."""

    def schedule(self, number: int) -> Schedule:
        """The `number`-th part of one long schedule."""
        tasks = len(self.setting.tasks)
        common = uniform(self.config)
        return replace(common, done=number * common.iterations, total=tasks * common.iterations)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy on a batch of a task drawn at random; the given batch only says which step this is."""
        draw = seeded(self.setting.seed, batch.task, batch.step, 1)
        task = self.setting.tasks[int(torch.randint(len(self.setting.tasks), (1,), generator=draw))]
        index = torch.randint(len(task.train), (self.config.batch_size,), generator=draw)
        return self.loss_on(task, index, draw)
