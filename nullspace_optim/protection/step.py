"""One step of a base between its two hooks: what it may move, how that is corrected, how it ends if it was cut short.

A step is atomic. Everything that a correction needs is kept in anchors, so a step that ended early (an interrupt, no
memory, an error in a closure or in a hook of somebody else) is finished by the anchor form: kept directions, frozen
parameters and copies are as if the step had been corrected. The difference form does not need the weights of before
then. Where a side is kept by part, no share of the movement is let through that was not written into the anchor yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from warnings import warn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import NullSpaceWarning
from ..settings import Settings
from .averaged_weights import state_keys
from .edits import ROUNDED
from .guard import Guard, Workspace, size_of
from .weight_stack import GradientQueue, stack_alike

UNMOVED = 1e-6  # relative change of what is kept that rounding of a product explains
LEAST_FREE = 0.03  # of the norms of gradients; measured: at 0.02 a language model learned nothing, at 0.06 half

_HABITS: MutableMapping[type[Optimizer], tuple[bool, bool]] = WeakKeyDictionary()


@dataclass(eq=False)
class Step:
    """A step of `base` that has begun: the guards it may move, and what was found before.

    `touched` are the tensors with a gradient, `idle` those with a learning rate of zero (by identity), `accepted` the
    guards that were written to since the step before, within rounding; `copies` are tensors that must not move, with
    their values. `evaluating` is true while a closure runs, `failed` after one that raised an error;
    `phases` are the parts of a step that the base has called in it (see `phases`).
    """

    base: weakref.ref[Optimizer]
    guards: list[Guard]
    foreign: bool
    second_weights: bool
    idle: set[int]
    touched: set[int] = field(default_factory=set)
    accepted: set[int] = field(default_factory=set)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    evaluating: bool = False
    failed: bool = False
    phases: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, base: Optimizer, guards: list[Guard]) -> Step:
        """Return a step of `base` before it moves anything."""
        return cls(weakref.ref(base), guards, *_habits(base), _idle(base))

    def moved(self, guard: Guard) -> bool:
        """True if the base may have moved `guard`: conservative, without waiting for the device."""
        touched = not guard.immovable and any(id(p) in self.touched for p in guard.members)
        return touched or self.wrote(guard)

    def wrote(self, guard: Guard) -> bool:
        """True if `guard` was written to as far as marks tell, which some bases do not leave."""
        return self.foreign or guard.edited or id(guard) in self.accepted

    def unmoved(self, guard: Guard) -> bool:
        """True if `guard` stands still at a learning rate of zero, bit for bit."""
        return id(guard.parameter) in self.idle and bool(guard.previous) and guard.unmoved

    def restore_copies(self) -> None:
        """Give tensors that must not move their values back."""
        for parameter, value in self.copies:
            parameter.detach().copy_(value)
        self.copies = []

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Mark the step as one that goes on, while its closure runs."""
        self.evaluating = True
        try:
            yield
        except BaseException:
            self.failed = True
            raise
        finally:
            self.evaluating = False

    def _stands(self, guard: Guard) -> bool:
        """True if a guard that left no mark keeps everything within rounding (waits for the device).

        Never of what is kept bit for bit, a frozen value or rows: that is copied back, which changes nothing else.
        """
        marked = guard.edited or id(guard) in self.accepted or guard.pending or bool(guard.across)
        if marked or guard.frozen or "rows" in guard.basis.subspaces:
            return False
        return guard.drift() <= ROUNDED.get(guard.parameter.dtype, UNMOVED)

    def touch(self) -> None:
        """Note the tensors that the base may move because they have a gradient."""
        self.touched |= {id(p) for guard in self.guards for p in guard.members if p.grad is not None}

    def finish(self, *, update: bool) -> int:
        """Put everything back that is kept, by its anchor; return how many parameters may have been written to.

        What the base has not moved yet stays bit for bit. With ``update=False`` (``project="gradient"``) only
        frozen parameters are put back. Sides that cross ranks are left to the next sum over ranks.
        """
        written = sum(self.wrote(guard) for guard in self.guards)
        for guard in self.guards:
            if self.wrote(guard) and (update or guard.frozen) and not self._stands(guard):
                guard.correct()
                guard.pending, guard.behind = False, bool(guard.across)
            guard.mark()
        self.restore_copies()
        return written


class Forms:
    """How guards are corrected, decided once: together in `stacks`, in the difference form, across ranks."""

    def __init__(self, guards: Iterable[Guard], options: Settings, workspace: Workspace) -> None:
        moving = [guard for guard in guards if not guard.frozen and options.project != "gradient"]
        self.stacks = stack_alike(moving, workspace)
        self.queue = GradientQueue(self.stacks)
        self.stacked = self.queue.stacked
        alone = [guard for guard in moving if id(guard) not in self.stacked and guard.bias is None]
        self.by_difference = {id(guard) for guard in alone if guard.wants_difference(options.precision)}
        self.crossing = any(guard.across for guard in moving)

    def uses_difference(self, guard: Guard, step: Step) -> bool:
        """True where only the movement is projected; not after an edit, as in each step of SAM by hand: what is owed
        must not add up.
        """
        return id(guard) in self.by_difference and not step.second_weights and id(guard) not in step.accepted


