"""`ConsolidateCallback` for the Hugging Face `Trainer`."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..discovery import Forward
from .task import TaskOptions, Tasks
from .unwrapping import unwrap

if TYPE_CHECKING:
    TrainerCallback = object
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("this callback needs transformers: pip install 'transformers[torch]'") from error


class ConsolidateCallback(TrainerCallback):
    """Consolidate at the end of every `Trainer.train()`, and keep the bases if the next trainer has a new optimizer.

    One `train()` is one task. Give the trainer a `NullSpaceOptimizer`: `Trainer(..., optimizers=(opt, None))`. Its
    checkpoints carry the bases of all earlier tasks in `optimizer.pt`; the task itself is consolidated when its
    training has ended, so give `path` to write the bases then.

    Args:
        loader: batches of the task; the trainer's own training loader by default.
        forward: `forward(batch)` runs the model if the keys of a batch are not what its forward accepts.
        name: the task's name.
        path: write the bases to this file after each task.
        max_batches: stop after so many batches.
        progress: show a progress bar.

    Raises:
        OptionError: an option has a wrong value, or the trainer's optimizer is no `NullSpaceOptimizer`.
        ImportError: transformers is not installed (on import).
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
        self._tasks = Tasks(TaskOptions(loader, forward, name, path, max_batches, progress))

    @property
    def reports(self) -> list[Any]:
        """The `ConsolidationReport` of every task so far."""
        return self._tasks.reports

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the bases of an earlier run on to a new optimizer (a checkpoint that is resumed goes first)."""
        self._tasks.begin(unwrap(kwargs["optimizer"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Consolidate the task."""
        self._tasks.end(unwrap(kwargs["optimizer"]), kwargs["train_dataloader"], self._tasks.options.forward)
