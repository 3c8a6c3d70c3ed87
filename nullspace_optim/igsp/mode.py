"""The two phases of iGSP and the object that runs them around the optimizer's steps.

Phase 1 (subspace identification): candidates, regularization, noise; until all routers have converged or the cap.
Phase 2 (orthogonal subspace fine-tuning): structure fixed; the kernel of `projection` keeps the action of every
surviving expert on the historical subspace. `consolidated` freezes the experts and begins the next task.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConsolidationError, OptionError
from ..model.loader import LoaderPass, run_batches
from ..model.names import named_parameters
from ..model.restore import restored_model
from ..optimizer.mode import Host
from ..protection.step_hooks import is_zero
from ..subspace.basis import Extension
from . import state
from .bank import CHILD, ExpertBank, install_experts, record_task, report_task
from .constraints import yield_constraints
from .moe.layer import AGNOSTIC, CURRENT, GIVEN, PLAIN
from .moe.regularization import geom, mass, prices
from .moe.router import logits
from .options import IGSP
from .param_group import ExpertParamGroup
from .report import ExpertReport, PhaseStatus, TrainableCount
from .state import all_or_nothing

log = logging.getLogger("nullspace_optim.igsp")


class IgspMode:
    """iGSP behind one optimizer: `bank` holds the experts, `trainees` their parameter group."""

    def __init__(self, options: IGSP) -> None:
        self.options = options
        self.host: Any = None
        self.bank: ExpertBank | None = None
        self.trainees = ExpertParamGroup(options)
        self.counts = [0, 0]
        self.phase_steps = [0, 0]
        self.reason = "the first task begins"
        self.by_hand = False

    def __repr__(self) -> str:
        return repr(self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "host": None}

    @property
    def experts(self) -> ExpertBank:
        """The experts of all layers."""
        assert self.bank is not None
        return self.bank

    def attach(self, host: Host) -> None:
        """Put experts beside the layers of the model; a copy of an optimizer brings its own."""
        self.host = host
        self.trainees.base = host.bases[-1]
        if self.bank is None:
            self.trainees.check()
            self.bank = install_experts(host.owner(), self.options)
            self.trainees.open(host.bases)
            self._begin()
        host.protection.amend = self.add_penalty
        host.base_handles.append(self)

    def remove(self) -> None:
        """Take hooks, experts and parameter group away again (part of `detach`)."""
        self.experts.remove(self.host.owner())
        self.trainees.close()
        self.host.protection.held = []
        self.host.protection.amend = lambda: None

    def _begin(self) -> None:
        """Let every layer begin the next task."""
        scope = self.experts.scope
        for layer in self.experts.layers:
            layer.begin(len(scope.tasks))
        scope.steps, scope.first_phase = 0, True
        self.trainees.refresh(self.experts)
        self.counts, self.phase_steps = [self.trainees.count, 0], [0, 0]

    def before_step(self, base: Optimizer) -> None:
        """Hold the backbone, and routers while candidates warm up: their gradients are hidden from `base`."""
        warming = [layer.router for layer in self.experts.layers] if self.experts.scope.warming(self.options) else []
        self.host.protection.held = [*self.trainees.others(base), *warming]

    def after_step(self, base: Optimizer) -> None:
        """Count a step of the experts' optimizer and change the phase where it is due."""
        if base is not self.trainees.base or not self.trainees.active or is_zero(self.trainees.group["lr"]):
            return
        scope = self.experts.scope
        scope.steps += 1
        self.by_hand = False
        self.phase_steps[0 if scope.first_phase else 1] += 1
        if scope.first_phase:
            for layer in self.experts.layers:
                layer.watch.absorb()
            self._maybe_settle()

    def _maybe_settle(self) -> None:
        """End a window where one is full, and phase 1 where all routers have converged or the cap is reached.

        The warm-up is the first window.
        """
        steps, layers = self.experts.scope.steps, self.experts.layers
        since = steps - self.options.warm
        if steps == max(1, self.options.warm):
            for layer in layers:
                layer.end_warmup()
        if since >= 0 and since % self.options.window == 0:
            for layer in layers:
                layer.watch.judge(layer.router, steps)
        if all(layer.watch.settled() for layer in layers) and any(layer.watch.seen for layer in layers):
            self.settle(f"all routers had converged after {steps} steps")
        elif steps >= self.options.cap:
            late = sum(not layer.watch.settled() for layer in layers)
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
            with self.trainees.following(layer, kept):
                layer.settle(kept)
        self.trainees.refresh(self.experts)
        self.experts.scope.first_phase = False
        self.counts[1], self.reason = self.trainees.count, reason
        self._guard()
        after = sum(len(layer.fresh) for layer in layers)
        log.info(
            "igsp: phase 2 of task %d begins: %s; %d of %d candidates stay, %d trainable parameters",
            len(self.experts.scope.tasks) + 1, reason, after, before, self.counts[1],
        )  # fmt: skip

    def _guard(self) -> None:
        """Let the protection of the optimizer keep surviving experts' action on the historical subspace."""
        store = self.host.store.copy()
        parameters = named_parameters(self.host.owner())
        for name in [name for name in store if name.startswith(f"{CHILD}.")]:
            store.remove(name)
        for basis in yield_constraints(self.experts, parameters, self.options):
            store.put(basis)
        self.host.take(store, {name: parameters[name] for name in store})

    def consolidated(self, work: LoaderPass) -> ExpertReport:
        """Freeze the task's experts, extend bases, keep its router and begin the next task.

        Raises:
            ConsolidationError: no step was taken, no batches, or a name used twice; nothing was changed.
        """
        started, scope = time.perf_counter(), self.experts.scope
        if work.task in scope.tasks:
            raise ConsolidationError(f"task '{work.task}' has been consolidated already; give this one another name=")
        if not scope.steps:
            raise ConsolidationError(f"task '{work.task}': no step was taken since the last task; train it first")
        with all_or_nothing(self):
            if scope.first_phase:
                self.settle(f"the task ended after {scope.steps} steps in phase 1")
            with restored_model(work.model, work.loader), self._collecting():
                first, batches = run_batches(work)
            layers = [layer.report() for layer in self.experts.layers]
            for layer in self.experts.layers:
                layer.finish(self.options.outlier)
            trained = TrainableCount(*self.counts, *self.phase_steps)
            scope.tasks.append(work.task)
            scope.steps = 0
            with restored_model(work.model, work.loader), self.task(work.task):
                probe, record = record_task(work, first, batches, repr(self.options))
            self.host.store.probes[work.task] = probe
            self.host.store.tasks.append(record)
            report = report_task(self.experts, work, batches, layers, trained, self.reason)
            self._begin()
            self._guard()
        self.reason = f"task '{work.task}' was consolidated"
        log.info("igsp: phase 1 of task %d begins: %s", len(scope.tasks) + 1, self.reason)
        return report.after(time.perf_counter() - started)

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        """Let every layer collect gate inputs, with the routing of the task at work."""
        scope = self.experts.scope
        before, scope.chosen, scope.collecting = scope.chosen, CURRENT, True
        try:
            yield
        finally:
            scope.chosen, scope.collecting = before, False

    @property
    def state(self) -> Extension:
        """Experts, routers, bases, phase and counters."""
        return state.pack_state(self)

    @state.setter
    def state(self, extension: Extension) -> None:
        state.restore_state(self, extension)
        self.trainees.refresh(self.experts)

    @contextmanager
    def task(self, name: str | Sequence[str | None] | None) -> Iterator[None]:
        """Route for one finished task, or for the task of each sample; None routes every sample by itself."""
        scope = self.experts.scope
        numbers = {task: number for number, task in enumerate(scope.tasks)}
        before = scope.chosen, scope.of_samples
        if name is None or isinstance(name, str):
            scope.chosen = AGNOSTIC if name is None else numbers.get(name, PLAIN)
        elif isinstance(name, Sequence) and all(one is None or isinstance(one, str) for one in name):
            scope.chosen, scope.of_samples = GIVEN, tuple(-1 if one is None else numbers.get(one, -1) for one in name)
        else:
            raise OptionError(f"task({name!r}): expected the name of a task, one name (or None) a sample, or None")
        try:
            yield
        finally:
            scope.chosen, scope.of_samples = before

    def status(self) -> PhaseStatus:
        """Return phase, step and reason."""
        scope = self.experts.scope
        return PhaseStatus(
            task=len(scope.tasks) + 1,
            phase=1 if scope.first_phase else 2,
            step=self.phase_steps[0 if scope.first_phase else 1],
            reason=self.reason,
            trainable=self.trainees.count,
            finished=tuple(scope.tasks),
            converged={layer.name: layer.watch.convergence.at for layer in self.experts.layers},
            flow={layer.name: tuple(layer.watch.shares.tolist()) for layer in self.experts.layers},
        )

    def regularization(self) -> Tensor:
        """Return the penalty with its factor; the next step does not add it by itself."""
        self.by_hand = True
        return self._penalty()

    def _penalty(self) -> Tensor:
        """Return `strength x mean over layers of R`; zero in the warm-up and in phase 2."""
        options, scope = self.options, self.experts.scope
        parts: list[Tensor] = []
        for layer in self.experts.layers if scope.first_phase and not scope.warming(options) else []:
            if len(layer.fresh) and layer.watch.recent:
                if options.regularization in ("mass", "both") and (layer.size or options.price == "graded"):
                    scores = logits(torch.cat(layer.watch.recent), layer.router)
                    parts.append(mass(scores, prices(len(layer.fresh), options.price).to(scores)))
                if options.regularization in ("geom", "both") and layer.size:
                    down, up = (torch.stack([getattr(e, part) for e in layer.fresh]) for part in ("down", "up"))
                    parts.append(geom(down, up, layer.outputs))
        if not parts:
            return torch.zeros((), device=self.experts.layers[0].router.device)
        fall = max(0.0, 1 - scope.steps / options.cap) if options.warm_down else 1.0
        return options.strength * fall * torch.stack(parts).sum() / len(self.experts.layers)

    def add_penalty(self) -> None:
        """Add the gradient of the penalty, unless it was taken by hand since the last step."""
        if self.by_hand or not self.experts.scope.first_phase or self.options.regularization == "none":
            return
        with torch.enable_grad():
            value = self._penalty()
            if not value.requires_grad:
                return
            targets = [p for p in self.trainees.parameters if p.grad is not None]
            gradients = torch.autograd.grad(value, targets, allow_unused=True)
        for parameter, gradient in zip(targets, gradients):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient.to(parameter.grad.dtype)
        for layer in self.experts.layers:
            layer.watch.recent = []
