"""The two phases of iGSP, run around the optimizer's steps.

Phase 1 (subspace identification): candidates, regularization, noise; until all routers have converged or the cap.
Phase 2 (orthogonal subspace fine-tuning): structure fixed; the kernel of `projection` keeps the action of every
surviving expert on the historical subspace. `consolidate` freezes the experts and begins the next task.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..consolidation.observe import Tally, run_batches, share_buffers, sum_tallies
from ..distributed.collectives import check_equal_on_all_ranks
from ..distributed.communicator import communicator
from ..distributed.failures import raise_on_all_ranks
from ..distributed.gradients import mean_over_holders
from ..errors import ConsolidationError, NullSpaceWarning, OptionError
from ..model.batches import Forward
from ..model.loader import LoaderPass, make_runner
from ..model.names import named_parameters
from ..model.restore import restored_model
from ..optimizer.mode import GONE, Host
from ..protection.step import is_zero
from ..subspace.basis import Extension
from .bank import (
    CHILD,
    ExpertBank,
    backbone_drifts,
    changed_backbone,
    install_experts,
    measure_backbone,
    record_task,
    report_task,
)
from .constraints import yield_constraints
from .moe.context import Routing
from .moe.experts import refuse_not_finite
from .moe.regularization import layer_penalties
from .options import IGSP
from .param_group import ExpertParamGroup
from .report import ExpertReport, PhaseStatus, TrainableCount
from .state import Progress, all_or_nothing, pack_state, restore_state
from .statistics import absorb_step, collect_features, collect_inputs, judge_windows, sum_moments

log = logging.getLogger("nullspace_optim.igsp")


class IgspMode:
    """iGSP behind one optimizer: `experts` of all layers, and the `param_group` of those that train."""

    def __init__(self, options: IGSP) -> None:
        self.options = options
        self.param_group = ExpertParamGroup(options)
        self.progress = Progress(TrainableCount(0, 0, 0, 0), "the first task begins")
        self.by_hand = False
        self._host: Callable[[], Host | None] = lambda: None  # which owns the mode
        self._bank: ExpertBank | None = None

    def __repr__(self) -> str:
        return repr(self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_host"}

    @property
    def host(self) -> Host:
        """The optimizer that the mode serves."""
        host = self._host()
        assert host is not None
        return host

    @property
    def experts(self) -> ExpertBank:
        """The experts of all layers.

        Raises:
            OptionError: `detach()` took them away.
        """
        if self._bank is None or not self._bank.handles:
            raise OptionError(GONE)
        return self._bank

    @torch.inference_mode(False)
    def attach(self, host: Host) -> None:
        """Put experts beside the layers of the model; a copy of an optimizer brings its own."""
        self._host = weakref.ref(host)
        self.param_group.base = host.bases[-1]
        if self._bank is None:
            self.param_group.check(host.bases)
            self._bank = install_experts(host.owner(), self.options)
            self.param_group.open(host.bases)
            self._begin()
            self.param_group.tell_held(host.bases, host.owner())
        self._bank.scope.alone = False
        self.param_group.average()

    def detach(self) -> None:
        """Take hooks, experts and parameter group away again."""
        if self._bank is not None and self._bank.handles:
            self.experts.remove(self.host.owner())
            self.param_group.close()

    def _begin(self, before: int | None = None) -> None:
        """Let every layer begin the next task; the one before took `before` steps."""
        scope = self.experts.scope
        scope.plan = self.options.plan(before)
        for layer in self.experts.layers:
            layer.begin(len(scope.tasks))
        scope.move_to(0, True)
        self.param_group.refresh(self.experts)
        self.progress.trained = TrainableCount(self.param_group.count, 0, 0, 0)

    def before_step(self, base: Optimizer) -> list[Tensor]:
        """Return the backbone, and the routers while candidates warm up."""
        self.param_group.tell_held(self.host.bases, self.host.owner())
        warming = [layer.router for layer in self.experts.layers if self.experts.scope.warming and len(layer.fresh)]
        return [*self.param_group.others(base), *warming]

    def after_step(self, base: Optimizer) -> None:
        """Count a step of the experts' optimizer and change the phase where it is due."""
        if base is not self.param_group.base or not self.param_group.active or is_zero(self.param_group.group["lr"]):
            return
        scope = self.experts.scope
        scope.move_to(scope.steps + 1, scope.first_phase)
        self.by_hand = False
        self.progress.count_step(scope.first_phase)
        if scope.first_phase:
            absorb_step(self.experts.layers)
            self._maybe_settle()

    def _maybe_settle(self) -> None:
        """End a window where one is full, and phase 1 where all routers have converged or the cap is reached.

        The warm-up is the first window.
        """
        steps, layers, plan = self.experts.scope.steps, self.experts.layers, self.experts.scope.plan
        since = steps - plan.warm
        if steps == max(1, plan.warm):
            for layer in layers:
                layer.end_warmup()
        if since >= 0 and since % plan.window == 0:
            judge_windows(layers, steps)
        if all(layer.watch.done for layer in layers) and any(layer.watch.seen for layer in layers):
            self.settle(f"all routers had converged after {steps} steps")
        elif steps >= plan.cap:
            late = sum(not layer.watch.done for layer in layers)
            kept = "they keep all experts" if self.options.on_cap == "keep" else "pruned all the same"
            self.settle(f"the cap of {steps} steps was reached, {late} routers had not converged: {kept}")

    def settle(self, reason: str) -> None:
        """Prune and begin phase 2.

        Raises:
            PruningError: a layer would lose its last expert; nothing was changed.
        """
        layers = self.experts.layers
        masks = [layer.survivors() for layer in layers]
        before = sum(len(layer.fresh) for layer in layers)
        for layer, kept in zip(layers, masks):
            with self.param_group.carry_state(layer, kept):
                layer.settle(kept)
        self.param_group.refresh(self.experts)
        scope, trained = self.experts.scope, self.param_group.count
        scope.move_to(scope.steps, False)
        self.progress.trained, self.progress.reason = replace(self.progress.trained, second=trained), reason
        self._protect()
        after = sum(len(layer.fresh) for layer in layers)
        log.info(
            "igsp: phase 2 of task %d begins: %s; %d of %d candidates stay, %d trainable parameters",
            len(scope.tasks) + 1, reason, after, before, trained,
        )  # fmt: skip

    def _protect(self) -> None:
        """Protect surviving experts' action on the historical subspace by the optimizer's own kernel."""
        store = self.host.store.copy()
        parameters = named_parameters(self.host.owner())
        for name in [name for name in store if name.startswith(f"{CHILD}.")]:
            store.remove(name)
        for basis in yield_constraints(self.experts, parameters, self.options):
            store.put(basis)
        self.host.take(store, {name: parameters[name] for name in store})

    @torch.inference_mode(False)
    def consolidate(self, work: LoaderPass) -> ExpertReport:
        """Freeze the task's experts, extend bases, keep its router and begin the next task.

        Raises:
            ConsolidationError: no step was taken, no batches, or a name used twice; nothing was changed.
        """
        started, scope = time.perf_counter(), self.experts.scope
        self._check(work)
        steps = scope.steps
        with self.param_group.restored_on_error(), all_or_nothing(self.host, self.experts, self.progress):
            if scope.first_phase:
                self.settle(f"the task ended after {scope.steps} steps in phase 1")
            tally = self._observe(work)
            layers = [layer.report() for layer in self.experts.layers]
            every = self.experts.layers
            collected = zip(every, collect_inputs(every), collect_features(every), sum_moments(every), strict=True)
            with raise_on_all_ranks():
                for layer, inputs, features, moment in collected:
                    layer.finish(inputs, features, moment)
            changed = changed_backbone(work.model, self.progress.backbone)
            self.progress.backbone = self.progress.backbone or measure_backbone(work.model)
            scope.tasks.append(work.task)
            scope.move_to(0, False)
            with restored_model(work.model, work.loader), self.task(work.task):
                probe, record = record_task(work, tally.first, tally.batches, repr(self.options))
            self.host.store.probes[work.task] = probe
            self.host.store.tasks.append(record)
            done = self.progress.trained, self.progress.reason
            report = report_task(self.experts, work, tally.batches, layers, *done, self.options, changed)
            with raise_on_all_ranks():
                self._begin(steps)
                self._protect()
        self.progress.reason = f"task '{work.task}' was consolidated"
        log.info("igsp: phase 1 of task %d begins: %s", len(scope.tasks) + 1, self.progress.reason)
        return report.after(time.perf_counter() - started)

    def _check(self, work: LoaderPass) -> None:
        """Refuse a task that cannot be finished, and ranks that are not at the same place."""
        scope = self.experts.scope
        if work.task in scope.tasks:
            raise ConsolidationError(f"task '{work.task}' has been consolidated already; give this one another name=")
        place = f"phase {1 if scope.first_phase else 2}, step {scope.steps} of task {len(scope.tasks) + 1}"
        check_equal_on_all_ranks([("the mode's options", repr(self.options)), ("the mode's place", place)], {})
        if not scope.steps:
            idle = is_zero(self.param_group.group["lr"])
            raise ConsolidationError(
                f"task '{work.task}': no step was taken since the last task in which experts had "
                + ("a learning rate: that of their parameter group, opt.param_groups[-1]['lr'], is 0" if idle else
                   "gradients; train it first, outside opt.task() and with the modules that experts were put beside "
                   "(checkpoint(use_reentrant=True) gives none unless inputs require them: use_reentrant=False)")
            )  # fmt: skip
        for layer in self.experts.layers:
            refuse_not_finite(layer.trainable(), layer.name)

    def _observe(self, work: LoaderPass, routing: Routing = Routing.CURRENT) -> Tally:
        """Run every batch, routed for the task at work; layers collect gate inputs and towers features."""
        scope, ranks, run, layers = self.experts.scope, communicator(), make_runner(work), self.experts.layers
        once = hasattr(work.forward, "restart")  # it gives a part of its inputs in the first batch alone
        for layer in layers:
            layer.forget()

        def collected(batch: Any, counted: bool) -> Any:
            found = [(rows, len(rows)) for layer in layers for rows in layer.noted]
            moments = [layer.moment for layer in layers]
            scope.collecting = True  # lent samples as well: all ranks run towers equally often
            try:
                return run(batch)
            finally:
                scope.collecting = False
                for rows, before in found if not counted else ():
                    del rows[before:]
                for layer, moment in zip(layers, moments):
                    if not counted:
                        layer.moment = moment
                    elif once and layer.recognition is not None:
                        layer.recognition.batches += 1

        with restored_model(work.model, work.loader), torch.no_grad(), scope.using(routing):
            share_buffers(work.model, ranks)
            return sum_tallies(work, run_batches(work, ranks, collected), ranks)[0]

    @property
    def state(self) -> Extension:
        """Experts, routers, bases, phase and counters; after `detach` as they were."""
        assert self._bank is not None
        return pack_state(self._bank, self.options, self.progress)

    @state.setter
    def state(self, extension: Extension) -> None:
        with torch.inference_mode(False):
            restore_state(self.experts, self.options, self.progress, extension)
        self.by_hand = False
        self.param_group.refresh(self.experts)
        if changed := changed_backbone(self.host.owner(), self.progress.backbone):
            warnings.warn(changed, NullSpaceWarning, stacklevel=6)

    def apart(self) -> AbstractContextManager[None]:
        """Take the experts' parameter group out of the optimizer inside the context."""
        return self.param_group.apart()

    @property
    def training(self) -> dict[str, Any]:
        """Optimizer state and settings of the experts that train now."""
        return self.param_group.training

    @training.setter
    def training(self, state: dict[str, Any]) -> None:
        self.param_group.training = state

    @torch.inference_mode(False)
    def calibrate(self, loader: Iterable[Any], forward: Forward | None = None, progress: bool = True) -> None:
        """Tell inputs of no task apart by those of `loader`, for calls without a task's name, after `consolidate`.

        The limit of each finished task falls until a twentieth of them lies within, but not below the mean distance of
        its own samples (prompts that came in every batch are known one by one, and have no such bound). Inputs beyond
        all limits run the plain backbone.

        Raises:
            OptionError: no task is finished, or all share one router, which never asks for a task.
            ConsolidationError: the loader gave no batches, or none of its samples reached a layer with experts.
        """
        if self.options.router == "shared" or not self.experts.scope.tasks:
            raise OptionError(
                "calibrate(): needs a finished task and IGSP(router='per-task'); consolidate one first "
                f"(finished: {len(self.experts.scope.tasks)}, router={self.options.router!r})"
            )
        work = LoaderPass(self.host.owner(), {}, loader, "pool", forward, progress=progress)
        self._observe(work, Routing.BACKBONE)
        layers, found = self.experts.layers, collect_features(self.experts.layers)
        towers = [(layer.recognition, rows) for layer, rows in zip(layers, found, strict=True) if layer.recognition]
        if not any(len(rows) for _, rows in towers):
            raise ConsolidationError("calibrate(): no finite sample of the loader reached a layer with experts")
        for recognition, rows in towers:
            recognition.calibrate(rows)

    def task(self, name: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
        """Route for one finished task, or for the task of each sample; None routes every sample by itself."""
        scope = self.experts.scope
        numbers: dict[str | None, int] = {task: number for number, task in enumerate(scope.tasks)}
        if name is None:
            return scope.using(Routing.NEAREST)
        if isinstance(name, str):
            scope.tell_misspelt([name])
            return scope.using(Routing.TASK if name in numbers else Routing.BACKBONE, numbers.get(name))
        if isinstance(name, Sequence) and all(one is None or isinstance(one, str) for one in name):
            scope.tell_misspelt(name)
            of_samples = torch.tensor([numbers.get(one, -1) for one in name], dtype=torch.int64)
            return scope.using(Routing.SAMPLES, of_samples=of_samples)
        raise OptionError(f"task({name!r}): expected the name of a task, one name (or None) a sample, or None")

    def drifts(self) -> dict[str, tuple[float, float]]:
        """Return the relative change of parameters of the backbone that moved since the first task, and its limit."""
        return backbone_drifts(self.host.owner(), self.progress.backbone)

    def reanchor(self) -> None:
        """Take the present backbone for that of the finished tasks."""
        self.progress.backbone = self.progress.backbone and measure_backbone(self.host.owner())

    def status(self) -> PhaseStatus:
        """Return phase, step and reason."""
        scope, trained = self.experts.scope, self.progress.trained
        return PhaseStatus(
            task=len(scope.tasks) + 1,
            phase=1 if scope.first_phase else 2,
            step=trained.first_steps if scope.first_phase else trained.second_steps,
            reason=self.progress.reason,
            trainable=self.param_group.count,
            finished=tuple(scope.tasks),
            converged={layer.name: layer.watch.convergence.at for layer in self.experts.layers},
            flow={layer.name: tuple(layer.watch.shares.tolist()) for layer in self.experts.layers},
        )

    def regularization(self) -> Tensor:
        """Return the penalty with its factor; the next step does not add it by itself."""
        value = self._penalty()
        self.by_hand = value.requires_grad  # otherwise no forward was noted yet (reentrant checkpointing)
        return value

    def _penalty(self) -> Tensor:
        """Return `strength x mean over layers of R`; zero in the warm-up and in phase 2."""
        options, scope = self.options, self.experts.scope
        acting = scope.first_phase and not scope.warming
        parts = [part for layer in self.experts.layers if acting for part in layer_penalties(layer, options)]
        if not parts:
            return torch.zeros((), device=self.experts.layers[0].router.device)
        return options.strength * torch.stack(parts).sum() / len(self.experts.layers)

    def add_penalty(self) -> None:
        """Add the gradient of the penalty, unless it was taken by hand since the last step."""
        scope = self.experts.scope
        if self.by_hand or not scope.first_phase or scope.warming or self.options.regularization == "none":
            return
        with torch.enable_grad():
            value = self._penalty()
            targets = [p for p in self.param_group.parameters if p.grad is not None]
            none: list[Tensor | None] = [None] * len(targets)
            gradients = torch.autograd.grad(value, targets, allow_unused=True) if value.requires_grad else none
            gradients = mean_over_holders(gradients, targets)
        for parameter, gradient in zip(targets, gradients):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient.to(parameter.grad.dtype)
        for layer in self.experts.layers:
            layer.watch.recent, layer.watch.tokens = [], None
