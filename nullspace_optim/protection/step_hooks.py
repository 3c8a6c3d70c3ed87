"""What happens around one base step: hide frozen gradients, let the base move, put the kept directions back.

`Protection` owns one `Guard` a parameter. Its two hooks run before and after `step` of every wrapped optimizer, so
that `opt.step()`, `base.step()` and `scaler.step(base)` are protected alike. No host synchronisation happens in a
step unless a weight was edited outside the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..distributed.failures import raise_on_all_ranks
from ..distributed.group import local_tensor
from ..errors import StaleAnchorError
from ..settings import Settings
from ..subspace.basis import BasisStore
from ..subspace.growth import check_shapes
from ..subspace.projection import exact_products
from .averaged_weights import second_weights, state_keys
from .growth_notes import GrowthNotes, refuse_growth
from .guard import Guard, guard_low_precision
from .sharded import correct_across, drifts
from .workspace import Workspace

EXACT_EVERY = 16
STALE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-8}

FUSED = (
    "It was the original of a parametrization; if that was removed, the original is gone and the fused weight is a "
    "new weight. "
)


class Protection:
    """All guards of one optimizer and the hooks that run them.

    `held` are parameters that a mode keeps as they are, without a basis; `amend` is called when all gradients of a step
    are there, before any is hidden.
    """

    def __init__(self, options: Settings) -> None:
        self.options = options
        self.guards: dict[str, Guard] = {}
        self.workspace = Workspace()
        self.inexact_steps = 0
        self.held: list[Tensor] = []
        self.originals: set[str] = set()
        self.amend: Callable[[], None] = lambda: None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._touched: set[int] = set()
        self._idle: set[int] = set()
        self._stepping: dict[int, list[Guard]] = {}
        self._second_weights = False
        self._handles: list[Any] = []
        self._paused = False
        self._growth = GrowthNotes()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let bases step without protection, for a step that moves nothing."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def rebuild(self, store: BasisStore, parameters: Mapping[str, Tensor]) -> None:
        """Make guards for every parameter of `store` that is kept in any way; a basis that stays keeps what it owes."""
        self.release_gradient_hooks()
        before, self.guards = self.guards, {}
        self.workspace = Workspace()
        self._stepping.clear()
        for name, basis in store.items():
            if basis.kept is None and not basis.subspaces:
                continue
            bias = parameters[basis.bias] if basis.bias else None
            guard = self.guards[name] = Guard(parameters[name], basis, bias, self.workspace)
            guard.mark()
            if name in before and before[name].stored is basis:
                guard.seen, guard.pending = before[name].seen, before[name].pending
        if not any(guard.pending for guard in self.guards.values()):
            self.inexact_steps = 0
        if self.options.project == "both":
            self._handles = [
                guard.parameter.register_post_accumulate_grad_hook(_accumulated(guard))  # type: ignore[no-untyped-call]
                for guard in self.guards.values()
                if not guard.immovable and guard.bias is None and guard.parameter.requires_grad
            ]

    def mark(self) -> None:
        """Take the parameters as they are now for our own work."""
        for guard in self.guards.values():
            guard.mark()

    def release_gradient_hooks(self) -> None:
        """Remove the accumulation hooks of ``project="both"``."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def before_step(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step pre-hook of a base: refuse stale anchors, hide frozen gradients, take what the difference form needs."""
        if self._paused:
            return None
        self.put_back()
        mine = self._stepping[id(base)] = self._guards_of(base)
        for guard in mine:
            if guard.edited:
                self._refuse_edit(guard)
        self._growth.announce()
        closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
        if closure is not None:
            wrapped = self._guarded_closure(closure, mine, isinstance(base, LBFGS))
            if "closure" in kwargs:
                kwargs = {**kwargs, "closure": wrapped}
            else:
                args = (args[0], wrapped, *args[2:])
        self._touched = _with_gradient(mine) if closure is None else set()
        if self.held and not _marks_writes(base):
            self._copies = [(parameter, parameter.detach().clone()) for parameter in self.held]
        if closure is None:
            self._prepare(mine, project=self.options.project == "gradient")
        self._idle = _idle(base)
        self._second_weights = bool(state_keys(base))
        for guard in mine:
            if self._uses_difference(guard) or (id(guard.parameter) in self._idle and not guard.immovable):
                guard.remember()
        return args, kwargs

    @torch.no_grad()
    def after_step(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step post-hook of a base: put kept directions, frozen values and hidden gradients back."""
        if self._paused:
            return
        foreign, moves = not _marks_writes(base), []
        for guard in self._stepping.pop(id(base), None) or self._guards_of(base):
            moved = foreign or any(id(p) in self._touched for p in guard.members) or guard.edited
            moves.append((guard, guard.members, moved))
        owed = bool(moves) and self._put_back_moved(moves, foreign)
        if self._second_weights and self.options.project != "gradient":
            self.align(base)
        self.inexact_steps += owed
        if self.inexact_steps >= EXACT_EVERY:
            self.make_exact()
        for parameter, value in self._copies:
            parameter.detach().copy_(value)
        self._copies = []
        self.put_back()

    def _put_back_moved(self, moves: list[tuple[Guard, list[Tensor], bool]], foreign: bool) -> bool:
        """Correct what a step moved; return True if an exact correction is still owed."""
        owed = False
        with exact_products(local_tensor(moves[0][0].parameter).device):  # once, not for every product
            for number, (guard, members, moved) in enumerate(moves):
                if guard.immovable:
                    if foreign or guard.edited:
                        local_tensor(guard.parameter).copy_(_kept(guard))
                elif moved and (guard.frozen or self.options.project != "gradient"):
                    moved = id(guard.parameter) not in self._idle or not guard.unmoved
                    moves[number] = (guard, members, moved)
                    owed |= moved and self._correct(guard)
            if self.options.project != "gradient":
                correct_across(moves, softly=True)
        for guard, _, _ in moves:
            guard.mark()
        return owed

    @torch.no_grad()
    def align(self, base: Optimizer) -> None:
        """Give the weights that `base` keeps beside the parameters every kept direction."""
        guards = self._guards_of(base)
        pairs = [(guard, weights) for guard in guards for weights in second_weights(base, guard.members)]
        for guard, weights in pairs:
            guard.correct(weights)
        correct_across([(guard, weights, True) for guard, weights in pairs])

    def _correct(self, guard: Guard) -> bool:
        """Correct one guard after a step; return True if an exact correction is still owed."""
        if guard.frozen:
            guard.correct()
        elif self._uses_difference(guard):
            low = guard_low_precision(guard) if self.options.precision == "fast" else None
            guard.correct_difference(low)
            guard.pending = True
        elif guard.soft:
            guard.yield_softly()
        else:
            guard.correct()
        return guard.pending

    @torch.no_grad()
    def make_exact(self) -> None:
        """Apply the anchor form where difference-form steps are pending (before anything reads the weights)."""
        for guard in self.guards.values():
            if guard.pending and not guard.edited:
                guard.correct()
                guard.mark()
                guard.pending = False
        self.inexact_steps = 0

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Correct what is pending and compare all anchors; after an error every bit is as it was before.

        Raises:
            StaleAnchorError: a weight was changed by something other than the wrapped optimizer.
        """
        owed = self.owed
        pending = [guard for guard in self.guards.values() if guard.pending and not guard.edited]
        saved = [(guard, [p.detach().clone() for p in guard.members]) for guard in pending]
        try:
            with raise_on_all_ranks():
                self.check_anchors()
            yield
        except BaseException:
            for guard, values in saved:
                for parameter, value in zip(guard.members, values):
                    parameter.detach().copy_(value)
                guard.mark()
            self.owed = owed
            raise

    @property
    def owed(self) -> dict[str, Any]:
        """What a resumed run needs to correct at the same steps: steps counted, parameters that are not exact."""
        return {
            "inexact_steps": self.inexact_steps,
            "pending": [name for name, guard in self.guards.items() if guard.pending],
        }

    @owed.setter
    def owed(self, owed: Mapping[str, Any]) -> None:
        self.inexact_steps = int(owed["inexact_steps"])
        for name, guard in self.guards.items():
            guard.pending = name in owed["pending"]

    @property
    def allowed(self) -> list[float]:
        """The drift of each parameter that waits for an exact correction; a run resumed here has it as well."""
        found = drifts({name: guard for name, guard in self.guards.items() if guard.pending})
        return list(found.values())

    @allowed.setter
    def allowed(self, values: Sequence[float]) -> None:
        for guard, value in zip((guard for guard in self.guards.values() if guard.pending), values):
            guard.allowed = value

    @property
    def tolerance(self) -> float:
        """The drift of kept directions that rounding explains: 1e-5, or half a unit of the coarsest parameter."""
        return max((ROUNDED.get(guard.parameter.dtype, 1e-5) for guard in self.guards.values()), default=1e-5)

    def check_anchors(self) -> None:
        """Compare every kept quantity with its anchor.

        Raises:
            StaleAnchorError: a weight was changed by something other than the wrapped optimizer.
        """
        self.make_exact()
        found = drifts(self.guards)
        for name, guard in self.guards.items():
            self._refuse_edit(guard, found[name])
        self._growth.announce()
        self.make_exact()  # what was accepted with a correction still owed

    def _refuse_edit(self, guard: Guard, drift: float | None = None) -> None:
        check_shapes({guard.basis.name: guard.stored}, {guard.basis.name: guard.parameter})
        if self.options.project == "gradient" and not guard.frozen:
            self._growth.note(guard)
            return
        limit = STALE.get(guard.parameter.dtype, 1e-3)
        if guard.pending:
            limit = max(limit, 1.1 * guard.allowed)
        if drift is None:
            drift = drifts({"": guard})[""] if guard.across else guard.drift()
        if isnan(drift):
            raise StaleAnchorError(
                f"'{guard.basis.name}' holds values that are not finite, its kept directions are lost: training "
                "diverged or it was edited; go back to an earlier checkpoint"
            )
        if not drift <= limit and guard.grown:
            refuse_growth(guard, drift)
        if not drift <= limit:
            raise StaleAnchorError(
                f"'{guard.basis.name}' was changed outside the optimizer: its kept directions moved by {drift:.1e} "
                f"(limit {limit:.0e}). {FUSED if guard.basis.name in self.originals else ''}If the new weights "
                "are meant (load_state_dict, EMA swap, merge), call opt.reanchor(); otherwise restore them"
            )
        self._growth.note(guard)
        guard.mark()

    def _uses_difference(self, guard: Guard) -> bool:
        if guard.frozen or guard.bias is not None or self._second_weights or self.options.project == "gradient":
            return False
        return guard.wants_difference(self.options.precision)

    def _guards_of(self, base: Optimizer) -> list[Guard]:
        ids = {id(p) for group in base.param_groups for p in group["params"]}
        return [guard for guard in self.guards.values() if any(id(p) in ids for p in guard.members)]

    def _prepare(self, guards: Iterable[Guard], project: bool) -> None:
        """Amend gradients, hide those of held and immovable parameters, project those of protected ones if asked."""
        self.amend()
        for parameter in self.held:
            if parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None
        for guard in guards:
            gradient = guard.parameter.grad
            if gradient is None:
                continue
            if guard.immovable:
                self._hidden.append((guard.parameter, gradient))
                guard.parameter.grad = None
            elif project:
                guard.project_gradient(gradient, softly=self.options.project == "gradient")

    def put_back(self) -> None:
        """Give hidden gradients back to their parameters."""
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        self._hidden.clear()

    def _guarded_closure(self, closure: Callable[[], Any], guards: list[Guard], line_search: bool) -> Callable[[], Any]:
        """Return `closure` followed by hiding (and projecting) gradients.

        LBFGS builds its search direction from many evaluations, so there gradients are projected in every evaluation:
        the whole line search then stays inside the free directions.
        """
        project = line_search or self.options.project == "gradient"

        def evaluate() -> Any:
            with torch.no_grad():
                self.put_back()
            loss = closure()
            with torch.no_grad():
                self._touched |= _with_gradient(guards)
                self._prepare(guards, project)
            return loss

        return evaluate


def _accumulated(guard: Guard) -> Callable[[Tensor], None]:
    def project(parameter: Tensor) -> None:
        if parameter.grad is not None:
            with torch.no_grad():
                guard.project_gradient(parameter.grad, softly=False)

    return project


def _kept(guard: Guard) -> Tensor:
    assert guard.basis.kept is not None
    return guard.basis.kept


def _with_gradient(guards: Iterable[Guard]) -> set[int]:
    """Return the ids of the tensors that the base may move because they have a gradient."""
    return {id(p) for guard in guards for p in guard.members if p.grad is not None}


def _marks_writes(base: Optimizer) -> bool:
    """False for optimizers that may write through `p.data`, which leaves no mark on the parameter."""
    return type(base).__module__.startswith("torch.optim")


def _idle(base: Optimizer) -> set[int]:
    """Return the ids of the parameters whose learning rate is zero: most optimizers do not move those (Rprop does)."""
    return {id(p) for group in base.param_groups if is_zero(group.get("lr")) for p in group["params"]}


def is_zero(rate: Any) -> bool:
    """True for a learning rate of exactly zero that can be read without a device synchronisation."""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and float(rate) == 0.0
    return isinstance(rate, (int, float)) and rate == 0
