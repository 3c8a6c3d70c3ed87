"""Unit features of images and texts, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.config import Config
from reference.data.images import LazyImages
from reference.data.tasks import Split
from reference.training.clip import Clip
from reference.training.steps import Batches, precision

TEXT_BATCH = 256


@torch.no_grad()
def image_features(clip: Clip, images: Tensor | LazyImages, config: Config) -> Tensor:
    """Unit features `[n, e]` of uint8 images `[n, 3, s, s]`, float32."""
    clip.model.eval()
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    with precision(clip, config):
        return torch.cat([clip.model.encode_image(x, normalize=True).float() for x, _ in Batches(clip, split)])  # type: ignore[operator]


@torch.no_grad()
def text_features(clip: Clip, tokens: Tensor, config: Config) -> Tensor:
    """Unit features `[n, e]` of tokens `[n, context]`, float32."""
    clip.model.eval()
    parts = torch.split(tokens, TEXT_BATCH)
    with precision(clip, config):
        return torch.cat([clip.model.encode_text(part, normalize=True).float() for part in parts])  # type: ignore[operator]
