"""Accuracy under attack: whether fine-tuning keeps the robustness of the pretrained model, AdvCL's question.

The attack is projected gradient descent in the largest norm (Madry et al. 2018, arXiv 1706.06083) on the pixels, before
they are normalised: a random start, then `STEPS` steps of half the radius up the cross entropy. Class vectors stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import Config
from reference.data.tasks import Task
from reference.training.clip import Clip
from reference.training.steps import accuracy, attention, class_vectors, seeded

RADII = (0.25, 0.5, 1.0)  # of 255; a model that was not trained for it has nothing left beyond
STEPS, BATCH = 5, 32


def attacked(clip: Clip, images: Tensor, labels: Tensor, classes: Tensor, radius: float, start: Tensor) -> Tensor:
    """Images `[n, 3, s, s]`, floats 0..255, moved from `start` by at most `radius` in each pixel.

    `labels` `[n]` and unit class vectors `classes` `[c, e]` on the model's device. The model is left as it was.
    """
    low, high = (images - radius).clamp(min=0), (images + radius).clamp(max=255)
    found = start
    for _ in range(STEPS):
        found = found.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(_logits(clip, found, classes), labels), found)
        found = (found.detach() + radius / 2 * gradient.sign()).clamp(low, high)
    return found


def robust_accuracy(clip: Clip, task: Task, config: Config) -> list[float]:
    """Accuracy in percent on `robust_images` test images: clean, then attacked with each of `RADII`; in float32.

    An image counts for a radius if neither its attack nor one of a smaller radius succeeds; each begins where the one
    before ended.
    """
    clip.model.eval()
    split, draw, rows = task.test.drawn(config.robust_images, seed=0), seeded(len(task.class_names)), []
    with attention(clip), torch.no_grad():
        classes = class_vectors(clip, task, 1)
        for first in range(0, len(split), BATCH):
            images = split.images[slice(first, first + BATCH)].to(clip.device).float()
            labels = split.labels[first : first + BATCH].to(clip.device)
            right = [_logits(clip, images, classes).argmax(1) == labels]
            noise = 2 * torch.rand(images.shape, generator=draw).to(clip.device) - 1
            found = (images + RADII[0] * noise).clamp(0, 255)
            for radius in RADII:
                with torch.enable_grad():
                    found = attacked(clip, images, labels, classes, radius, found)
                right.append(right[-1] & (_logits(clip, found, classes).argmax(1) == labels))
            rows.append(torch.stack(right))
    return [accuracy(right) for right in torch.cat(rows, dim=1)]


def _logits(clip: Clip, images: Tensor, classes: Tensor) -> Tensor:
    features = clip.model.encode_image(clip.normalised(images), normalize=True)  # type: ignore[operator]
    return clip.model.logit_scale.exp() * features.float() @ classes.T  # type: ignore[no-any-return,operator]
