"""Tasks from folders of images: `<data root>/<task>/{train,test}/<class name>/<n>.jpg`, and the reference pool.

Images are checked and decoded before any training: shorter side resized to the model's size, centre crop, uint8
`[n, 3, s, s]` kept in memory. The validation split is the last fifth of each class's training images in natural file
order.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from reference.config import Config
from reference.errors import ExperimentError
from reference.tasks import ORDERS, Split, Task, chosen, templates_of

Samples = list[tuple[str, int]]


@dataclass(frozen=True)
class ReferencePool:
    """Images `[n, 3, s, s]`, uint8, with one caption each: what a pretrained model should keep knowing."""

    images: Tensor
    captions: tuple[str, ...]


def load_tasks(config: Config, size: int) -> list[Task]:
    """All tasks of the configuration, decoded at `size` pixels.

    Raises:
        ExperimentError: a missing folder, classes that differ between train and test, an unreadable image.
    """
    root = Path(config.data_root)
    if not root.is_dir():
        raise ExperimentError(
            f"data_root={root} is not a folder; give the folder that holds the tasks with --data-root"
        )
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    names = chosen(config.tasks, found) if config.tasks else ORDERS[config.order]
    folders = {name: _folders(root / name) for name in names}
    return [_load_task(name, *folders[name], config, size) for name in tqdm(names, desc="reading images", disable=None)]


def load_reference_pool(config: Config, size: int) -> ReferencePool:
    """`config.reference_images` images of the pool, drawn with a fixed seed, with their captions.

    Raises:
        ExperimentError: no `captions.csv` with the columns file and caption, or an unreadable image.
    """
    root = Path(config.reference_root)
    listing = root / "captions.csv"
    if not config.reference_root or not listing.is_file():
        raise ExperimentError(
            f"reference_root={config.reference_root!r} holds no captions.csv, which nullspace-reference reads; "
            "give --reference-root or leave that method out of --methods"
        )
    with listing.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"file", "caption"} <= set(rows[0]):
        raise ExperimentError(f"{listing} must be a CSV table with the columns file and caption")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: config.reference_images].tolist()
    images = torch.stack([_decode(str(root / rows[i]["file"]), size) for i in order])
    return ReferencePool(images, tuple(rows[i]["caption"] for i in order))


def natural(path: str) -> list[tuple[int, str]]:
    """Sort key under which `2.jpg` comes before `10.jpg`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def held_back(samples: Sequence[tuple[str, int]]) -> tuple[Samples, Samples]:
    """Training samples without, and only, the last fifth of each class (natural file order; at least one image)."""
    by_class: dict[int, list[str]] = defaultdict(list)
    for path, label in samples:
        by_class[label].append(path)
    kept: Samples = []
    validation: Samples = []
    for label, paths in sorted(by_class.items()):
        paths.sort(key=natural)
        cut = len(paths) - max(1, len(paths) // 5)
        kept += [(path, label) for path in paths[:cut]]
        validation += [(path, label) for path in paths[cut:]]
    return kept, validation


def _folders(folder: Path) -> tuple[ImageFolder, ImageFolder]:
    """Train and test folder of one task, listed but not decoded."""
    listed = []
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise ExperimentError(
                f"folder {folder / part} is missing: expected <data root>/<task>/{{train,test}}/<class name>/<image>; "
                "check --data-root, or name the tasks you have with --set tasks=a,b"
            )
        try:
            listed.append(ImageFolder(str(folder / part)))
        except FileNotFoundError as error:
            raise ExperimentError(
                f"{folder / part}: {error}".split("\n")[0] + "; every class needs an image"
            ) from error
    train, test = listed
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ExperimentError(
            f"{folder}: class folders differ between train and test ({', '.join(odd)}); make them equal"
        )
    return train, test


def _load_task(name: str, train: ImageFolder, test: ImageFolder, config: Config, size: int) -> Task:
    training, evaluation = sorted(train.samples, key=lambda sample: natural(sample[0])), test.samples
    if config.split == "validation":
        training, evaluation = held_back(training)
    classes = tuple(label.replace("_", " ") for label in train.classes)
    return Task(name, classes, templates_of(name), _split(training, size), _split(evaluation, size))


def _split(samples: Sequence[tuple[str, int]], size: int) -> Split:
    images = torch.stack([_decode(path, size) for path, _ in samples])
    return Split(images, torch.tensor([label for _, label in samples]))


def _decode(path: str, size: int) -> Tensor:
    """One image file as uint8 `[3, size, size]`."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ExperimentError(
            f"image {path} is missing or cannot be decoded ({error}); replace or delete it"
        ) from error
    rgb = transforms.resize(rgb, [size], interpolation=transforms.InterpolationMode.BICUBIC)
    decoded: Tensor = transforms.pil_to_tensor(transforms.center_crop(rgb, [size, size]))
    return decoded
