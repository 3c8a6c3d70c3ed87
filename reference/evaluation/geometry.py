"""Geometry of the two modalities: retrieval both ways on the pool, cosines and the modality gap on every task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import Config
from reference.data.folders import ReferencePool
from reference.data.tasks import Split
from reference.training.clip import Clip
from reference.training.features import image_features, text_features

MOST = 500  # images of a task whose dependence on labels is measured


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
    """Mean cosine of images with their own class and with the others, the modality gap, and nHSIC, of one task.

    `features` `[n, e]` and class vectors `texts` `[c, e]` have length 1; `labels` `[n]`. The first two are eq. 1 and 2
    of MG-CLIP (arXiv 2507.09118); the gap is that of `pool_figures`, over images and the vectors of their classes.
    """
    cosines, labels = (features @ texts.T).double(), labels.to(features.device)
    own = cosines.gather(1, labels[:, None])
    others = (cosines.sum() - own.sum()) / (cosines.numel() - len(own))
    gap, few = (features.mean(0) - texts[labels].mean(0)).norm(), Split(features, labels).drawn(MOST, seed=0)
    found = {"positive_cosine": own.mean(), "negative_cosine": others, "modality_gap": gap}
    return {**{name: float(value) for name, value in found.items()}, "nhsic": nhsic(few.images, few.labels)}


def nhsic(features: Tensor, labels: Tensor) -> float:
    """How far unit features `[n, e]` and labels `[n]` depend on each other: 0 by chance, 1 for labels with themselves.

    `sum R_x * R_y^T`, `R = A (A + 1e-5 n I)^-1` of centred kernels `A` (Gaussian, width 5; linear of the labels), as in
    HSIC-bottleneck's and DualHSIC's code. Independent data have much of it: its mean over permutations is taken off.
    """
    count, (x, y) = len(labels), (features.double(), F.one_hot(labels).double())
    kernels = torch.exp(-torch.cdist(x, x).square() / 50), y @ y.T
    eye = torch.eye(count).to(x)
    centred = [(eye - 1 / count) @ kernel @ (eye - 1 / count) for kernel in kernels]
    a, b = (torch.linalg.solve(kernel + 1e-5 * count * eye, kernel) for kernel in centred)

    def above_chance(one: Tensor, other: Tensor) -> Tensor:
        inside, outside = one.trace() * other.trace(), (one.sum() - one.trace()) * (other.sum() - other.trace())
        return (one * other.T).sum() - inside / count - outside / (count * (count - 1))

    most = above_chance(b, b)
    return float(above_chance(a, b) / most) if most > 1e-3 else 0.0


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
