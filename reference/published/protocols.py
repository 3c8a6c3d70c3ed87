"""Training of each table: GPM's two scripts, which others took over, Adam-NSCL's, and short ones of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from reference.errors import ExperimentError
from reference.published.data import Benchmark, Labelled, PermutedMNIST, SplitCIFAR100, read_cifar100, read_mnist
from reference.published.networks import OneHeadViT, PermutedMLP, SplitAlexNet, SplitResNet18, SplitViT


@dataclass(frozen=True)
class Protocol:
    """One table's training.

    Attributes:
        name: of the table on the command line.
        read: all images from a folder; `benchmark`: the tasks made of them for one seed and `held_out`;
            `network`: a fresh one.
        tasks, epochs, batch, test_batch: how many. rate: learning rate of SGD without momentum and decay.
        patience: None for a constant rate; else the rate is halved after so many epochs without a better validation
            loss, training ends at `epochs` or below `least_rate`, and the best epoch's weights are restored. The
            validation images come in a new order in each epoch, as in GPM's script: their loss depends on it where
            batch normalisation takes the statistics of the batch.
        milestones: shares of `epochs` after which the rate is halved. cosine: it falls along half a cosine, to zero.
        augment: train on random crops (4 pixels of padding) and mirror images.
        precision: of forward and backward passes in training; bfloat16 is autocast.
        held_out: share of each task's training images that is its validation part; None: as published.
        samples: random training images whose inputs are protected after each task.
        thresholds: share of energy to keep by layer; `growth` is added for each task before.
    """

    name: str
    read: Callable[[Path], Mapping[str, Labelled]]
    benchmark: Callable[[Mapping[str, Labelled], int, float | None], Benchmark]
    network: Callable[[], nn.Module]
    tasks: int
    epochs: int
    batch: int
    test_batch: int
    rate: float
    samples: int
    thresholds: Mapping[str, float]
    growth: float = 0.0
    patience: int | None = None
    least_rate: float = 0.0
    milestones: Sequence[float] = ()
    cosine: bool = False
    augment: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    held_out: float | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "epochs", "batch", "test_batch", "samples"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name}={getattr(self, name)} must be at least 1")
        if self.tasks > 10:
            raise ExperimentError(f"tasks={self.tasks}: {self.name} has ten tasks")
        if self.held_out is not None and not 0.01 <= self.held_out <= 0.9:
            raise ExperimentError(f"held_out={self.held_out} is a share of the training images, from 0.01 to 0.9")

    def settings(self) -> dict[str, Any]:
        """Settings for the results file; of the last five only what is not the default.

        `shuffled` tells runs with a patience from earlier ones, whose validation images kept the order of the file.
        """
        defaults = {"milestones": (), "cosine": False, "augment": False, "precision": "float32", "held_out": None}
        left_out = {"read", "benchmark", "network", *(k for k, v in defaults.items() if getattr(self, k) == v)}
        found = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self).items() if k not in left_out}
        return found if self.patience is None else {**found, "shuffled": True}

    @property
    def halvings(self) -> set[int]:
        """Numbers of the epochs before which the rate is halved."""
        return {round(share * self.epochs) for share in self.milestones}


PARTS: dict[str, tuple[Any, ...]] = {
    "pmnist": (read_mnist, PermutedMNIST, PermutedMLP),
    "cifar100": (read_cifar100, SplitCIFAR100, SplitAlexNet),
    "cifar100-resnet": (read_cifar100, SplitCIFAR100, SplitResNet18),
    "short-vit": (read_cifar100, SplitCIFAR100, SplitViT),
    "short-one-head": (read_cifar100, SplitCIFAR100, OneHeadViT),
    "short-resnet": (read_cifar100, SplitCIFAR100, partial(SplitResNet18, width=32)),
}
PROTOCOLS = {
    name: Protocol(name, *PARTS[name], **settings)
    for name, settings in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
}
