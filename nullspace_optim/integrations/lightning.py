"""`ConsolidateCallback` for Lightning, under either of its names (`lightning` and `pytorch_lightning`)."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError
from ..model.batches import Forward, feeder
from ..report import ConsolidationReport
from .callback import TaskCallback
from .metrics import metrics
from .unwrap import unwrap

NAMES = ("lightning.pytorch", "pytorch_lightning")
AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}  # callbacks that exchange the weights when training ends


def _callback() -> type[Any]:
    """Return the `Callback` of the Lightning that is in use, or that can be imported (their hooks are the same)."""
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            found: type[Any] = importlib.import_module(name).Callback
            return found
        except ImportError:
            continue
    raise ImportError("this callback needs Lightning: pip install lightning")


if TYPE_CHECKING:
    Callback = object
else:
    Callback = _callback()


class ConsolidateCallback(TaskCallback, Callback):
    """Consolidate at the end of every `trainer.fit`, and keep the bases if the next fit makes a new optimizer.

    One fit is one task. `configure_optimizers` must return a `NullSpaceOptimizer` (with others beside it if there are
    several). Checkpoints carry the bases of all earlier tasks in the optimizer's state; the task itself is consolidated
    when its training has ended, so call `trainer.save_checkpoint` after `fit`, or give `path`. The trainer's loggers
    get the figures of `integrations.metrics` after each epoch and each consolidation.

    The options are those of `TaskCallback`: `loader`, `forward`, `name`, `path`, `max_batches`, `progress`.

    Raises:
        OptionError: an option has a wrong value.
        ImportError: Lightning is not installed (on import).
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hand the bases of an earlier fit on to a new optimizer (a checkpoint that is resumed overrides them).

        Raises:
            OptionError: a callback that comes later would exchange the weights after they were consolidated.
        """
        later = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        for other in later:
            if AVERAGING & {kind.__name__ for kind in type(other).__mro__}:
                raise OptionError(
                    f"{type(other).__name__} exchanges the weights after {type(self).__name__} has consolidated: "
                    "put this callback after it, callbacks=[averaging, consolidate]"
                )
        self._tasks.begin(_optimizer(trainer))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Let a validation see exact weights: it need not call the module's own forward."""
        if trainer.optimizers:
            _optimizer(trainer)._core.protection.make_exact()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how much is free, and that what is kept has not moved."""
        if trainer.loggers and _optimizer(trainer)._core.store.tasks:
            _log(trainer, None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Consolidate the task and log what that took."""
        forward = _forward(trainer, pl_module, self._tasks.options.forward)
        report = self._tasks.end(_optimizer(trainer), trainer.train_dataloader, forward)
        if trainer.loggers:
            _log(trainer, report)


def _log(trainer: Any, report: ConsolidationReport | None) -> None:
    values = metrics(_optimizer(trainer), report)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def _optimizer(trainer: Any) -> Any:
    """Return the trainer's one `NullSpaceOptimizer`.

    Raises:
        OptionError: there is none, or more than one.
    """
    found = []
    for optimizer in trainer.optimizers:
        try:
            found.append(unwrap(optimizer))
        except OptionError:
            continue
    if len(found) != 1:
        raise OptionError(
            f"configure_optimizers gave {len(found)} NullSpaceOptimizers: expected one, which takes a list of bases"
        )
    return found[0]


def _forward(trainer: Any, module: Any, forward: Forward | None) -> Forward:
    """Return a forward that sees batches as the module's steps do: on its device, in the dtype of its parameters.

    Autocast is off, so that float32 weights keep what float32 inputs met, not their rounded values.
    """
    if forward is None and type(module).forward in _unimplemented():
        raise OptionError(
            f"{type(module).__name__} has no forward(): pass ConsolidateCallback(forward=...), a callable that takes a "
            "batch and runs the model, such as lambda batch: module.net(batch[0])"
        )
    run = feeder(module, forward)
    plugin = trainer.precision_plugin

    def see(batch: Any) -> Any:
        batch = plugin.convert_input(trainer.strategy.batch_to_device(batch))
        with plugin.forward_context(), torch.autocast(module.device.type, enabled=False):
            return run(batch)

    restart = getattr(forward, "restart", None)
    if restart is not None:
        see.restart = restart  # type: ignore[attr-defined]
    return see


def _unimplemented() -> set[Any]:
    return {sys.modules[name].LightningModule.forward for name in NAMES if name in sys.modules}
