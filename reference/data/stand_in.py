"""Stand-ins for MTIL's data sets: noise with the right shapes and numbers of classes, for memory and speed.

Every image is a small picture of noise around the mean of its class, enlarged like a file would be. Accuracies say
nothing about the real data.
"""

from __future__ import annotations

import numpy as np
import torch

from reference.data.folders import ReferencePool
from reference.data.images import decode
from reference.data.mtil import SOURCES, Found, Samples

SIDE = 24  # pixels of the pictures before they are enlarged
TRAIN, TEST, OF_POOL = 2048, 256, 1000


def stand_in(task: str) -> Found:
    """The stand-in of data set `task`: its number of classes, 2,048 training and 256 test images."""
    number, classes = list(SOURCES).index(task), SOURCES[task].classes
    names = tuple(f"{task.replace('_', ' ')} {label}" for label in range(classes))
    return Found(names, _samples(number, classes, TRAIN), _samples(number, classes, TEST, part=1))


def stand_in_pool(count: int, size: int) -> ReferencePool:
    """At most 1,000 images of noise at `size` pixels with a caption each."""
    pictures, labels = _samples(len(SOURCES), OF_POOL, min(count, OF_POOL))
    images = torch.stack([decode(picture, size) for picture in pictures])
    return ReferencePool(images, tuple(f"a photo of thing {label}." for label in labels))


def _samples(number: int, classes: int, count: int, part: int = 0) -> Samples:
    means = np.random.default_rng([number]).uniform(60, 195, (classes, 1, 1, 3))
    labels = np.arange(count) % classes
    noise = np.random.default_rng([number, part]).normal(0, 40, (count, SIDE, SIDE, 3))
    pictures = (means[labels] + noise).clip(0, 255).astype(np.uint8)
    return list(pictures), labels.tolist()
