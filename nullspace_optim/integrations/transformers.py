"""`NullSpaceCallback` for the Hugging Face `Trainer` and its subclasses (TRL, sentence-transformers, axolotl)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..model.batches import Forward
from ..optimizer.optimizer import NullSpaceOptimizer
from ..report import ConsolidationReport
from ..settings import Settings
from .callback import TaskCallback
from .metrics import metrics
from .pool import batches_of
from .unwrap import unwrap

if TYPE_CHECKING:
    Trainer: Any = object
    TrainerCallback = object
else:
    try:
        from transformers import Trainer, TrainerCallback
    except ImportError as error:
        raise ImportError("this callback needs transformers: pip install 'transformers[torch]'") from error

POOL = "pool"


class NullSpaceCallback(TaskCallback, TrainerCallback):
    """Keep what a model knows while a `Trainer` trains it: `Trainer(..., callbacks=[NullSpaceCallback(pool)])`.

    The trainer's own optimizer, whatever made it, is wrapped into a `NullSpaceOptimizer`; one that is wrapped already
    is used as it is. One `train()` is one task: its checkpoints (`optimizer.pt`) carry the bases of all tasks before
    it, and it is consolidated itself when it has ended, with the best weights if the trainer loads them. The same
    callback serves the trainers of several tasks, one after the other.

    Free directions, frozen numbers, drift and what is kept of earlier tasks are logged by the trainer (see `metrics`).

    Args:
        consolidate_before: data that shows what must be kept, consolidated before the first step as task ``"pool"``:
            a data set (the trainer's own collator makes batches of it; texts are tokenized) or a loader of batches.
        consolidate_after: whether to consolidate the task when its training has ended; data in the place of the
            trainer's training data.
        forward: `forward(batch)` runs the model, where the default reading of a batch does not fit.
        name: the task's name.
        bases: basis file of earlier tasks to begin with.
        path: basis file to write after each consolidation.
        max_batches: stop each consolidation after so many batches.
        progress: show a progress bar.
        options: `policy`, `project` and the other options of `NullSpaceOptimizer`, for the wrapper made here.

    Raises:
        OptionError: an option has a wrong value.
        ImportError: transformers is not installed (on import).
    """

    def __init__(
        self,
        consolidate_before: Any = None,
        consolidate_after: Any = True,
        *,
        forward: Forward | None = None,
        name: str | None = None,
        bases: str | PathLike[str] | None = None,
        path: str | PathLike[str] | None = None,
        max_batches: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(forward=forward, name=name, path=path, max_batches=max_batches, progress=progress)
        if unknown := sorted(set(options) - set(Settings.__dataclass_fields__)):
            raise OptionError(
                f"NullSpaceCallback({unknown[0]}=): expected one of {', '.join(Settings.__dataclass_fields__)}; an "
                "optimizer with a mode is made by hand, Trainer(optimizers=(NullSpaceOptimizer(...), None))"
            )
        Settings(**options)
        self._before, self._after = consolidate_before, consolidate_after
        self._bases, self._options = bases, options
        self._trainer: Callable[[], Any] = lambda: None
        self._optimizer: NullSpaceOptimizer | None = None
        self._pool = ""

    def attach(self, trainer: Any) -> None:
        """Let `trainer` wrap the optimizer it makes; needed only where the callback is added to a trainer that exists.

        Raises:
            OptionError: another `NullSpaceCallback` is there, or DeepSpeed shards the optimizer.
        """
        handler = trainer.callback_handler
        if [type(c) for c in handler.callbacks if isinstance(c, NullSpaceCallback) and c is not self]:
            raise OptionError("there are two NullSpaceCallbacks in this trainer: one does both, before and after")
        _refuse_deepspeed(trainer)
        if self._trainer() is trainer:
            return
        self._trainer, make = weakref.ref(trainer), trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            trainer.optimizer = self._wrap(made if trainer.optimizer is None else trainer.optimizer, trainer.model)
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer
        handler.callbacks = _before_reporters(self, handler.callbacks)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the trainer that was just made."""
        self.attach(_running_trainer())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Consolidate the pool, after the bases of earlier tasks are there (those of a checkpoint are already).

        Raises:
            OptionError: the trainer has put another optimizer into the place of the wrapped one.
            NullSpaceError: what `NullSpaceOptimizer.consolidate` and `load` raise.
        """
        trainer = _running_trainer()
        self.attach(trainer)
        optimizer = self._optimizer = _ours(trainer) or self._wrap_late(trainer)
        if not state.is_hyper_param_search:
            self._tasks.begin(optimizer)
        optimizer._core.trainable()  # what cannot be protected is refused now, not after hours
        if self._bases is not None and not optimizer._core.store.tasks:
            optimizer.load(self._bases)
        if self._before is None:
            return
        if optimizer._core.mode is not None:
            raise OptionError(
                "consolidate_before= keeps directions of weights that are trained, but this optimizer has a mode: its "
                "experts stand beside weights that do not move, which keep what they knew without it; leave it out"
            )
        known = {str(task["name"]) for task in optimizer._core.store.tasks}
        resumed = state.global_step > 0
        if self._pool in known or (resumed and POOL in known):
            return
        self._pool = next(name for name in _pool_names() if name not in known)
        pool = batches_of(trainer, self._before)
        self._log(self._tasks.consolidate(optimizer, pool, self._pool, self._forward(pool)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train with an optimizer that is not the wrapped one."""
        self._check()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log how much is free, and that what is kept has not moved."""
        if self._check()._core.store.tasks:
            self._log(None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Consolidate the task."""
        optimizer, after = self._check(), self._after
        if after is False or after is None:
            return
        data = kwargs["train_dataloader"] if after is True else batches_of(self._trainer(), after)
        self._log(self._tasks.end(optimizer, data, self._forward(data)))

    def _forward(self, data: Any) -> Forward | None:
        return self._tasks.options.forward or getattr(data, "forward", None)

    def _wrap(self, optimizer: Any, model: Any) -> Any:
        """Return `optimizer` wrapped, or as it is where it holds a wrapper.

        Raises:
            OptionError: options were given for a wrapper that was made elsewhere.
        """
        try:
            ours = unwrap(optimizer)
        except OptionError:
            return NullSpaceOptimizer(optimizer, model, **self._options)
        if self._options and ours is not self._optimizer:
            raise OptionError(
                f"NullSpaceCallback({', '.join(self._options)}=) has no effect on the NullSpaceOptimizer that this "
                "trainer was given: give the options to that one, or let the trainer make its own optimizer"
            )
        return optimizer

    def _wrap_late(self, trainer: Any) -> NullSpaceOptimizer:
        """Wrap the optimizer inside what the trainer has prepared; its scheduler shares the parameter groups."""
        if trainer.state.global_step > 0:
            raise OptionError(
                f"this {type(trainer).__name__} has loaded a checkpoint into an optimizer that was not wrapped, so "
                "bases in it were not read: pass the callback in callbacks=[...], or call callback.attach(trainer) "
                "before train()"
            )
        holder = trainer.optimizer
        if "optimizer" not in vars(holder):
            trainer.optimizer = trainer.callback_handler.optimizer = self._wrap(holder, trainer.model)
            return unwrap(trainer.optimizer)
        while "optimizer" in vars(holder.optimizer):
            holder = holder.optimizer
        holder.optimizer = self._wrap(holder.optimizer, trainer.model)
        return unwrap(holder)

    def _check(self) -> NullSpaceOptimizer:
        """Return the optimizer of this run.

        Raises:
            OptionError: the trainer has another one now.
        """
        trainer = self._trainer()
        if trainer is None or self._optimizer is None or _ours(trainer) is not self._optimizer:
            raise OptionError(
                f"this {type(trainer).__name__} has replaced or unwrapped its optimizer since its training began, so "
                "nothing would be kept: make the optimizer in create_optimizer(), and leave it in trainer.optimizer"
            )
        return self._optimizer

    def _log(self, report: ConsolidationReport | None) -> None:
        trainer = self._trainer()
        owed = trainer.control.should_log  # logging would count as the trainer's own
        Trainer.log(trainer, metrics(self._optimizer, report))  # those of TRL would give up their own averages for it
        trainer.control.should_log = owed


def _pool_names() -> Iterator[str]:
    yield POOL
    yield from (f"{POOL} {number}" for number in count(2))


def _running_trainer() -> Any:
    """Return the trainer whose method is running: transformers hands callbacks everything but the trainer.

    Raises:
        OptionError: there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise OptionError("NullSpaceCallback works in a transformers.Trainer: pass it in callbacks=[...]")


def _ours(trainer: Any) -> NullSpaceOptimizer | None:
    try:
        return unwrap(trainer.optimizer)
    except OptionError:
        return None


def _before_reporters(callback: Any, callbacks: list[Any]) -> list[Any]:
    """Return `callbacks` with those that report to loggers behind `callback`: they end their run with the training."""
    place = callbacks.index(callback)
    reporters = [c for c in callbacks[:place] if type(c).__module__.startswith("transformers.integrations")]
    return [*(c for c in callbacks[:place] if c not in reporters), callback, *reporters, *callbacks[place + 1 :]]


def _refuse_deepspeed(trainer: Any) -> None:
    """Refuse DeepSpeed ZeRO before a model is trained.

    Raises:
        OptionError: names the engine and the way out.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage != 0:
        raise OptionError(
            f"DeepSpeed ZeRO stage {plugin.zero_stage} flattens matrices, which then cannot be corrected: use ZeRO "
            "stage 0, or FSDP2, TrainingArguments(fsdp=True)"
        )
