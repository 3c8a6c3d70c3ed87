"""The eleven MTIL data sets as torchvision lays them out, with the splits of ZSCL's benchmark.

Where the benchmark has no official split (Caltech-101, EuroSAT, SUN397) it is torch's `random_split`, 80 to 20, with
a generator of seed 42; SUN397's files are sorted by path first, since torchvision lists them in the order of the file
system. Class names are torchvision's own, in plain words; those of EuroSAT (openai/CLIP's) and of the flowers are in
`configs/classes.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torchvision import datasets

from reference.errors import ExperimentError

CLASSES = Path(__file__).parents[1] / "configs" / "classes.yaml"

Samples = tuple[list[Any], list[int]]  # paths or arrays, and class numbers
Read = Callable[[str, str, bool], tuple[Sequence[str], Samples]]


@dataclass(frozen=True)
class Source:
    """One data set: numbers of classes and of train and test images, where to get it and where it belongs."""

    classes: int
    train: int
    test: int
    layout: str
    where: str
    read: Read


@dataclass(frozen=True)
class Found:
    """A data set as it lies on disk: class names in order, training and test samples."""

    class_names: tuple[str, ...]
    train: Samples
    test: Samples


def read_source(task: str, root: str, download: bool = False) -> Found:
    """Find data set `task` below `root`; with `download`, let torchvision fetch it where it still can.

    Raises:
        ExperimentError: it is missing, or its counts are not those of the benchmark.
    """
    source = SOURCES[task]
    try:
        names, train = source.read(root, "train", download)
        _, test = source.read(root, "test", download)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "missing" if text.startswith("Dataset not found") else f"cannot be read ({text})"
        raise ExperimentError(
            f"{task}: {what}; get it: {source.where}; lay it out as {Path(root).name}/{source.layout}"
        ) from error
    found = (len(names), len(train[1]), len(test[1]))
    expected = (source.classes, source.train, source.test)
    if found != expected:
        raise ExperimentError(
            f"{task}: wrong count, found {found[0]} classes, {found[1]} train and {found[2]} test images, expected "
            f"{expected[0]}, {expected[1]} and {expected[2]}; get it again: {source.where}; layout {source.layout}"
        )
    gone = next((p for p in train[0] + test[0] if isinstance(p, str) and not Path(p).is_file()), None)
    if gone is not None:
        raise ExperimentError(f"{task}: image {gone} is listed but missing; unpack the archive again ({source.where})")
    listed = yaml.safe_load(CLASSES.read_text(encoding="utf-8")).get(task, {})
    return Found(tuple(listed.get(name) or plain(name) for name in names), train, test)


def plain(name: str) -> str:
    """A label in plain words: no underscores or slashes."""
    return re.sub(r"[_/]+", " ", name).strip()


def _part(samples: Samples, part: str) -> Samples:
    """Train or test part of a data set without an official split."""
    numbers: Any = range(len(samples[1]))
    count = int(0.8 * len(numbers))
    draw = torch.Generator().manual_seed(42)
    first, second = torch.utils.data.random_split(numbers, [count, len(numbers) - count], generator=draw)
    chosen = (first if part == "train" else second).indices
    return [samples[0][i] for i in chosen], [samples[1][i] for i in chosen]


def _with_parts(name: str, files: str = "_image_files", train: str = "train", **options: Any) -> Read:
    """The reader of a data set that has the parts `train` and test and lists its `files`."""

    def read(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
        found = getattr(datasets, name)(root, split=train if part == "train" else part, download=download, **options)
        return found.classes, ([str(path) for path in getattr(found, files)], list(found._labels))

    return read


def _caltech(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
    found = datasets.Caltech101(root, download=download)
    folder = Path(found.root) / "101_ObjectCategories"
    paths = [
        str(folder / found.categories[label] / f"image_{number:04d}.jpg") for label, number in zip(found.y, found.index)
    ]
    return found.categories, _part((paths, list(found.y)), part)


def _cifar(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
    found = datasets.CIFAR100(root, train=part == "train", download=download)
    return found.classes, (list(found.data), list(found.targets))


def _eurosat(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
    found = datasets.EuroSAT(root, download=download)
    samples = ([path for path, _ in found.samples], [label for _, label in found.samples])
    return found.classes, _part(samples, part)


def _flowers(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
    found = datasets.Flowers102(root, split=part, download=download)
    names = [str(number) for number in range(102)]  # named in configs/classes.yaml
    return names, ([str(path) for path in found._image_files], list(found._labels))


def _mnist(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
    found = datasets.MNIST(root, train=part == "train", download=download)
    return found.classes, (list(found.data.numpy()), found.targets.tolist())


def _cars(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
    found = datasets.StanfordCars(root, split=part)
    return found.classes, ([path for path, _ in found._samples], [label for _, label in found._samples])


def _sun(root: str, part: str, download: bool) -> tuple[Sequence[str], Samples]:
    found = datasets.SUN397(root, download=download)
    pairs = sorted(zip(map(str, found._image_files), found._labels))
    return found.classes, _part(([path for path, _ in pairs], [label for _, label in pairs]), part)


_BY_TORCHVISION = "python -m reference.data check --data-root DIR --download"
_READERS: dict[str, Read] = {
    "aircraft": _with_parts("FGVCAircraft", annotation_level="variant"), "caltech101": _caltech, "cifar100": _cifar,
    "dtd": _with_parts("DTD", partition=1), "eurosat": _eurosat, "flowers102": _flowers,
    "food101": _with_parts("Food101"), "mnist": _mnist, "stanford_cars": _cars, "sun397": _sun,
    "oxford_pets": _with_parts("OxfordIIITPet", files="_images", train="trainval"),
}  # fmt: skip
SOURCES = {
    name: Source(**{"where": _BY_TORCHVISION, **listed}, read=_READERS[name])
    for name, listed in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
}
