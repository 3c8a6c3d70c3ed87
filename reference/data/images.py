"""Image files and arrays as uint8 tensors: decoded one by one, or behind an index where there are too many to hold."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from reference.errors import ExperimentError

_DECODERS = ThreadPoolExecutor(max_workers=min(16, cpu_count() or 1), thread_name_prefix="decode")


class LazyImages:
    """Images that are decoded when they are asked for, several at once; indexes like a tensor `[n, 3, size, size]`.

    `sources` are paths of files, or arrays `[h, w]` or `[h, w, 3]` of uint8. `task` is named where one cannot be read.
    """

    def __init__(self, sources: Sequence[Any], size: int, task: str) -> None:
        self.sources, self.size, self.task = list(sources), size, task

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        wanted = self.subset(index).sources
        try:
            return torch.stack(list(_DECODERS.map(lambda source: decode(source, self.size), wanted)))
        except ExperimentError as error:
            raise ExperimentError(f"task {self.task}: {error}") from error

    def subset(self, index: Tensor | slice) -> LazyImages:
        """The images of `index`, still undecoded."""
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return LazyImages([self.sources[i] for i in numbers], self.size, self.task)


def decode(source: Any, size: int) -> Tensor:
    """One image as uint8 `[3, size, size]`: shorter side resized (bicubic), centre crop.

    Raises:
        ExperimentError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(source) if isinstance(source, str) else Image.fromarray(source) as image:
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ExperimentError(
            f"image {source} is missing or cannot be decoded ({error}); replace or delete it"
        ) from error
    rgb = transforms.resize(rgb, [size], interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.pil_to_tensor(transforms.center_crop(rgb, [size, size]))
