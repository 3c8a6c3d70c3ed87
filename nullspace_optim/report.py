"""Reports of `consolidate` and `verify`: plain values that print as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan

from .formatting import size, table
from .subspace.basis import Fate


@dataclass(frozen=True)
class ParameterReport:
    """One parameter after a consolidation: its fate, the reason, and the share of the task's energy that is kept.

    `held` is the rank with each direction counted by its scale; `None` where all directions are kept fully.
    """

    name: str
    fate: Fate
    reason: str
    side: str = ""
    rank: int = 0
    dimension: int = 0
    added: int = 0
    energy: float = float("nan")
    dropped: float = 0.0
    held: float | None = None

    @property
    def free(self) -> int:
        """Directions of the input side that later tasks may use (those kept softly count by their free share)."""
        return int(self.dimension - (self.rank if self.held is None else self.held))


@dataclass(frozen=True)
class ConsolidationReport:
    """The result of one `consolidate`.

    `drift_allowed` is the relative change of the model's output on the consolidated data under a random update of the
    last task's size that keeps every protected direction: the effect of the energy that was cut
    off (an indication, not a bound: training moves outputs further than chance). `assumed_update` is
    True if the weights had not been trained before, so that an update of 1 % of each weight's norm was assumed.
    """

    task: str
    model: str
    policy: str
    batches: int
    parameters: tuple[ParameterReport, ...]
    drift_allowed: float
    assumed_update: bool
    seconds: float
    bytes: int
    transient_bytes: int
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    @property
    def fates(self) -> dict[Fate, int]:
        """Number of parameters of each fate; they add up to all trainable parameters."""
        return {fate: sum(p.fate is fate for p in self.parameters) for fate in Fate}

    def of(self, fate: Fate) -> tuple[ParameterReport, ...]:
        """Return the parameters of one fate."""
        return tuple(p for p in self.parameters if p.fate is fate)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {fate.value}" for fate, count in self.fates.items() if count)
        update = "1 % of each weight" if self.assumed_update else "the last task's"
        drift = (
            "how far the cut-off energy lets outputs drift is unknown: their shape depends on the weights"
            if isnan(self.drift_allowed)
            else f"the cut-off energy lets outputs drift by {self.drift_allowed:.2%} under one random update as large "
            f"as {update} (training moves them further, no bound)"
        )
        lines = [
            f"consolidated '{self.task}' of {self.model} with {self.policy}: "
            f"{self.batches} batches, {self.seconds:.1f} s",
            *(f"warning: {text}" for text in self.warnings),
            f"parameters: {counts}; bases and anchors {size(self.bytes, 3, 'B')}"
            + (f", transient copy in a step {size(self.transient_bytes, 3, 'B')}" if self.transient_bytes else ""),
            drift,
            *(f"note: {text}" for text in self.notes),
        ]
        for fate in (Fate.FREE, Fate.PROTECTED, Fate.FULL, Fate.FROZEN):
            lines += self._section(fate)
        return "\n".join(lines)

    def _section(self, fate: Fate) -> list[str]:
        chosen = self.of(fate)
        if not chosen:
            return []
        if fate in (Fate.PROTECTED, Fate.FULL):
            header = [f"{fate.value} ({len(chosen)})", "side", "rank", "new", "free", "energy kept", "old span lost"]
            rows = [
                [
                    p.name,
                    p.side,
                    f"{p.rank}/{p.dimension}",
                    f"+{p.added}",
                    str(p.free),
                    f"{p.energy:.4%}",
                    f"{p.dropped:.1%}" if p.dropped else "0",
                ]
                for p in chosen
            ]
            return ["", table(header, rows)]
        return ["", table([f"{fate.value} ({len(chosen)})", "why"], [[p.name, p.reason] for p in chosen])]


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    `kept` is `||W U - A|| / ||A||` per parameter (for frozen ones the relative change of the value); `buffers` names
    the buffers that moved; `layers` holds, per task whose samples were found, the estimated relative drift per layer
    in execution order, the last entry being the output.
    """

    kept: dict[str, float]
    buffers: tuple[str, ...]
    layers: dict[str, dict[str, float]]
    missing: tuple[str, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest relative change of a kept quantity; NaN if one of them is not a number."""
        return max(self.kept.values(), key=lambda drift: (isnan(drift), drift), default=0.0)

    @property
    def ok(self) -> bool:
        """True if every kept quantity is within `tolerance` and no buffer moved."""
        return self.worst <= self.tolerance and not self.buffers

    def drift(self, task: str) -> float:
        """Return the estimated relative drift of the final output on the samples of `task`."""
        return list(self.layers[task].values())[-1]

    def first_break(self, task: str) -> str | None:
        """Return the first layer whose output moved by more than `tolerance` on the samples of `task`."""
        return next((name for name, drift in self.layers[task].items() if not drift <= self.tolerance), None)

    def __str__(self) -> str:
        state = "holds" if self.ok else "BROKEN"
        lines = [
            f"protection {state}: largest relative change of a kept direction {self.worst:.1e} "
            f"(tolerance {self.tolerance:.0e})"
        ]
        broken = sorted(((v, k) for k, v in self.kept.items() if not v <= self.tolerance), reverse=True)
        lines += [f"  '{name}' moved by {value:.1e}" for value, name in broken]
        lines += [f"  buffer '{name}' moved" for name in self.buffers]
        for task in self.layers:
            first = self.first_break(task)
            where = f"first layer that moved: {first} ({self.layers[task][first]:.1e})" if first else "no layer moved"
            lines.append(f"task '{task}': output drift {self.drift(task):.1e}; {where}")
        lines += [
            f"task '{task}': not compared, its samples are not in this loader (augmented, or another data set?)"
            for task in self.missing
        ]
        return "\n".join(lines)
