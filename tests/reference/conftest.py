"""The tasks of a module's settings, and small pictures in the shape of the data sets of the published tables."""

from __future__ import annotations

import pytest
import torch
from table_runs import Images

from reference.config import Config
from reference.experiment import Experiment, prepare


@pytest.fixture(scope="module")
def experiment(config: Config) -> Experiment:
    """Tasks, pool and pretrained model of the module's `config`."""
    prepared = prepare(config)
    clip = prepared.pretrained(0)
    return Experiment(prepared.tasks, prepared.pool, lambda seed: clip)


@pytest.fixture
def digits() -> Images:
    """Eighty pictures in the shape of MNIST: eight blobs of each class."""
    labels = torch.arange(10).repeat(8)
    pixels = torch.randint(0, 60, (80, 784), dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        pixels[i, 78 * label : 78 * label + 40] += 150
    return {"train": (pixels, labels), "test": (pixels[:40], labels[:40])}


@pytest.fixture
def colours() -> Images:
    labels = torch.arange(30).repeat(8)
    pixels = torch.randint(0, 120, (240, 3, 32, 32), dtype=torch.uint8)
    pixels[torch.arange(240), labels % 3, labels % 10] += 120
    return {"train": (pixels, labels), "test": (pixels[:60], labels[:60])}
