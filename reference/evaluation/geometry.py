"""Geometry of the two modalities: retrieval both ways on the pool, cosines and the modality gap on every task."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.config import Config
from reference.data.folders import ReferencePool
from reference.training.clip import Clip
from reference.training.features import image_features, text_features


def pool_figures(clip: Clip, pool: ReferencePool, config: Config) -> dict[str, float]:
    """Recall in percent at 1 and 5, image to text and text to image, and the modality gap, on the reference pool.

    Captions that are equal count as one text. The gap is `||mean image feature - mean text feature||` over the pairs
    (Liang et al. 2022, arXiv 2203.02053).
    """
    sentences, kind = pool.kinds()
    images = image_features(clip, pool.images, config).cpu()
    texts = text_features(clip, clip.tokens(sentences), config).cpu()
    figures = recalls(images @ texts.T, kind)
    return {**figures, "modality_gap": float((images.mean(0) - texts[kind].mean(0)).norm())}


def gap_figures(features: Tensor, labels: Tensor, texts: Tensor) -> dict[str, float]:
    """Mean cosine of images with their own class and with the other classes, and the modality gap, of one task.

    `features` `[n, e]` and class vectors `texts` `[c, e]` have length 1; `labels` `[n]`. The first two are eq. 1 and 2
    of MG-CLIP (arXiv 2507.09118); the gap is that of `pool_figures`, over images and the vectors of their classes.
    """
    cosines, labels = (features @ texts.T).double(), labels.to(features.device)
    own = cosines.gather(1, labels[:, None])
    others = (cosines.sum() - own.sum()) / (cosines.numel() - len(own))
    gap = (features.mean(0) - texts[labels].mean(0)).norm()
    return {"positive_cosine": float(own.mean()), "negative_cosine": float(others), "modality_gap": float(gap)}


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
