"""`ConsolidateCallback` for the Hugging Face `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .callback import TaskCallback
from .unwrap import unwrap

if TYPE_CHECKING:
    TrainerCallback = object
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("this callback needs transformers: pip install 'transformers[torch]'") from error


class ConsolidateCallback(TaskCallback, TrainerCallback):
    """Consolidate at the end of every `Trainer.train()`, and keep the bases if the next trainer has a new optimizer.

    One `train()` is one task. Give the trainer a `NullSpaceOptimizer`: `Trainer(..., optimizers=(opt, None))`. Its
    checkpoints carry the bases of all earlier tasks in `optimizer.pt`; the task itself is consolidated when its
    training has ended, so give `path` to write the bases then.

    The options are those of `TaskCallback`: `loader`, `forward`, `name`, `path`, `max_batches`, `progress`.

    Raises:
        OptionError: an option has a wrong value, or the trainer's optimizer is no `NullSpaceOptimizer`.
        ImportError: transformers is not installed (on import).
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the bases of an earlier run on to a new optimizer (a checkpoint that is resumed goes first)."""
        self._tasks.begin(unwrap(kwargs["optimizer"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Consolidate the task."""
        self._tasks.end(unwrap(kwargs["optimizer"]), kwargs["train_dataloader"], self._tasks.options.forward)
