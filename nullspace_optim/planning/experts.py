"""What experts will cost, from the widths of the layers they stand beside and the rows that reach them.

Shapes as in `experts` and `layer`. How many candidates survive a task is known afterwards only, so a plan says it for
each number; every task is taken to route over all earlier experts, which is the most that routers can take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..igsp.constraints import PARTS
from ..igsp.moe.experts import shapes
from ..igsp.moe.sites import TargetModule, find_target_modules, refuse_narrow
from ..igsp.options import IGSP

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class ExpertPlace:
    """One layer with experts: its name, widths `d` and `o`, and the samples and tokens of one batch that reach it."""

    name: str
    inputs: int
    outputs: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class ExpertCost:
    """What `kept` surviving experts a layer and task cost after all tasks.

    `candidates` and `experts` count the last task's candidates and all frozen experts, over all layers; `trainable` are
    parameters of the last task in its two phases; `frozen`, `bases` and `routers` are bytes that stay (`routers` with
    prototypes). `forward_flops` are what the last task's routing and chosen experts add to the forward pass of a batch;
    `step_flops` the correction of a step in its second phase.
    """

    kept: int
    candidates: int
    experts: int
    trainable: tuple[int, int]
    frozen: int
    bases: int
    routers: int
    forward_flops: int
    step_flops: int

    @property
    def stored(self) -> int:
        """All bytes that stay."""
        return self.frozen + self.bases + self.routers


def places_of(model: nn.Module, run: Callable[[], Any], options: IGSP) -> list[ExpertPlace]:
    """Return where `options` puts experts beside the layers of `model`; `run()` is its forward pass on a batch.

    Raises:
        OptionError: no layer matches, one has no linear layer inside, or experts are too wide for one.
    """
    sites, seen, handles = find_target_modules(model, options.patterns), dict[str, tuple[int, int]](), []
    refuse_narrow(sites, options.width)
    for site in sites:
        handles.append(site.module.register_forward_hook(_noting(site, seen), with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [ExpertPlace(site.name, site.inputs, site.outputs, *seen.get(site.name, (0, 0))) for site in sites]


def _noting(site: TargetModule, seen: dict[str, tuple[int, int]]) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        samples = x.shape[1] if site.batch_axis == 1 and x.ndim == 3 else x.shape[0]
        before = seen.get(site.name, (0, 0))
        seen[site.name] = before[0] + samples, before[1] + x.numel() // x.shape[-1]

    return note


def predict_experts(places: Sequence[ExpertPlace], options: IGSP, kept: int, tasks: int) -> ExpertCost:
    """Return the cost of `tasks` tasks each of which keeps `kept` of its candidates in every layer.

    Raises:
        OptionError: `kept` is more than the candidates, or there is no task.
    """
    if not 0 <= kept <= options.candidates or tasks < 1:
        raise OptionError(
            f"kept={kept}, tasks={tasks}: expected 0 to candidates={options.candidates} experts and at least one task"
        )
    parts = [_layer(place, options, kept, tasks) for place in places]
    return ExpertCost(
        kept=kept,
        candidates=sum(part.candidates for part in parts),
        experts=sum(part.experts for part in parts),
        trainable=(sum(part.trainable[0] for part in parts), sum(part.trainable[1] for part in parts)),
        frozen=sum(part.frozen for part in parts),
        bases=sum(part.bases for part in parts),
        routers=sum(part.routers for part in parts),
        forward_flops=sum(part.forward_flops for part in parts),
        step_flops=sum(part.step_flops for part in parts),
    )


def _layer(place: ExpertPlace, options: IGSP, kept: int, tasks: int) -> ExpertCost:
    d, o, r = place.inputs, place.outputs, options.width
    one = sum(math.prod(shape) for shape in shapes(options.kind, r, d, o).values())
    history = used = fresh = survive = routers = 0
    for _ in range(tasks):
        history, used = history + survive, min(d, used + r * survive)
        fresh = min(options.candidates, (d - used) // r)
        survive = min(kept, fresh)
        record = FLOAT * ((history + survive) * (d + 1) + 2 * d + 1) + INDEX * (history + survive)
        routers = record if options.router == "shared" else routers + record
    everyone = history + fresh
    trains = not survive or options.router_after == "train"
    chosen = min(options.top_k, everyone)
    sides = PARTS[options.orthogonal]
    kept_inputs, kept_outputs = used * ("down" in sides), min(o, r * history) * ("up" in sides)
    total = history + survive
    return ExpertCost(
        kept=kept,
        candidates=fresh,
        experts=total,
        trainable=(
            fresh * one + everyone * (d + 1),
            survive * (one - (r * d if options.orthogonal == "structural" else 0)) + trains * total * (d + 1),
        ),
        frozen=FLOAT * total * one,
        bases=FLOAT * (d * min(d, r * total) + o * min(o, r * total)),
        routers=routers,
        forward_flops=2 * place.tokens * chosen * r * (d + o) + 2 * place.samples * everyone * (d + 1),
        step_flops=4 * survive * r * (d * kept_inputs + o * kept_outputs),
    )
