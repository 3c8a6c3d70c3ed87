"""`ConsolidatePlugin` for Avalanche: every training experience is a task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from ..model.batches import Forward, feeder
from .callback import TaskCallback
from .unwrap import unwrap

if TYPE_CHECKING:
    SupervisedPlugin = object
    avalanche_forward: Any = None
else:
    try:
        from avalanche.core import SupervisedPlugin
        from avalanche.models import avalanche_forward
    except ImportError as error:
        raise ImportError("this plugin needs Avalanche: pip install avalanche-lib") from error


class ConsolidatePlugin(TaskCallback, SupervisedPlugin):
    """Consolidate at the end of every training experience, and keep the bases if the strategy makes a new optimizer.

    Give the strategy a `NullSpaceOptimizer`. Heads that are added or grow are followed. What is consolidated is the
    experience's own data, without training transforms and without what other plugins (replay) have mixed in.

    The options are those of `TaskCallback`: `loader`, `forward`, `name`, `path`, `max_batches`, `progress`.

    Raises:
        OptionError: an option has a wrong value, or the strategy's optimizer is no `NullSpaceOptimizer`.
        ImportError: Avalanche is not installed (on import).
    """

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Hand the bases of an earlier optimizer on to a new one."""
        self._tasks.begin(unwrap(strategy.optimizer))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Consolidate the experience."""
        forward = self._tasks.options.forward
        self._tasks.end(unwrap(strategy.optimizer), _batches(strategy), _forward(strategy, forward))


def _batches(strategy: Any) -> Iterable[Any]:
    """Return the data of the experience in its order, with the transforms of evaluation."""
    data = strategy.experience.dataset.eval()
    return DataLoader(data, batch_size=strategy.eval_mb_size, collate_fn=getattr(data, "collate_fn", None))


def _forward(strategy: Any, forward: Forward | None) -> Forward:
    """Return a forward that runs a batch as the strategy does: on its device, with labels of tasks if it has them."""
    labelled = hasattr(strategy.experience, "task_labels")
    own = None if forward is None else feeder(strategy.model, forward)

    def see(batch: Any) -> Any:
        batch = [part.to(strategy.device) if isinstance(part, torch.Tensor) else part for part in batch]
        if own is not None:
            return own(batch)
        return avalanche_forward(strategy.model, batch[0], batch[-1]) if labelled else strategy.model(batch[0])

    return see
