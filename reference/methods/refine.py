"""CLIP-Refine (arXiv 2504.12717): a phase on the reference pool before any method, meant to close the modality gap.

Random alignment of raw features, and distillation from the model before, with half of the target the truth; AdamW at a
constant rate, whole images. As released, but for the logits: there raw inner products, which for CLIP happen to be near
its own scale; here `s I T^T`. The control `norm` has the random points integrated out: a penalty on norms.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from nullspace_optim.clip import distillation_loss, random_alignment_loss
from reference.data.tasks import Split, Task
from reference.methods.base import Setting
from reference.methods.distillation import ReferenceBatches
from reference.training.steps import Batch, Learner, Schedule, learn, seeded

DECAY = 0.1


class Refinement(Learner):
    """The phase as a training of its own; `labels` of a batch are numbers of captions."""

    def __init__(self, setting: Setting) -> None:
        self.clip, self.config, self.pairs = setting.clip, setting.config, ReferenceBatches(setting)
        self.draw = seeded(setting.seed, 8)
        trained = [parameter for parameter in self.clip.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(trained, lr=self.config.refine_rate, weight_decay=DECAY, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        """Alignment, the mean over dimensions, and the mean of both directions of distillation."""
        model, scale = self.clip.model, self.clip.model.logit_scale.exp()  # type: ignore[operator]
        images = model.encode_image(batch.images).float()  # type: ignore[operator]
        texts = model.encode_text(batch.tokens[batch.labels]).float()  # type: ignore[operator]
        if self.config.refine_loss == "random":
            points = random_alignment_loss(images.cpu(), texts.cpu(), generator=self.draw).to(images.device)
        else:
            points = (images.square().sum() + texts.square().sum()) / (2 * len(images))
        student = F.normalize(images, dim=1), F.normalize(texts, dim=1), scale
        teacher = (*self.pairs.teacher(batch.index), scale)
        held = distillation_loss(student, teacher, temperature=1.0, truth=0.5, labels=batch.labels)
        return 2 / images.shape[1] * points + held / 2


def refine(setting: Setting) -> None:
    """Train the model of `setting` on its pool for `refine_steps` steps, in place.

    Raises:
        ExperimentError: there is no pool.
    """
    learner, config = Refinement(setting), setting.config
    split = Split(learner.pairs.pool.images, learner.pairs.kind)
    task = Task("refinement", tuple(dict.fromkeys(learner.pairs.pool.captions)), ("{}",), split, split)
    steps = Schedule(config.refine_steps, config.refine_rate, warmup=0, total=10**9)  # the rate stays
    learn(learner, task, config, steps, setting.seed, number=-1, smallest_crop=1.0)
    learner.clip.model.eval()
