"""One cell with one seed: run it, or take what is finished, and keep its figures as one small file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reference.config import Config, for_method, refuse_other_settings
from reference.experiment import Experiment
from reference.methods import METHODS
from reference.sequence import Sequence
from reference.studies.grids import Cell, Finished
from reference.training.tracking import write_json

KEPT = (
    "transfer", "transfer_known", "average", "last", "forgetting", "backward_transfer", "diagonal_gain", "pretrained",
    "accuracy", "tasks", "training", "seconds", "seconds_per_iteration", "consolidation_seconds_per_1000_images",
    "peak_memory", "machine", "torch", "config",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a cell belongs: the folder of the grid, the grid's name, the cell's number in it, the seed."""

    folder: Path
    grid: str
    number: int
    seed: int

    def file(self, cell: Cell) -> Path:
        """The small file of `cell`."""
        return self.folder / "cells" / f"{self.grid}-{cell.name}-seed{self.seed}.json"

    def run(self, cell: Cell) -> Path:
        """The folder in which `cell` runs."""
        return self.folder / "runs" / f"{self.grid}-{cell.name}-seed{self.seed}"


def settings_of(config: Config, method: str, changes: Mapping[str, Any]) -> Config:
    """The settings under which `method` runs, with `changes` on top.

    Raises:
        ExperimentError: a change that its setting cannot have.
    """
    own = {**config.of_method.get(method, {}), **changes}
    return for_method(replace(config, methods=(method,), of_method={method: own}), method)


def figures_of(
    experiment: Experiment, config: Config, cell: Cell, finished: Finished, place: Place, stop: Callable[[], bool]
) -> dict[str, Any]:
    """The figures of `cell`, run if they are not there.

    Raises:
        ExperimentError: they are there, but with other settings.
        StoppedError: after `stop()` became true; the state is saved.
    """
    changes = cell.changes(config, finished)
    method, settings = METHODS[cell.method], settings_of(config, cell.method, changes)
    file = place.file(cell)
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        refuse_other_settings(known["config"], settings, method.needs_reference, file)
        return known
    results = Sequence(experiment, method, settings, place.seed, place.run(cell), stop).run(resume=True)
    figures = {
        "grid": place.grid,
        "cell": cell.name,
        "number": place.number,
        "factors": dict(cell.factors),
        "method": cell.method,
        "settings": changes,
        "seed": place.seed,
        "split": config.split,
        **{key: results[key] for key in KEPT},
        "loss": float(np.mean([task["loss"] for task in results["training"]])),
        "free_share": results["facts"].get("free_share"),
        "bytes": results["facts"].get("bytes"),
        "date": time.strftime("%Y-%m-%d"),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, figures)
    return figures