def free_share(guards: Iterable[Guard], parameters: Iterable[Tensor]) -> float | None:
    """Return the share of the gradients of `parameters` that `guards` leave in free directions, by norms.

    `None` while there are no gradients, only zeros, or an overflow. NaN if a part of them cannot be measured here: a
    sparse gradient, a side that crosses ranks.
    """
    guards = [guard for guard in guards if guard.parameter.grad is not None]
    if not guards:
        return None
    if any(guard.across or guard.parameter.grad.layout != torch.strided for guard in guards):  # type: ignore[union-attr]
        return float("nan")
    pairs = [_norms(guard) for guard in guards]
    guarded = {id(member) for guard in guards for member in guard.members}
    others = [p.grad for p in parameters if id(p) not in guarded and p.grad is not None]
    free = [size_of(gradient) for gradient in others if gradient.layout == torch.strided]
    whole, inside = (float(torch.stack([norm.double().cpu() for norm in [*part, *free]]).sum()) for part in zip(*pairs))
    if not 0 < whole < float("inf"):
        return None
    for guard in guards:
        guard.norms, guard.measured = None, True
    return inside / whole


class FreeShare:
    """One line after a consolidation if hardly anything of a new task's gradients lies in free directions."""

    def __init__(self) -> None:
        self.tasks, self._told = 0, 0  # consolidated so far, and when it was measured last

    def tell(self, guards: Iterable[Guard], base: Optimizer | None) -> None:
        """Warn if little is free of the gradients that `base` is about to take, where that is not known yet."""
        if self._told == self.tasks or base is None:
            return
        share = free_share(guards, (p for group in base.param_groups for p in group["params"]))
        if share is None:
            return
        self._told = self.tasks
        if share < LEAST_FREE:
            warn(
                f"only {share:.1%} of the new task's gradient lies in free directions: it will hardly be learned, or "
                "at the price of the old ones, which have the same inputs. Keep less of those (Energy(0.8) or lower) "
                'and raise the learning rate, release() a weight, or see "When it pays" in the guide',
                NullSpaceWarning,
                stacklevel=6,
            )


def _norms(guard: Guard) -> tuple[Tensor, Tensor]:
    """Return the norms of a gradient and of its free part."""
    gradient = guard.parameter.grad
    assert gradient is not None
    if guard.norms is not None:
        return guard.norms
    beside = guard.bias.grad if guard.bias is not None else None
    free, made = gradient.clone(), dict(guard.complements)
    kept = None if beside is None else beside.clone()
    if guard.immovable:
        free.zero_()
    else:
        guard.project_gradient(free)
    guard.complements = made  # what the step itself has no use for is not kept
    if beside is not None and kept is not None:  # a joint bias was projected in place
        beside.copy_(kept)
    return size_of(gradient), size_of(free)


def announce_finished(base: Optimizer | None, written: int) -> None:
    """Warn that a step of `base` was finished after others may have written to the same parameters."""
    warn(
        f"a step of {'an optimizer' if base is None else type(base).__name__} ended before its correction (an error or "
        f"an interrupt): what {written} parameters keep was put back now. If you have changed weights on purpose "
        "since, do so again and call opt.reanchor()",
        NullSpaceWarning,
        stacklevel=3,
    )


def closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """Return the closure among the arguments of `step(self, closure=None)`."""
    found: Callable[[], Any] | None = kwargs["closure"] if "closure" in kwargs else (*args, None, None)[1]
    return found


def replace_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]) -> Any:
    """Return the arguments of `step` with another closure."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def is_zero(rate: Any) -> bool:
    """True for a learning rate of exactly zero that can be read without a device synchronisation."""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and float(rate) == 0.0
    return isinstance(rate, (int, float)) and rate == 0


def _habits(base: Optimizer) -> tuple[bool, bool]:
    """Return whether `base` may write through `p.data`, which leaves no mark on the parameter, and whether it keeps
    other sets of weights in its state. Both are a matter of its class.
    """
    kind = type(base)
    if kind not in _HABITS:
        _HABITS[kind] = not kind.__module__.startswith("torch.optim"), bool(state_keys(base))
    return _HABITS[kind]


def _idle(base: Optimizer) -> set[int]:
    """Return the ids of the parameters whose learning rate is zero: most optimizers do not move those (Rprop does)."""
    return {id(p) for group in base.param_groups if is_zero(group.get("lr")) for p in group["params"]}
