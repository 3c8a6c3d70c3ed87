"""Tasks: name, class names, prompts and images; and the two task orders of the MTIL benchmark (ZSCL, 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from reference.data.images import LazyImages
from reference.errors import ExperimentError

TEMPLATES = Path(__file__).parents[1] / "configs" / "templates.yaml"

ORDERS: dict[str, tuple[str, ...]] = {
    order: tuple(names)
    for order, names in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
}


@dataclass(frozen=True)
class Split:
    """Images `[n, 3, s, s]`, uint8, decoded or decoded when indexed, and their class numbers `[n]`, int64."""

    images: Tensor | LazyImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def drawn(self, count: int | None, seed: int) -> Split:
        """At most `count` of the images, drawn without replacement by `seed`; all of them for `None`."""
        if count is None or count >= len(self):
            return self
        return self._at(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])

    def few(self, shots: int | None, seed: int) -> Split:
        """At most `shots` images of each class, drawn in the same way; all of them for `None`."""
        if shots is None:
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._at(torch.cat([order[self.labels[order] == label][:shots] for label in self.labels.unique()]))

    def _at(self, index: Tensor) -> Split:
        index = index.sort().values
        images = self.images.subset(index) if isinstance(self.images, LazyImages) else self.images[index]
        return Split(images, self.labels[index])


@dataclass(frozen=True)
class Task:
    """One classification task for CLIP: class c is described by `templates[k].format(class_names[c])`."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    test: Split

    def prompts(self, template: int = 0) -> list[str]:
        """One sentence per class, in class order."""
        return [self.templates[template].format(name) for name in self.class_names]


def templates_of(task: str) -> tuple[str, ...]:
    """Prompt templates of a task; the first is the one used in training. A task of your own gets "a photo of a {}."."""
    listed = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    return tuple(listed.get(task, ("a photo of a {}.",)))


def chosen(names: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    """`names`, or all of `available` if empty.

    Raises:
        ExperimentError: a task that does not exist, or one named twice.
    """
    for name in names:
        if name not in available:
            raise ExperimentError(f"unknown task {name!r} in tasks: choose from {', '.join(available)}")
    if len(set(names)) != len(names):
        raise ExperimentError(f"tasks={','.join(names)} names a task twice")
    return tuple(names) or tuple(available)
