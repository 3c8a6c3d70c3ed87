"""The routing that a forward pass is asked for, and the place in the run: what all layers with experts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from ...errors import OptionError
from ..options import Plan


class Routing(Enum):
    """Ways to route the samples of a forward pass."""

    AUTOMATIC = "CURRENT in training and once the task at work has taken a step, else the task finished last"
    CURRENT = "the task at work"
    TASK = "one finished task"
    SAMPLES = "the finished task that is named for each sample"
    NEAREST = "each sample by itself: by the shared router, or for the task that its tower recognises"
    BACKBONE = "no experts"


@dataclass
class RoutingContext:
    """Names of the finished `tasks`, the `routing` that is asked for; `plan`, step and phase of the task at work.

    `task` is the number of the finished task for `Routing.TASK`; `of_samples` `[n]`, int64, has one number a sample for
    `Routing.SAMPLES`, -1 for none; `looking` is the recognition for which a tower runs without experts. A forward pass
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

    def __post_init__(self) -> None:
        self.move_to(0, True)

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

    @contextmanager
    def using(self, routing: Routing, task: int | None = None, of_samples: Tensor | None = None) -> Iterator[None]:
        """Route in this way inside the context."""
        before = self.routing, self.task, self.of_samples
        self.routing, self.task, self.of_samples = routing, task, of_samples
        try:
            yield
        finally:
            self.routing, self.task, self.of_samples = before
