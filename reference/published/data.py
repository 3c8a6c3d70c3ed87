"""The two data sets in full, as the published tables split them: permuted MNIST and 10-split CIFAR-100.

Files are checked and decoded before any training. A benchmark hands out one task at a time: normalised images and
labels, float32 and int64, for training, validation and test.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from sklearn.utils import shuffle
from torch import Tensor
from torchvision.datasets import CIFAR100

from reference.errors import ExperimentError

Part = Literal["train", "validation", "test"]
Labelled = tuple[Tensor, Tensor]

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60_000),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 10_000),
}
CIFAR_SIZES = {"train": 50_000, "test": 10_000}


class PermutedMNIST:
    """Ten tasks: MNIST under ten fixed permutations of its pixels, the first one permuted as well.

    As in GPM's data loader: the permutation of task `i` is `sklearn.utils.shuffle` with `random_state = 100 r_i + i`,
    where `r` is `range(10)` shuffled with the seed. The first `held_out` of the unshuffled training images, a tenth in
    GPM's loader, is the validation part.
    """

    mean, deviation = 0.1307, 0.3081

    def __init__(self, images: Mapping[str, Labelled], seed: int, held_out: float | None = None) -> None:
        self.images, self.held_out = images, 0.1 if held_out is None else held_out
        seeds = shuffle(np.arange(10), random_state=seed)
        self.permutations = [
            torch.from_numpy(shuffle(np.arange(784), random_state=int(r) * 100 + i)) for i, r in enumerate(seeds)
        ]

    def part(self, task: int, part: Part) -> Labelled:
        """Images `[n, 784]` of one part under the permutation of `task`, and labels `[n]`."""
        pixels, labels = self.images["test" if part == "test" else "train"]
        cut = round(self.held_out * len(labels))
        if part != "test":
            kept = slice(cut) if part == "validation" else slice(cut, None)
            pixels, labels = pixels[kept], labels[kept]
        permuted = pixels[:, self.permutations[task]].float()
        return permuted.div_(255).sub_(self.mean).div_(self.deviation), labels


class SplitCIFAR100:
    """Ten tasks of ten classes each in their natural order; labels run from 0 to 9 in each task.

    Of each task's training images `held_out`, drawn with the seed, is its validation part; a twentieth in GPM's loader.
    """

    mean, deviation = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)

    def __init__(self, images: Mapping[str, Labelled], seed: int, held_out: float | None = None) -> None:
        self.images, self.seed, self.held_out = images, seed, 0.05 if held_out is None else held_out

    def part(self, task: int, part: Part) -> Labelled:
        """Images `[n, 3, 32, 32]` of one part of `task`, and labels `[n]` in 0..9."""
        pixels, labels = self.images["test" if part == "test" else "train"]
        index = (labels // 10 == task).nonzero().flatten()
        if part != "test":
            drawn = index[torch.from_numpy(shuffle(np.arange(len(index)), random_state=self.seed))]
            cut = round(self.held_out * len(index))
            index = drawn[:cut] if part == "validation" else drawn[cut:]
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.deviation))
        return pixels[index].float().sub_(mean).div_(deviation), labels[index] % 10


Benchmark = PermutedMNIST | SplitCIFAR100  # a sequence of ten tasks


def read_mnist(root: Path) -> dict[str, Labelled]:
    """Pixels `[n, 784]` (uint8) and labels `[n]` of both parts, from `<root>/mnist` or `<root>/MNIST/raw`.

    Raises:
        ExperimentError: a file is missing or is not what its name says.
    """
    folder = next((root / name for name in ("mnist", "MNIST/raw") if (root / name).is_dir()), None)
    if folder is None:
        raise ExperimentError(
            f"--data-root {root} holds neither mnist/ nor MNIST/raw/; expected the four files of MNIST "
            f"({MNIST_FILES['train'][0]}.gz, ...), as torchvision.datasets.MNIST downloads them"
        )
    found = {}
    for part, (images, labels, count) in MNIST_FILES.items():
        pixels = _read_idx(folder / f"{images}.gz", magic=2051, header=16, size=count * 784).reshape(count, 784)
        found[part] = pixels, _read_idx(folder / f"{labels}.gz", magic=2049, header=8, size=count).long()
    return found


def _read_idx(path: Path, magic: int, header: int, size: int) -> Tensor:
    """The values after the header of a gzipped idx file, `[size]` uint8."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise ExperimentError(f"{path} is missing; put the four gzipped files of MNIST there") from error
    except (OSError, EOFError) as error:
        raise ExperimentError(f"{path} cannot be unpacked ({error}); download it again") from error
    if int.from_bytes(content[:4], "big") != magic or len(content) != header + size:
        raise ExperimentError(
            f"{path} is not the MNIST file of that name: {len(content)} bytes and number "
            f"{int.from_bytes(content[:4], 'big')}, expected {header + size} bytes and {magic}; download it again"
        )
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)


def read_cifar100(root: Path) -> dict[str, Labelled]:
    """Pixels `[n, 3, 32, 32]` (uint8) and fine labels `[n]` of both parts.

    From `<root>/cifar100/{train,test}.npz` (`webp`: one stream of lossless images, `end`: where each ends, `fine`) or
    from torchvision's folder `<root>/cifar-100-python`.

    Raises:
        ExperimentError: neither is there, or a file is damaged.
    """
    if (root / "cifar100").is_dir():
        return {part: _read_webp(root / "cifar100" / f"{part}.npz", count) for part, count in CIFAR_SIZES.items()}
    if not (root / "cifar-100-python").is_dir():
        raise ExperimentError(
            f"--data-root {root} holds neither cifar100/{{train,test}}.npz nor cifar-100-python/; "
            "get it with torchvision.datasets.CIFAR100(root, download=True)"
        )
    try:
        parts = {part: CIFAR100(str(root), train=part == "train") for part in CIFAR_SIZES}
    except RuntimeError as error:
        raise ExperimentError(f"{root / 'cifar-100-python'}: {error}; download it again") from error
    return {
        name: (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for name, part in parts.items()
    }


def _read_webp(path: Path, count: int) -> Labelled:
    try:
        with np.load(path, allow_pickle=False) as archive:
            stream, ends, labels = archive["webp"].tobytes(), archive["end"].tolist(), archive["fine"]
        pixels = [np.asarray(Image.open(io.BytesIO(stream[a:b])).convert("RGB")) for a, b in zip([0, *ends[:-1]], ends)]
    except FileNotFoundError as error:
        raise ExperimentError(f"{path} is missing; expected train.npz and test.npz there") from error
    except (OSError, ValueError, KeyError) as error:
        raise ExperimentError(f"{path} is damaged ({error}); fetch it again") from error
    if len(pixels) != count or len(labels) != count:
        raise ExperimentError(f"{path} holds {len(pixels)} images and {len(labels)} labels, expected {count} of each")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()
