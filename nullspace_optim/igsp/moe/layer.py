"""The experts beside one layer of the model: history, the task at work, the routers of finished tasks.

`ExpertLayer` is a child of the model (so it moves, copies and is wrapped with it) and acts through a forward hook on
the layer it stands beside: `output + sum_e p_e f_e(input)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ...errors import OptionError
from ..options import IGSP
from ..report import LayerReport
from . import pruning, router
from .context import ALONE, FROZEN, Routing, RoutingContext
from .convergence import ConvergenceMonitor
from .experts import (
    PARTS,
    Expert,
    Stack,
    Stateless,
    TaskRouter,
    emitted_rows,
    extend_basis,
    fresh_directions,
    mix,
    second_moment,
    shapes,
    span_rows,
    stack,
)
from .recognition import TaskRecognition
from .router import RoutingChoice
from .sites import TargetModule

EMITTED = 0.99  # share of the energy of new experts' outputs that the basis of outputs holds
REPLACED = (
    "inputs", "outputs", "emitted", "gates", "floor", "router", "fresh", "finished", "watch", "members", "candidates",
    "known",
)  # fmt: skip


class ExpertLayer(Stateless):
    """Experts, routers and bases beside one layer.

    Buffers: `history_*`, the frozen experts `[H, ...]`; `inputs` `[d, k]` and `outputs` `[o, l]`, orthonormal bases of
    the rows of all historical `A` and of the columns of all historical `B`; `emitted` `[o, j]`, one of what historical
    experts put out in their tasks (the share `EMITTED` of its energy); of finished tasks with a shared router
    `gates` `[d + 1, j]`, a basis of what it saw, and `floor` `[]`, the least logit with which it chose an expert.
    Parameters: `fresh` experts and `router` `[E, d + 1]` (`d` numbers: `router.gate_input`), whose rows are the
    historical `members` of the task at work, then the fresh ones.
    """

    inputs: Tensor
    outputs: Tensor
    emitted: Tensor
    gates: Tensor
    floor: Tensor
    draw: Tensor | None

    def __init__(
        self, site: TargetModule, options: IGSP, scope: RoutingContext, number: int, device: torch.device
    ) -> None:
        super().__init__()
        self.name, self.options, self.scope, self.number = site.name, options, scope, number
        self.batch_axis = site.batch_axis
        self.widths = (site.inputs, site.outputs)
        for part, shape in shapes(options.kind, options.width, *self.widths).items():
            self.register_buffer(f"history_{part}", torch.zeros(0, *shape, device=device))
        self.register_buffer("inputs", torch.zeros(site.inputs, 0, device=device))
        self.register_buffer("outputs", torch.zeros(site.outputs, 0, device=device))
        self.register_buffer("emitted", torch.zeros(site.outputs, 0, device=device))
        draw = router.projection(site.inputs, number)
        self.register_buffer("draw", None if draw is None else draw.to(device))
        self.gate_width = 1 + (site.inputs if draw is None else draw.shape[1])
        self.register_buffer("gates", torch.zeros(self.gate_width, 0, device=device))
        self.register_buffer("floor", torch.zeros((), device=device))
        self.fresh = nn.ModuleList()
        self.finished = nn.ModuleList()
        self.members: list[int] = []
        self.candidates = 0
        self.router = nn.Parameter(torch.zeros(0, self.gate_width, device=device))
        self.watch = ConvergenceMonitor(options, self.router)
        self.collected: list[Tensor] = []
        self.moment: Tensor | None = None  # of the fresh experts' outputs (`second_moment`), while it is collected
        self.recognition: TaskRecognition | None = None  # of the last layer of a tower

    def contents(self) -> dict[str, Any]:
        """Return what a task, its end and a file replace, by attribute: the objects themselves, not copies."""
        histories = [f"history_{part}" for part in PARTS[self.options.kind]]
        return {name: getattr(self, name) for name in (*REPLACED, *histories)}

    def replace(self, contents: Mapping[str, Any]) -> None:
        """Take over `contents` as `contents()` returns them; gate inputs that were collected are forgotten."""
        for name, value in contents.items():
            setattr(self, name, value)
        self.forget()

    @property
    def known(self) -> dict[str, Tensor]:
        """The finished tasks as the tower recognises them, where this layer is its last one."""
        return {} if self.recognition is None else self.recognition.known

    @known.setter
    def known(self, known: dict[str, Tensor]) -> None:
        if self.recognition is not None:
            self.recognition.known = known

    @property
    def history(self) -> Stack:
        """All frozen experts."""
        return {part: getattr(self, f"history_{part}") for part in PARTS[self.options.kind]}

    @property
    def size(self) -> int:
        """`H`, how many frozen experts there are."""
        return len(self.history["down"])

    def begin(self, task: int) -> None:
        """Add candidates and a router for the `task`-th task."""
        generator = torch.Generator().manual_seed(hash((self.options.seed, task, self.number)) & (2**63 - 1))
        downs = fresh_directions(self.inputs, self.options.width, self.options.candidates, generator)
        out = self.widths[1]
        self.fresh = nn.ModuleList(Expert(down.clone(), out, self.options.kind) for down in downs)
        self.members, self.candidates = list(range(self.size)), len(self.fresh)
        known = self._shared_rows()
        new = known.new_zeros(self.size + len(self.fresh) - len(known), known.shape[1])
        constant = router.constant(self.gate_width - 1, self.options.gate_scale)
        if self.gates.shape[1]:
            new[:] = router.low_row(self.floor, known.shape[1], constant)
        elif self.size and len(self.fresh):
            new[len(new) - len(self.fresh) :, -1] = self._head_start() / constant
        self.adopt_router(torch.cat([known, new]))
        self.watch = ConvergenceMonitor(self.options, self.router)

    def _head_start(self) -> float:
        return router.head_start(self.size, len(self.fresh), self.options.noise)

    @torch.no_grad()
    def end_warmup(self) -> None:
        """Let candidates of a protected shared router begin level with the experts that the new task would choose."""
        if self.gates.shape[1] and self.watch.seen:
            self.router.copy_(router.level(self.router, len(self.fresh), self.gates, self.watch.mean_input))

    def _shared_rows(self) -> Tensor:
        """Return the rows that a shared router keeps from earlier tasks, none for routers of one task."""
        last = self.finished[-1] if self.options.router == "shared" and len(self.finished) else None
        return last.weight if isinstance(last, TaskRouter) else self.router.detach()[:0]

    def adopt_router(self, weight: Tensor) -> None:
        """Make `weight` `[E, d]` the trainable router."""
        self.router = nn.Parameter(weight.detach().clone())

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the task at work by their names below this layer."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def survivors(self) -> Tensor:
        """Return a mask `[E]` of the experts that this task keeps, by the flow through them; changes nothing.

        A layer that no training forward reached keeps none; one whose router has not converged keeps all with
        ``on_cap="keep"``; a shared router keeps all of the history.

        Raises:
            PruningError: no expert would be left.
        """
        options, flow = self.options, self.watch.shares
        if not self.watch.seen:
            kept = torch.zeros_like(flow, dtype=torch.bool)
        elif self.watch.convergence.at is None and options.on_cap == "keep":
            kept = torch.ones_like(flow, dtype=torch.bool)
        else:
            kept = pruning.keep_above(flow, options.threshold, self.name, len(self.fresh))
        if options.router == "shared":
            kept[: len(self.members)] = True
        return kept

    def settle(self, kept: Tensor) -> None:
        """Begin phase 2 with the experts of the mask `kept` `[E]`: delete the others, fix what no longer trains."""
        flags = kept.tolist()
        fresh = [e for e, keep in zip(self.fresh, flags[len(self.members) :]) if keep]
        self.members = [m for m, keep in zip(self.members, flags) if keep]
        self.fresh = nn.ModuleList(fresh)
        if not all(flags):
            self.adopt_router(self.router.detach()[kept])
        self.router.requires_grad_(not fresh or self.options.router_after == "train")
        if self.options.orthogonal == "structural":
            for expert in fresh:
                expert.down.requires_grad_(False)

    def routers(self) -> list[TaskRouter]:
        """Return what deployment needs: the routers of finished tasks, or the one they share."""
        records = [record for record in self.finished if isinstance(record, TaskRouter)]
        return records[-1:] if self.options.router == "shared" else records

    def record(self, task: int) -> TaskRouter:
        """Return the router of the `task`-th finished task, or the one that all share."""
        record = self.finished[-1 if self.options.router == "shared" else task]
        assert isinstance(record, TaskRouter)
        return record

    def report(self) -> LayerReport:
        """Describe the task at work, after its pruning."""
        flow = self.watch.shares
        return LayerReport(
            name=self.name,
            candidates=self.candidates,
            kept=len(self.fresh),
            reused=len(self.members),
            history=self.size,
            converged=self.watch.convergence.at,
            curve=self.watch.convergence.curve,
            reuse=float(flow[: self.size].sum()),
            flow=tuple(flow.tolist()),
            used=self.inputs.shape[1],
            size=self.inputs.shape[0],
            rank=self.options.width,
        )

    @property
    def noted(self) -> list[list[Tensor]]:
        """Lists that collecting forwards append to."""
        return [self.collected, *([self.recognition.rows] if self.recognition is not None else [])]

    def forget(self) -> None:
        """Forget what forwards have collected."""
        self.collected, self.moment = [], None
        if self.recognition is not None:
            self.recognition.rows, self.recognition.batches = [], 0

    def collect(self) -> Tensor:
        """Return and forget the gate inputs `[n, d + 1]` of the forwards in which they were collected."""
        collected, self.collected = self.collected, []
        return torch.cat(collected) if collected else self.router.new_zeros(0, self.gate_width)

    def finish(self, collected: Tensor, features: Tensor, moment: Tensor | None) -> None:
        """End the task, which gave the gate inputs `collected` `[n, d + 1]`, the tower's `features` `[n, p]` and the
        `moment` of the fresh experts' outputs (None: none was seen): freeze these, extend the bases by their
        directions, keep the router.
        """
        if self.recognition is not None:
            self.recognition.finish(features)
        if len(collected) and len(self.router) and self.options.shared_energy:
            lowest = router.lowest(collected, self.router.detach(), self.options.top_k)
            self.floor = torch.minimum(self.floor, lowest) if self.gates.shape[1] else lowest
            self.gates = span_rows(self.gates, collected, self.options.shared_energy)
        numbers = [*self.members, *range(self.size, self.size + len(self.fresh))]
        known = torch.tensor(numbers, dtype=torch.int64, device=self.router.device)
        done = TaskRouter(self.router, known)
        self.finished = nn.ModuleList([*self.finished, done])
        for expert in self.fresh:
            assert isinstance(expert, Expert)
            self.inputs = extend_basis(self.inputs, expert.down)
            self.outputs = extend_basis(self.outputs, expert.up)
        if moment is not None:
            rows = emitted_rows(moment, stack(self.fresh, self.options.kind))
            self.emitted, self.moment = span_rows(self.emitted, rows, EMITTED), None
        for part, value in stack(self.fresh, self.options.kind, self.history).items():
            setattr(self, f"history_{part}", value.detach())
        self.fresh = nn.ModuleList()

    def add_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the layer: add the gated outputs of the chosen experts.

        torch.compile traces it in phase 2 and in evaluation. Phase 1 runs eagerly: it draws seeded noise and appends to
        lists, which would be compiled again in every step.
        """
        routing, task = self._routing()
        self.scope.follow(routing, task)
        if self.recognition is not None and self.scope.looking is self.recognition:
            self.recognition.see(self._samples_first(self._input(args, kwargs)))
        if routing is Routing.BACKBONE or (routing is Routing.CURRENT and not len(self.router)):
            return output
        x = self._input(args, kwargs)
        exploring = routing is Routing.CURRENT and self.scope.first_phase
        add = self._add_eagerly if exploring or self.scope.collecting else self._add
        return add(x, output, routing, task)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == self.widths[0]:
                return value
        raise OptionError(
            f"IGSP(target_modules=...): '{self.name}' was called without a tensor [n, ..., {self.widths[0]}], the "
            "width of its first linear layer; choose that layer itself, or give inputs a dimension of samples"
        )

    def _samples_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.batch_axis == 1 and x.ndim == 3 else x

    def _add(self, x: Tensor, output: Any, routing: Routing, task: int | None) -> Any:
        x = self._samples_first(x)
        inputs = router.gate_input(x, self.options.gate_scale, self.draw)
        if self.scope.collecting and self.options.router == "shared":
            self.collected.append(inputs)
        self._note(x, routing)
        experts, choice = self._route(inputs, routing, task)
        if choice is None:
            return output
        added = mix(x, experts, choice, self.options.scale)
        added = self._samples_first(added)
        if isinstance(output, tuple):
            return (output[0] + added.to(output[0].dtype), *output[1:])
        return output + added.to(output.dtype)

    @_disable_dynamo
    def _add_eagerly(self, x: Tensor, output: Any, routing: Routing, task: int | None) -> Any:
        return self._add(x, output, routing, task)

    def _note(self, x: Tensor, routing: Routing) -> None:
        """Note what the fresh experts read: in phase 1 for the penalty, while collecting for the basis of outputs."""
        if routing is not Routing.CURRENT or not len(self.fresh) or not len(x):
            return
        if self.scope.collecting:
            moment = second_moment(x, stack(self.fresh, self.options.kind))
            self.moment = moment if self.moment is None else self.moment + moment
        elif self.scope.first_phase and self.options.regularization == "function" and torch.is_grad_enabled():
            self.watch.tokens = x.detach()

    def _routing(self) -> tuple[Routing, int | None]:
        """Return the routing of this forward pass, and the number of its task if that is a finished one."""
        scope = self.scope
        if scope.routing is not Routing.AUTOMATIC:
            return scope.routing, scope.task
        scope.tell(ALONE, scope.alone)
        if self.training or torch.is_grad_enabled() or scope.begun:
            return Routing.CURRENT, None
        return (Routing.TASK, len(scope.tasks) - 1) if scope.tasks else (Routing.BACKBONE, None)

    def _route(self, inputs: Tensor, routing: Routing, task: int | None) -> tuple[Stack, RoutingChoice | None]:
        if routing is Routing.CURRENT:
            return self.current_experts(), self._route_current(inputs)
        tasks = self.scope.tasks_of(inputs, self.name) if routing is Routing.SAMPLES else None
        if self.options.router == "shared":
            return self._route_shared(inputs, tasks)
        if task is not None:
            return self.history, self._route_task(inputs, task)
        return self.history, self._route_samples(inputs, tasks)

    def current_experts(self) -> Stack:
        """Return the experts of the task at work: its members of the history, then the fresh ones."""
        history = self.history
        if len(self.members) < self.size:
            history = {part: value[self.members] for part, value in history.items()}
        return stack(self.fresh, self.options.kind, history)

    def _route_current(self, inputs: Tensor) -> RoutingChoice:
        scores = router.logits(inputs, self.router)
        return self._explore(inputs, scores) if self.scope.first_phase else router.top_k(scores, self.options.top_k)

    def _explore(self, inputs: Tensor, scores: Tensor) -> RoutingChoice:
        """Choose experts in phase 1; a training forward does so with noise, and its choice is noted."""
        if self.scope.warming and self.training and len(self.fresh):  # noise alone decides
            scores = torch.zeros_like(scores)
            if self.size:
                scores[:, len(self.members) :] = self._head_start()
        seeds = self.options.seed, len(self.scope.tasks), self.scope.steps, self.number
        noise = router.noise(scores, self.options.noise, *seeds) if self.training and self.options.noise else None
        noisy = scores if noise is None else scores + noise
        choice = router.top_k(noisy, self.options.top_k)
        if torch.is_grad_enabled():
            self.scope.tell(FROZEN, not self.router.requires_grad)
            self.watch.take(inputs, scores, choice, noisy is not scores)
        return choice

    def _route_task(self, inputs: Tensor, task: int) -> RoutingChoice:
        record = self.record(task)
        choice = router.top_k(router.logits(inputs, record.weight), self.options.top_k)
        return RoutingChoice(record.experts[choice.experts], choice.gates)

    def _route_samples(self, inputs: Tensor, tasks: Tensor | None) -> RoutingChoice | None:
        """Route each sample with the router of its task in `tasks` `[n]`, with gates 0 where that is -1 (None: all)."""
        records = [record for record in self.finished if isinstance(record, TaskRouter)]
        if not records or tasks is None:
            return None
        experts = inputs.new_zeros(len(inputs), self.options.top_k, dtype=torch.int64)
        gates = inputs.new_zeros(len(inputs), self.options.top_k)
        for number in range(len(records)):
            choice = self._route_task(inputs, number)
            mine, width = (tasks == number).unsqueeze(1), choice.gates.shape[1]
            experts[:, :width] = torch.where(mine, choice.experts, experts[:, :width])
            gates[:, :width] = torch.where(mine, choice.gates, gates[:, :width])
        return RoutingChoice(experts, gates)

    def _route_shared(self, inputs: Tensor, tasks: Tensor | None) -> tuple[Stack, RoutingChoice | None]:
        """Route by the one router of all tasks, as it is now; samples whose task is -1 in `tasks` `[n]` get gates 0."""
        experts, choice = self.history, None
        if self.scope.begun:
            experts = self.current_experts()
            choice = router.top_k(router.logits(inputs, self.router), self.options.top_k)
        elif len(self.finished):
            choice = self._route_task(inputs, len(self.finished) - 1)
        if choice is not None and tasks is not None:
            choice = RoutingChoice(choice.experts, choice.gates * (tasks >= 0).unsqueeze(1))
        return experts, choice
