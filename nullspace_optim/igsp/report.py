"""Reports of the mode: its status, and a finished task. Plain values that print as text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..formatting import table
from ..report import ConsolidationReport


@dataclass(frozen=True)
class PhaseStatus:
    """Phase of the task at work: `phase` 1 or 2, steps in it, and the reason why it began.

    `trainable` counts parameters that train now. By layer: `converged` is the step at which its router had converged
    (None: not yet), `flow` the running mean of the routing to every expert, as of phase 1, historical ones first.
    """

    task: int
    phase: int
    step: int
    reason: str
    trainable: int
    finished: tuple[str, ...]
    converged: dict[str, int | None]
    flow: dict[str, tuple[float, ...]]

    def __str__(self) -> str:
        names = {1: "subspace identification", 2: "orthogonal fine-tuning"}
        done = sum(at is not None for at in self.converged.values())
        return (
            f"task {self.task}, phase {self.phase} ({names[self.phase]}), step {self.step}: {self.reason}; "
            f"{self.trainable:,} trainable parameters; routers converged in {done} of {len(self.converged)} layers; "
            f"finished tasks: {', '.join(self.finished) or 'none'}"
        )


@dataclass(frozen=True)
class LayerReport:
    """One layer after a task: experts added as candidates, kept and pruned, and historical ones used again.

    `converged` is the step at which the router had converged (None: not before phase 1 ended), `curve` its Jaccard
    indices and KL divergences by window, `reuse` the share of routing that went to historical experts, `flow` that of
    every expert (history first), `used` directions of the input space that are occupied before, of
    `size`, and `rank` those that one expert takes.
    """

    name: str
    candidates: int
    kept: int
    reused: int
    history: int
    converged: int | None
    curve: tuple[tuple[int, float, float], ...]
    reuse: float
    flow: tuple[float, ...]
    used: int
    size: int
    rank: int

    @property
    def pruned(self) -> int:
        """Candidates that were deleted."""
        return self.candidates - self.kept


@dataclass(frozen=True)
class TrainableCount:
    """Trainable parameters of one task in both phases, and how many steps each took."""

    first: int
    second: int
    first_steps: int
    second_steps: int

    @property
    def mean(self) -> float:
        """`(N1 p1 + N2 p2) / (N1 + N2)`: trainable parameters averaged over steps."""
        steps = self.first_steps + self.second_steps
        return (self.first * self.first_steps + self.second * self.second_steps) / steps if steps else float("nan")


@dataclass(frozen=True)
class ExpertReport(ConsolidationReport):
    """The result of `consolidate` in mode ``"igsp"``.

    `experts` counts all parameters of frozen experts, `routers` those of routers and recognition; both together are
    what deployment needs beside the backbone.
    """

    layers: tuple[LayerReport, ...] = field(default=())
    trainable: TrainableCount = field(default=TrainableCount(0, 0, 0, 0))
    reason: str = ""
    experts: int = 0
    routers: int = 0

    def after(self, seconds: float) -> ExpertReport:
        """Return the report with the time it took."""
        return replace(self, seconds=seconds)

    def __str__(self) -> str:
        count = self.trainable
        kept, pruned = (sum(getattr(layer, what) for layer in self.layers) for what in ("kept", "pruned"))
        lines = [
            f"finished '{self.task}' of {self.model} in mode 'igsp': {self.batches} batches, {self.seconds:.1f} s",
            *(f"warning: {text}" for text in self.warnings),
            f"phase 1: {count.first_steps} steps, {count.first:,} trainable parameters ({self.reason})",
            f"phase 2: {count.second_steps} steps, {count.second:,} trainable parameters; "
            f"mean over steps {count.mean:,.0f}",
            f"candidates: {kept} kept, {pruned} pruned; stored so far: {self.experts:,} parameters of experts, "
            f"{self.routers:,} of routers and recognition",
            "",
        ]
        header = ["layer", "candidates", "kept", "reused", "history", "reuse", "converged", "directions used"]
        rows = [
            [
                layer.name,
                str(layer.candidates),
                str(layer.kept),
                str(layer.reused),
                str(layer.history),
                f"{layer.reuse:.0%}",
                "no" if layer.converged is None else str(layer.converged),
                f"{layer.used}/{layer.size}",
            ]
            for layer in self.layers
        ]
        return "\n".join([*lines, table(header, rows)])
