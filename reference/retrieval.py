"""What a model still knows of general images and captions: retrieval both ways, and the modality gap."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.clip import Clip
from reference.config import Config
from reference.data import ReferencePool
from reference.engine import Batches, precision
from reference.images import LazyImages
from reference.tasks import Split

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


def pool_figures(clip: Clip, pool: ReferencePool, config: Config) -> dict[str, float]:
    """Recall in percent at 1 and 5, image to text and text to image, and the modality gap, on the reference pool.

    Captions that are equal count as one text. The gap is `||mean image feature - mean text feature||` over the pairs
    (Liang et al. 2022, arXiv 2203.02053).
    """
    sentences = list(dict.fromkeys(pool.captions))
    number = {sentence: n for n, sentence in enumerate(sentences)}
    kind = torch.tensor([number[caption] for caption in pool.captions])
    images = image_features(clip, pool.images, config).cpu()
    texts = text_features(clip, clip.tokens(sentences), config).cpu()
    figures = recalls(images @ texts.T, kind)
    return {**figures, "modality_gap": float((images.mean(0) - texts[kind].mean(0)).norm())}


def recalls(similarity: Tensor, kind: Tensor) -> dict[str, float]:
    """Recall in percent from the similarities `[images, texts]`, where image i belongs to text `kind[i]`.

    Image to text: the right text is among the best k. Text to image: one of its images is (texts without any are left
    out). Ties count against the model.
    """
    right = kind[:, None] == torch.arange(similarity.shape[1])
    own = similarity.gather(1, kind[:, None])
    rank = ((similarity >= own) & ~right).sum(dim=1)
    best = similarity.masked_fill(~right, float("-inf")).amax(dim=0)
    back = ((similarity >= best) & ~right).sum(dim=0)[right.any(dim=0)]
    shares = {f"image_to_text_at_{k}": (rank < k).float().mean() for k in (1, 5)}
    shares |= {f"text_to_image_at_{k}": (back < k).float().mean() for k in (1, 5)}
    return {name: 100.0 * float(share) for name, share in shares.items()}
