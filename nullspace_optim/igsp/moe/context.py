"""The routing that a forward pass is asked for, and the place in the run: what all layers with experts share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ...errors import NullSpaceWarning, OptionError
from ..options import Plan

ALONE = (
    "this copy of a model has experts and no optimizer, so opt.task() does not reach it: without gradients it runs the "
    "task finished last; to choose the task copy both, copy.deepcopy((model, opt))"
)
FROZEN = (
    "the experts at work do not require gradients: model.requires_grad_(False) reaches them too; freeze the backbone "
    "before the optimizer is made, or call model.igsp.requires_grad_(True)"
)
KEPT = 16  # routings that are remembered


class Routing(Enum):
    """Ways to route the samples of a forward pass."""

    AUTOMATIC = "CURRENT in training and once the task at work has taken a step, else the task finished last"
    CURRENT = "the task at work"
    TASK = "one finished task"
    SAMPLES = "the finished task that is named for each sample"
    NEAREST = "each sample by itself: by the shared router, or for the task that its tower recognises"
    BACKBONE = "no experts"


def in_backward() -> bool:
    """Return True inside a backward pass, which repeats forwards under activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass
class RoutingContext:
    """Names of the finished `tasks`, the `routing` that is asked for; `plan`, step and phase of the task at work.

    `task` is the number of the finished task for `Routing.TASK`; `of_samples` `[n]`, int64, has one number a sample for
    `Routing.SAMPLES`, -1 for none; `looking` is the recognition for which a tower runs without experts; `alone` is set
    in a copy of the model until its optimizer, if that was copied as well, finds it; `told` was said. A forward pass
    reads the flags `begun` and `warming` (samples are spread by noise alone, before routers and penalty begin to act)
    and never the counter `steps`: a compiled model would be compiled again in every step.
    """

    plan: Plan
    tasks: list[str] = field(default_factory=list)
    routing: Routing = Routing.AUTOMATIC
    task: int | None = None
    of_samples: Tensor | None = None
    collecting: bool = False
    looking: object = None
    alone: bool = False
    told: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "alone": True}

    def __post_init__(self) -> None:
        self.move_to(0, True)
        self._used: list[tuple[Routing, int | None, Tensor | None]] = []  # since backward last repeated a forward
        self._repeated = False

    def tell(self, text: str, when: bool = True) -> None:
        """Warn of `text` once."""
        if when and text not in self.told:
            self.told.add(text)
            warnings.warn(text, NullSpaceWarning, stacklevel=4)

    def tell_misspelt(self, names: Sequence[str | None]) -> None:
        """Warn once of each name that is nearly that of a finished task: it runs the plain backbone."""
        for name in dict.fromkeys(names):
            if name is None or name in self.tasks:
                continue
            near = [task for task in get_close_matches(name, self.tasks, 1, 0.85) if _letters(task) != _letters(name)]
            if near:
                self.tell(f"task('{name}') is no finished task and runs the plain backbone; did you mean '{near[0]}'?")

    def move_to(self, steps: int, first_phase: bool) -> None:
        """Set how many steps the task at work has taken, and whether it is in its first phase."""
        self.steps, self.first_phase = steps, first_phase
        self.begun, self.warming = steps > 0, first_phase and steps < self.plan.warm

    def tasks_of(self, samples: Tensor, layer: str) -> Tensor:
        """Return the number of the task that is named for each of `samples` `[n, ...]` in `layer`, -1 for none: `[n]`.

        Raises:
            OptionError: another number of samples than of names.
        """
        numbers = self.of_samples
        assert numbers is not None
        if len(numbers) != len(samples):
            raise OptionError(
                f"task([...]) names the tasks of {len(numbers)} samples, but layer '{layer}' sees {len(samples)}; "
                "give one name a sample, and images and prompts in contexts of their own"
            )
        return numbers.to(samples.device)

    def follow(self, routing: Routing, task: int | None) -> None:
        """Note a forward pass with this `routing`; refuse one that backward repeats if none was routed so before.

        Raises:
            OptionError: activation checkpointing, and the pass ran in another context of `task`.
        """
        if torch.compiler.is_compiling():
            return
        present, now = in_backward(), (routing, task, self.of_samples)
        if self._repeated and not present:
            self._used = []
        self._repeated = present
        found = [place for place, used in enumerate(self._used) if used[:2] == now[:2] and _equal(used[2], now[2])]
        if present and not found:
            raise OptionError(
                "backward() repeats a forward pass (activation checkpointing) that ran in another context of task(): "
                "call backward() inside `with opt.task(...)` as well; task(None) chooses once per call of an encoder, "
                "so name the tasks there, or switch activation checkpointing off"
            )
        if not present:
            self._used = [*(used for place, used in enumerate(self._used) if place not in found), now][-KEPT:]

    @contextmanager
    def using(self, routing: Routing, task: int | None = None, of_samples: Tensor | None = None) -> Iterator[None]:
        """Route in this way inside the context."""
        before = self.routing, self.task, self.of_samples
        self.routing, self.task, self.of_samples = routing, task, of_samples
        try:
            yield
        finally:
            self.routing, self.task, self.of_samples = before


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool((one == other).all())


def _letters(name: str) -> str:
    """Return `name` without digits: "task 1" is another task than "task 2", not a slip."""
    return re.sub(r"\d", "", name)
