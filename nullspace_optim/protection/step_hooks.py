"""What happens around one base step: hide frozen gradients, let the base move, put the kept directions back.

`Protection` owns one `Guard` a parameter. Its hooks run around `step` of every wrapped optimizer, so that `opt.step()`,
`base.step()` and `scaler.step(base)` are alike. A step waits for the device only if a weight was edited from outside,
and once after a consolidation. One that an error or an interrupt ends is finished before anything reads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..distributed.failures import raise_on_all_ranks
from ..settings import Settings
from ..subspace.basis import BasisStore
from ..subspace.projection import exact_products
from .averaged_weights import second_weights
from .edits import ROUNDED, GrowthNotes, accept_edit
from .guard import Guard, Workspace, guard_low_precision
from .sharded import any_rank, correct_across, drifts
from .step import Forms, FreeShare, Step, announce_finished, closure_in, replace_closure
from .weight_stack import accumulation_hook

EXACT_EVERY = 16


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
        self._steps: list[Step] = []  # begun and not ended
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._of_bases: dict[int, tuple[set[int], list[Guard]]] = {}
        self.forms = Forms((), options, self.workspace)
        self._handles: list[Any] = []
        self._paused = False
        self._growth = GrowthNotes()
        self.free = FreeShare()

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
        self._steps.clear()
        for name, basis in store.items():
            if basis.kept is None and not basis.subspaces:
                continue
            bias = parameters[basis.bias] if basis.bias else None
            guard = self.guards[name] = Guard(parameters[name], basis, bias, self.workspace)
            guard.mark()
            if name in before and before[name].stored is basis:
                guard.seen, guard.pending = before[name].seen, before[name].pending
        self.free.tasks = len(store.tasks)
        self._of_bases.clear()
        self.forms = Forms(self.guards.values(), self.options, self.workspace)
        if not any(guard.pending for guard in self.guards.values()):
            self.inexact_steps = 0
        if self.options.project == "both":
            queue = self.forms.queue
            self._handles = [
                guard.parameter.register_post_accumulate_grad_hook(accumulation_hook(guard, queue))  # type: ignore[no-untyped-call]
                for guard in self.guards.values()
                if not guard.immovable and guard.bias is None and guard.parameter.requires_grad
            ]

    def mark(self) -> None:
        """Take the parameters as they are now for our own work."""
        for guard in self.guards.values():
            guard.mark()

    def release_gradient_hooks(self) -> None:
        """Remove the accumulation hooks of ``project="both"``; no gradient waits any longer."""
        self.forms.queue.flush()
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def before_step(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step pre-hook of a base: refuse stale anchors, hide frozen gradients, take what the difference form needs."""
        if self._paused:
            return None
        self.finish_interrupted()
        self.put_back()
        if self.forms.queue.waiting:  # of a pass that failed
            self.forms.queue.project()
        step = Step.of(base, self._guards_of(base))
        for guard in (guard for guard in step.guards if guard.edited):
            loaded = not guard.seen
            accept_edit(guard, self.options, self._growth, original=guard.basis.name in self.originals)
            if not loaded:  # a resumed run goes on bit for bit
                step.accepted.add(id(guard))
        if any(guard.grown for guard in step.guards if id(guard) in self.forms.stacked):  # through `.data`
            self.forms = Forms(self.guards.values(), self.options, self.workspace)
        if self._growth.waiting:
            self._growth.announce()
        if self.held and step.foreign:
            step.copies = [(parameter, parameter.detach().clone()) for parameter in self.held]
        for guard in step.guards:
            idle = bool(step.idle) and id(guard.parameter) in step.idle and not guard.immovable
            if idle or self.forms.uses_difference(guard, step):
                guard.remember()
        self._steps.append(step)
        closure = closure_in(args, kwargs)
        if closure is None:
            step.touch()
            self.free.tell(self.guards.values(), base)
            self._prepare(step.guards, project=self.options.project == "gradient")
        else:
            args, kwargs = replace_closure(args, kwargs, self._guarded_closure(closure, step, isinstance(base, LBFGS)))
        return args, kwargs

    @torch.no_grad()
    def after_step(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step post-hook of a base: put kept directions, frozen values and hidden gradients back."""
        if self._paused:
            return
        step = self.step_of(base)
        if step is None:  # bases changed within the step
            step = Step.of(base, self._guards_of(base))
            step.finish(update=self.options.project != "gradient")
        elif step.guards:
            self.inexact_steps += self._put_back_moved(step)
        if step.second_weights and self.options.project != "gradient":
            self.align(base)
        step.restore_copies()
        self._close(step)
        if self.inexact_steps >= EXACT_EVERY:
            self.make_exact()

    def _put_back_moved(self, step: Step) -> bool:
        """Correct what a step moved; return True if an exact correction is still owed."""
        owed, moved, update = False, set(), self.options.project != "gradient"
        with exact_products(step.guards[0].parameter.device):  # once, not for every product
            for guard in step.guards:
                if not step.moved(guard) or (step.idle and not guard.immovable and step.unmoved(guard)):
                    continue
                moved.add(id(guard))
                if guard.frozen:
                    guard.correct()
                elif update and id(guard) not in self.forms.stacked:
                    owed |= self._correct(guard, step)
            for stack in self.forms.stacks:
                stack.correct(moved)
            if self.forms.crossing:
                moves = [(g, g.members, g.behind or id(g) in moved) for g in step.guards]
                correct_across(moves, softly=True)
        for guard in step.guards:
            guard.behind = False
            guard.mark()
        return owed

    def _close(self, step: Step) -> None:
        """End a step: hidden gradients are there again."""
        self.put_back()
        self._steps = [other for other in self._steps if other is not step]

    def step_of(self, base: Optimizer) -> Step | None:
        """Return the step of `base` that has begun and not ended."""
        return next((step for step in self._steps if step.base() is base), None)

    def forget_steps(self) -> None:
        """Take what the weights hold now for given, whatever a step left unfinished; hidden gradients are back."""
        self._steps.clear()
        self.put_back()

    def calls_phase(self, base: Optimizer, phase: str) -> bool:
        """Return True if a step of `base` is at work and calls this part of it, for the first time."""
        step = self.step_of(base)
        if step is None or step.failed or phase in step.phases:
            return False
        step.phases.add(phase)
        return True

    @property
    def interrupted(self) -> list[Step]:
        """Steps that ended before their correction; one whose closure is at work goes on."""
        return [step for step in self._steps if not step.evaluating]

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish_interrupted(self, *, announce: bool = True) -> None:
        """Finish steps that an error or an interrupt ended: every kept direction goes back to its anchor.

        Of a weight that was written to since then it cannot be told by whom, so this is announced, except right after
        the error.
        """
        for step in self.interrupted:
            base, update = step.base(), self.options.project != "gradient"
            written = step.finish(update=update)
            if base is not None and step.second_weights and update:
                self.align(base)
            if any(guard.pending for guard in step.guards):  # ended between two marks
                self.inexact_steps = max(self.inexact_steps, 1)
            self._close(step)
            if announce and written:
                announce_finished(base, written)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Run a step; where an error ends it every kept direction goes back to its anchor at once."""
        try:
            yield
        except BaseException:
            with suppress(Exception):  # out of memory once more: the next use of the weights tries again
                self.finish_interrupted(announce=False)
            raise
        finally:
            self.put_back()

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore_across(self) -> None:
        """Put sides that cross ranks back if a step was interrupted on any of them; all ranks must ask."""
        across = [guard for guard in self.guards.values() if guard.across]
        if across and any_rank(any(guard.behind for guard in across), across[0]):
            clean = [guard for guard in across if not guard.edited]
            correct_across([(guard, guard.members, guard.behind) for guard in across])
            for guard in across:
                guard.behind = False
            for guard in clean:
                guard.mark()

    @torch.no_grad()
    def align(self, base: Optimizer) -> None:
        """Give the weights that `base` keeps beside the parameters every kept direction."""
        guards = self._guards_of(base)
        pairs = [(guard, weights) for guard in guards for weights in second_weights(base, guard.members)]
        for guard, weights in pairs:
            guard.correct(weights)
        correct_across([(guard, weights, True) for guard, weights in pairs])

    def _correct(self, guard: Guard, step: Step) -> bool:
        """Correct one guard after a step; return True if an exact correction is still owed."""
        if self.forms.uses_difference(guard, step):
            low = guard_low_precision(guard) if self.options.precision == "fast" else None
            guard.correct_difference(low)
            guard.pending = True
        elif guard.soft:
            guard.yield_softly()
        else:
            guard.correct()
            guard.pending = False
        return guard.pending

    @torch.no_grad()
    def make_exact(self) -> None:
        """Apply the anchor form where difference-form steps are pending (before anything reads the weights)."""
        self.finish_interrupted()
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
        self.finish_interrupted()
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
        self.restore_across()
        found = drifts(self.guards)
        for name, guard in self.guards.items():
            original = guard.basis.name in self.originals
            accept_edit(guard, self.options, self._growth, original=original, drift=found[name])
        self._growth.announce()
        self.make_exact()  # what was accepted with a correction still owed

    def _guards_of(self, base: Optimizer) -> list[Guard]:
        ids = {id(p) for group in base.param_groups for p in group["params"]}
        known = self._of_bases.get(id(base))
        if known is None or known[0] != ids:
            found = [g for g in self.guards.values() if any(id(p) in ids for p in g.members)]
            known = self._of_bases[id(base)] = ids, found
        return known[1]

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

    def _guarded_closure(self, closure: Callable[[], Any], step: Step, line_search: bool) -> Callable[[], Any]:
        """Return `closure` followed by hiding gradients, and for LBFGS projecting them: its search stays inside."""
        project = line_search or self.options.project == "gradient"
        if line_search:  # zeros in the place of rounding would spoil its curvature
            self.release_gradient_hooks()

        def evaluate() -> Any:
            with torch.no_grad():
                self.put_back()
            with step.evaluation():
                loss = closure()
            with torch.no_grad():
                self.forms.queue.flush()
                step.touch()
                self.free.tell(self.guards.values(), step.base())
                self._prepare(step.guards, project)
            return loss

        return evaluate
