"""What a callback does at both ends of a task, whatever the framework is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ..errors import OptionError
from ..model.batches import Forward
from ..optimizer.optimizer import NullSpaceOptimizer
from ..report import ConsolidationReport


@dataclass(frozen=True)
class TaskOptions:
    """How a callback consolidates (see `NullSpaceOptimizer.consolidate`); `path` names the basis file to write."""

    loader: Iterable[Any] | None = None
    forward: Forward | None = None
    name: str | None = None
    path: str | PathLike[str] | None = None
    max_batches: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.forward is not None and not callable(self.forward):
            raise OptionError(f"forward={self.forward!r}: expected a callable that takes a batch and runs the model")
        if self.max_batches is not None and self.max_batches < 1:
            raise OptionError(f"max_batches={self.max_batches}: expected at least 1")


class Tasks:
    """The tasks that one callback has consolidated, over any number of runs of a trainer."""

    def __init__(self, options: TaskOptions) -> None:
        self.options = options
        self.reports: list[ConsolidationReport] = []
        self._previous: NullSpaceOptimizer | None = None

    def begin(self, optimizer: NullSpaceOptimizer) -> None:
        """Hand the bases of the previous run on, if this one began with a new optimizer.

        Raises:
            OptionError: the optimizer before had a mode (iGSP), whose experts belong to it.
        """
        before = self._previous
        if before is None or before is optimizer or optimizer._core.store.tasks:
            return
        if before._core.mode is not None:
            raise OptionError(
                "each run made a new optimizer, but the experts of the mode belong to the old one: create the "
                "NullSpaceOptimizer once and return the same object for every task"
            )
        before.detach()
        optimizer._core.adopt(before._core.store.copy())

    def end(self, optimizer: NullSpaceOptimizer, loader: Iterable[Any], forward: Forward | None) -> ConsolidationReport:
        """Consolidate the task that has just been trained and, if asked, write the bases.

        Raises:
            NullSpaceError: what `NullSpaceOptimizer.consolidate` and `save` raise.
        """
        given = self.options.loader
        return self.consolidate(optimizer, loader if given is None else given, self.options.name, forward)

    def consolidate(
        self, optimizer: NullSpaceOptimizer, loader: Iterable[Any], name: str | None, forward: Forward | None
    ) -> ConsolidationReport:
        """Consolidate `loader` as task `name` and, if asked, write the bases.

        Raises:
            NullSpaceError: what `NullSpaceOptimizer.consolidate` and `save` raise.
        """
        chosen = self.options
        report = optimizer.consolidate(
            loader,
            name=name,
            forward=forward,
            max_batches=chosen.max_batches,
            progress=chosen.progress,
        )
        self._previous = optimizer
        self.reports.append(report)
        if chosen.path is not None:
            optimizer.save(chosen.path)
        return report


class TaskCallback:
    """What the callbacks of all frameworks have in common: their options and their reports.

    Args:
        loader: batches of the task; the trainer's own training loader by default.
        forward: `forward(batch)` runs the model, where the default reading of a batch does not fit.
        name: the task's name.
        path: write the bases to this file after each task.
        max_batches: stop after so many batches.
        progress: show a progress bar.

    Raises:
        OptionError: an option has a wrong value.
    """

    def __init__(
        self,
        loader: Iterable[Any] | None = None,
        *,
        forward: Forward | None = None,
        name: str | None = None,
        path: str | PathLike[str] | None = None,
        max_batches: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self._tasks = Tasks(TaskOptions(loader, forward, name, path, max_batches, progress))

    @property
    def reports(self) -> list[ConsolidationReport]:
        """The `ConsolidationReport` of every task so far."""
        return self._tasks.reports
