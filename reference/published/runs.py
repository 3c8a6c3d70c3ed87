"""One method with one seed over all tasks of a table: train, protect, evaluate, save after each task, go on later.

Files in the folder of results: `<method>-seed<seed>.json` of a finished run, `<method>-seed<seed>.pt` of a begun one.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import nullspace_optim
from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.errors import NullSpaceWarning
from reference.errors import ExperimentError
from reference.evaluation.metrics import backward_transfer, last
from reference.published.data import Labelled
from reference.published.methods import Method
from reference.published.protocols import Protocol
from reference.published.sessions import Session
from reference.published.training import accuracy, order_of, train
from reference.training.saved_run import SavedRun
from reference.training.tracking import machine, provenance


class Run(SavedRun):
    """One row's run.

    Args:
        protocol, method: the table's training and the row; seed: of weights, permutations or splits, order and samples.
        images: what `protocol.read` gave; folder: where results go.
        part: what accuracy is measured on; settings are chosen on `validation` alone.
    """

    def __init__(
        self,
        protocol: Protocol,
        method: Method,
        seed: int,
        images: Mapping[str, Labelled],
        folder: Path,
        part: Literal["test", "validation"] = "test",
    ) -> None:
        self.protocol, self.method, self.seed, self.part = protocol, method, seed, part
        self.tasks = protocol.benchmark(images, seed, protocol.held_out)
        self.finished, self.checkpoint = (folder / f"{method.name}-seed{seed}{end}" for end in (".json", ".pt"))
        self.count = protocol.tasks
        torch.manual_seed(seed)
        self.model = protocol.network()
        self.optimizer: Optimizer = method.optimizer(self.model, protocol)
        self.session = Session()
        if method.session is not None and isinstance(self.optimizer, NullSpaceOptimizer):
            self.session = method.session(self.optimizer, self.model, protocol)
        self.made = provenance()
        self.state: dict[str, Any] = {"accuracy": [], "losses": [], "ranks": [], "seconds": 0.0}

    @property
    def done(self) -> int:
        """Number of finished tasks."""
        return len(self.state["accuracy"])

    def finish(self) -> dict[str, Any]:
        """Train what is left and return what the results file holds.

        Raises:
            ExperimentError: the folder holds a run of this name with other settings, or the loss is not finite.
        """
        return self.run(resume=True)

    def _begin(self, resumed: bool = False) -> None:
        """Nothing comes before the first task."""

    def _identity(self) -> dict[str, Any]:
        return {
            "table": self.protocol.name,
            "method": self.method.name,
            "seed": self.seed,
            "evaluated_on": self.part,
            "settings": {
                **self.protocol.settings(),
                "rate": self.method.rate_in(self.protocol),
                "base": self.method.base,
                "project": self.method.project_in(self.protocol),
            },
        }

    def _one_task(self, task: int) -> None:
        started = time.perf_counter()
        data, validation = self.tasks.part(task, "train"), self.tasks.part(task, "validation")
        self.optimizer.state.clear()
        self.method.set_rates(self.optimizer, self.protocol, task)
        drawn = np.random.RandomState([self.seed, task]).permutation(len(data[1]))[: self.protocol.samples]
        samples = data[0][drawn], data[1][drawn]
        first = order_of(self.seed, task, 0, len(data[1]))[: self.protocol.batch]
        self.session.begin(task, (data[0][first], data[1][first]), samples)
        losses = train(
            self.model, self.optimizer, data, validation, self.protocol, task, self.seed, self.session.penalty
        )
        self.session.end()
        self._protect(task, samples[0])
        row = [self._score(i) for i in range(task + 1)]
        self.state["accuracy"].append([round(value, 4) for value in row])
        self.state["losses"].append([round(loss, 5) for loss in losses])
        self.state["seconds"] += time.perf_counter() - started
        tqdm.write(
            f"{self.method.name}, seed {self.seed}: task {task + 1}/{self.protocol.tasks}, {len(losses)} epochs, loss "
            f"{losses[-1]:.3f}, accuracy {row[-1]:.2f}, mean so far {np.mean(row):.2f}, {self.state['seconds']:.0f} s"
        )
        self._save()

    def _score(self, task: int) -> float:
        with self.session.scoring(task):
            return accuracy(self.model, self.tasks.part(task, self.part), self.protocol.test_batch, task)

    def _protect(self, task: int, samples: Tensor) -> None:
        """Protect the inputs that a random draw of training images gives."""
        if not isinstance(self.optimizer, NullSpaceOptimizer):
            return
        self.model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NullSpaceWarning)  # nearly full layers: the ranks are in the results
            self.optimizer.consolidate(
                [samples], name=f"task {task + 1}", forward=lambda images: self.model(images, task), progress=False
            )
        self.session.protected()
        self.state["ranks"].append({name: basis.rank for name, basis in self.optimizer.bases.items() if basis.rank})

    def _results(self) -> dict[str, Any]:
        tasks = self.protocol.tasks
        matrix = np.full((tasks, tasks), np.nan)
        for row, values in enumerate(self.state["accuracy"]):
            matrix[row, : row + 1] = values
        return {
            **self._identity(),
            "ACC": round(last(matrix).value, 4),
            "BWT": round(backward_transfer(matrix).value, 4) if tasks > 1 else None,
            "policy": repr(self.method.rule(self.protocol)) if self.method.policy else None,
            **self.state,
            "seconds": round(self.state["seconds"], 1),
            "torch": torch.__version__,
            "nullspace_optim": nullspace_optim.__version__,
            "machine": machine(),
            **self.made,
        }

    def _state(self) -> dict[str, Any]:
        return {
            "state": json.dumps(self.state),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "session": self.session.state(),
        }

    def _take_up(self, state: dict[str, Any]) -> None:
        self.state = json.loads(state["state"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.restore(state["model"], state["session"])
        self.model.load_state_dict(state["model"])

    def _checked(self, saved: dict[str, Any], path: Path) -> dict[str, Any]:
        """`saved`, if its settings are those of this run."""
        wanted = json.loads(json.dumps(self._identity()))
        old, new = ({**part["settings"], **part, "settings": None} for part in (saved, wanted))
        for key in {*new, *(old.keys() & vars(self.protocol).keys())}:
            if old.get(key) != new.get(key):
                raise ExperimentError(
                    f"{path} was made with {key}={old.get(key)!r}, this run has {new.get(key)!r}; "
                    "choose another --output or remove that file"
                )
        return saved
