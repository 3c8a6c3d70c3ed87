"""Tasks from folders of images: `<data root>/<task>/{train,test}/<class name>/<n>.jpg`, and the reference pool.

Images are checked and decoded before any training: shorter side resized to the model's size, centre crop, uint8
`[n, 3, s, s]` kept in memory. The validation split is the last fifth of each class's training images in natural file
order (of data sets that torchvision keeps as arrays: every fifth image). A `task.yaml` beside `train` and `test` may
hold `templates` (sentences with `{}`) and `class_names` (by folder).
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from reference.config import Config
from reference.data.images import LazyImages, decode
from reference.data.mtil import Found, read_source
from reference.data.tasks import ORDERS, Split, Task, chosen, templates_of
from reference.errors import ExperimentError

Samples = list[tuple[str, int]]
Labelled = tuple[list[Any], list[int]]


@dataclass(frozen=True)
class ReferencePool:
    """Images `[n, 3, s, s]`, uint8, with one caption each: what a pretrained model should keep knowing."""

    images: Tensor
    captions: tuple[str, ...]

    def kinds(self) -> tuple[list[str], Tensor]:
        """Different captions, and the number of each image's `[n]`."""
        number = {caption: n for n, caption in enumerate(dict.fromkeys(self.captions))}
        return list(number), torch.tensor([number[caption] for caption in self.captions])


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
    benchmark = ORDERS[config.order] if set(ORDERS[config.order]) & set(found) else tuple(found)
    names = chosen(config.tasks, found) if config.tasks else benchmark
    folders = {name: train_and_test(root / name) for name in names}
    return [
        _load_task(root / name, *folders[name], config, size)
        for name in tqdm(names, desc="reading images", disable=None)
    ]


def load_reference_pool(config: Config, size: int) -> ReferencePool:
    """`config.reference_images` images of the pool with their captions.

    Raises:
        ExperimentError: no `captions.csv` with the columns file and caption, or an unreadable image.
    """
    rows = captioned(config.reference_root, config.reference_images)
    images = torch.stack([decode(str(file), size) for file, _ in rows])
    return ReferencePool(images, tuple(caption for _, caption in rows))


def captioned(reference_root: str, count: int) -> list[tuple[Path, str]]:
    """At most `count` files of the pool, drawn with a fixed seed, with their captions; errors as above."""
    root = Path(reference_root)
    listing = root / "captions.csv"
    if not reference_root or not listing.is_file():
        raise ExperimentError(
            f"reference_root={reference_root!r} holds no captions.csv, which methods with a pool of "
            "general images read; give --reference-root or leave those methods out of --methods"
        )
    with listing.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"file", "caption"} <= set(rows[0]):
        raise ExperimentError(f"{listing} must be a CSV table with the columns file and caption")
    short = next((n for n, row in enumerate(rows, 2) if not row["file"] or not row["caption"]), None)
    if short:
        raise ExperimentError(f"{listing}, row {short}: file or caption is missing")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return [(root / rows[i]["file"], rows[i]["caption"]) for i in order]


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


def train_and_test(folder: Path) -> tuple[ImageFolder, ImageFolder]:
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


def _load_task(folder: Path, train: ImageFolder, test: ImageFolder, config: Config, size: int) -> Task:
    training, evaluation = sorted(train.samples, key=lambda sample: natural(sample[0])), test.samples
    if config.split == "validation":
        training, evaluation = held_back(training)
    names, templates = described(folder)
    classes = tuple(names.get(label, label.replace("_", " ")) for label in train.classes)
    return Task(folder.name, classes, templates, _split(training, size), _split(evaluation, size))


def described(folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Class names by folder and prompt templates: from the task's own `task.yaml`, else those of the benchmark."""
    path = folder / "task.yaml"
    if not path.is_file():
        return {}, templates_of(folder.name)
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        names = {str(label): str(name) for label, name in described.get("class_names", {}).items()}
        templates = tuple(described.get("templates", templates_of(folder.name)))
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ExperimentError(f"{path} must map templates to a list and class_names to a mapping") from error
    if not templates or not all(isinstance(text, str) and "{}" in text for text in templates):
        raise ExperimentError(f"{path}: every template must be a sentence with {{}} in place of the class name")
    return names, templates


def _split(samples: Sequence[tuple[str, int]], size: int) -> Split:
    images = torch.stack([decode(path, size) for path, _ in samples])
    return Split(images, torch.tensor([label for _, label in samples]))


def load_sources(config: Config, size: int, read: Callable[[str], Found] | None = None) -> list[Task]:
    """The MTIL data sets, counted but not yet decoded: as torchvision lays them out, or what `read` gives by name.

    Raises:
        ExperimentError: naming every data set that is missing or has a wrong count.
    """
    tasks, wrong = [], []
    for name in chosen(config.tasks, ORDERS[config.order]):
        try:
            found = read(name) if read is not None else read_source(name, config.data_root)
            tasks.append(_lazy_task(name, found, config, size))
        except ExperimentError as error:
            wrong.append(str(error))
    if wrong:
        raise ExperimentError("\n  ".join([f"{len(wrong)} data sets below {config.data_root} are not ready:", *wrong]))
    return tasks


def _lazy_task(name: str, found: Found, config: Config, size: int) -> Task:
    train, test = found.train, found.test
    if config.split == "validation":
        train, test = _without_last(*train)
    parts = [Split(LazyImages(sources, size, name), torch.tensor(labels)) for sources, labels in (train, test)]
    return Task(name, found.class_names, templates_of(name), *parts)


def _without_last(sources: Sequence[Any], labels: Sequence[int]) -> tuple[Labelled, Labelled]:
    """Training images without, and only, those held back; arrays, which have no file names, are every fifth."""
    if all(isinstance(source, str) for source in sources):
        parts = held_back(list(zip(sources, labels)))
    else:
        pairs = list(zip(sources, labels))
        parts = [pair for n, pair in enumerate(pairs) if n % 5 != 4], pairs[4::5]
    kept, validation = (([s for s, _ in part], [label for _, label in part]) for part in parts)
    return kept, validation
