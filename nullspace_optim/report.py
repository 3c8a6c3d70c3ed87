"""Reports of `consolidate` and `verify`: plain values that print as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from math import isnan
from typing import Any

from .formatting import html_table, name_some, size, table
from .subspace.basis import Fate


@dataclass(frozen=True)
class ParameterReport:
    """One parameter after a consolidation: its fate, the reason, and the share of the task's energy that is kept.

    `numbers` counts its elements and `still` those that no later step can change. `met` tells whether this task read
    it. `leading` is the share of the task's energy in its strongest direction. `held` is the rank with each direction
    counted by its scale; `None` where all directions are kept fully.
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
    numbers: int = 0
    still: int = 0
    met: bool = True
    leading: float = float("nan")

    @property
    def free(self) -> int:
        """Directions of the input side that later tasks may use (those kept softly count by their free share)."""
        return int(self.dimension - (self.rank if self.held is None else self.held))


SHOWN = 8  # lines of one table of a printed report


@dataclass(frozen=True)
class ConsolidationReport:
    """The result of one `consolidate`.

    `samples` counts the samples of the pass, `dataset` those of the loader's data set (`None`: unknown), `fed` says how
    the first batch was read. `drift` is the relative change of the outputs of earlier tasks, by task, on those of their
    first samples that are still in memory. Prints as a summary; `table` lists every parameter, `to_dict` holds all.
    """

    task: str
    model: str
    policy: str
    batches: int
    parameters: tuple[ParameterReport, ...]
    seconds: float
    bytes: int
    transient_bytes: int
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    samples: int | None = None
    dataset: int | None = None
    fed: str = ""
    drift: dict[str, float] = field(default_factory=dict)

    @property
    def fates(self) -> dict[Fate, int]:
        """Number of parameters of each fate; they add up to all trainable parameters."""
        return {fate: sum(p.fate is fate for p in self.parameters) for fate in Fate}

    def of(self, fate: Fate) -> tuple[ParameterReport, ...]:
        """Return the parameters of one fate."""
        return tuple(p for p in self.parameters if p.fate is fate)

    @property
    def met(self) -> tuple[str, ...]:
        """Names of the parameters that this task read."""
        return tuple(p.name for p in self.parameters if p.met)

    @property
    def still_share(self) -> float:
        """Share of the trained numbers that no later step can change."""
        return still_share(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, fit for JSON."""
        found = asdict(self)
        for line in found["parameters"]:
            line["fate"] = line["fate"].value
        return {**found, "fates": {fate.value: count for fate, count in self.fates.items()}}

    def __str__(self) -> str:
        return "\n".join([*self._summary(), *self._lines(SHOWN)])

    def table(self) -> str:
        """Return the summary and one line for every parameter."""
        return "\n".join([*self._summary(), *self._lines(None)])

    def _summary(self) -> list[str]:
        counts = ", ".join(f"{count} {fate.value}" for fate, count in self.fates.items() if count)
        unmet = len(self.parameters) - len(self.met)
        seen = f"{self.batches} batches"
        if self.samples is not None:
            seen += f", {self.samples} samples" + (f" of {self.dataset}" if self.dataset is not None else "")
        return [
            f"consolidated '{self.task}' of {self.model} with {self.policy}: {seen}, {self.seconds:.1f} s",
            *(f"warning: {text}" for text in self.warnings),
            *([f"fed: {self.fed}"] if self.fed else []),
            f"parameters: {counts}; {unmet} of {len(self.parameters)} not read by this task; "
            f"{self.still_share:.0%} of the trained numbers are frozen",
            f"bases and anchors: {size(self.bytes, 3, 'B')}"
            + (f", transient copy in a step {size(self.transient_bytes, 3, 'B')}" if self.transient_bytes else ""),
            *(f"earlier task '{task}': outputs have moved by {moved:.2%}" for task, moved in self.drift.items()),
            *(f"note: {text}" for text in self.notes),
        ]

    def _lines(self, most: int | None) -> list[str]:
        lines: list[str] = []
        for fate in (Fate.PROTECTED, Fate.FULL):
            chosen = sorted(self.of(fate), key=lambda p: p.free / max(1, p.dimension))
            rows = [_row(p) for p in chosen[:most]]
            header = [f"{fate.value} ({len(chosen)})", "side", "rank", "new", "free", "energy kept", "old span lost"]
            lines += ["", table(header, rows)] if rows else []
            lines += (
                [f"... {len(chosen) - len(rows)} more, with more free directions"] if len(rows) < len(chosen) else []
            )
        for fate in (Fate.FREE, Fate.FROZEN):
            chosen = list(self.of(fate))
            if most is None and chosen:
                lines += ["", table([f"{fate.value} ({len(chosen)})", "why"], [[p.name, p.reason] for p in chosen])]
            elif chosen:
                lines += ["", *(f"{fate.value}: {text}" for text in _by_reason(chosen))]
        return lines

    def _repr_html_(self) -> str:
        """Return the summary and a table of all parameters for notebooks."""
        header = ["parameter", "fate", "rank", "new", "free", "energy kept", "why"]
        rows = [
            [p.name, p.fate.value, *(["", "", "", ""] if not p.dimension else _row(p)[2:6]), p.reason]
            for p in self.parameters
        ]
        return f"<pre>{escape(chr(10).join(self._summary()))}</pre>{html_table(header, rows)}"


def _row(p: ParameterReport) -> list[str]:
    lost = f"{p.dropped:.1%}" if p.dropped else "0"
    return [p.name, p.side, f"{p.rank}/{p.dimension}", f"+{p.added}", str(p.free), f"{p.energy:.4%}", lost]


def _by_reason(chosen: Sequence[ParameterReport]) -> list[str]:
    """Return one line for each reason: the count and three names."""
    groups: dict[str, list[str]] = {}
    for p in chosen:
        groups.setdefault(p.reason, []).append(p.name)
    return [f"{len(names)} {reason} ({name_some(names)})" for reason, names in groups.items()]


def still_share(parameters: Iterable[ParameterReport]) -> float:
    """Return the share of the trained numbers that no later step can change, 0 without parameters."""
    lines = list(parameters)
    return sum(p.still for p in lines) / max(1, sum(p.numbers for p in lines))


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    `kept` is `||W U - A|| / ||A||` per parameter (for frozen ones the relative change of the value), `limits` what
    rounding allows each of them, at least `tolerance`. `lost` names parameters with a basis that the model holds no
    longer. `buffers` names buffers that moved, `harmless` those whose change moved no output. `layers` holds, per task
    whose samples were found, the estimated relative drift per layer in execution order, the last entry being the
    output, and `bounds` the output drift that counts as broken: 1e-3, or three times the root of the energy that was
    cut off. `missing` names tasks whose samples were not found, `foreign` those that another `forward` was run for.
    `asked` tells whether a loader was given.
    """

    kept: dict[str, float]
    buffers: tuple[str, ...]
    layers: dict[str, dict[str, float]]
    missing: tuple[str, ...]
    tolerance: float
    limits: dict[str, float] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    bounds: dict[str, float] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    asked: bool = False

    @property
    def worst(self) -> float:
        """The largest relative change of a kept quantity; NaN if one of them is not a number."""
        return max(self.kept.values(), key=lambda drift: (isnan(drift), drift), default=0.0)

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the parameters that moved further than rounding allows, the farthest first."""
        found = [(drift, name) for name, drift in self.kept.items() if not drift <= self.limit(name)]
        return tuple(name for _, name in sorted(found, key=lambda pair: (not isnan(pair[0]), -pair[0])))

    @property
    def ok(self) -> bool:
        """True if something is protected, and everything that was looked at holds.

        That is every kept quantity, every buffer, the model's parameters, and, with a loader, at least one task, whose
        output drift is within its bound.
        """
        held = not (self.broken or self.buffers or self.lost)
        return bool(self.tasks) and held and not self.drifted and (bool(self.layers) or not self.asked)

    @property
    def drifted(self) -> tuple[str, ...]:
        """Names of the tasks whose outputs moved further than their bound."""
        return tuple(task for task in self.layers if not self.drift(task) <= self.bounds.get(task, self.tolerance))

    def limit(self, name: str) -> float:
        """Return the relative change that counts as broken for one parameter."""
        return max(self.tolerance, self.limits.get(name, 0.0))

    def drift(self, task: str) -> float:
        """Return the estimated relative drift of the final output on the samples of `task`."""
        return list(self.layers[task].values())[-1]

    def first_break(self, task: str) -> str | None:
        """Return the first layer whose output moved by more than `tolerance` on the samples of `task`."""
        return next((name for name, drift in self.layers[task].items() if not drift <= self.tolerance), None)

    def __str__(self) -> str:
        if not self.tasks:
            return "nothing is protected: no task has been consolidated"
        state = "holds" if self.ok else "BROKEN" if not self._unseen else "not shown"
        lines = [
            f"protection {state}: largest relative change of a kept direction {self.worst:.1e} "
            f"(tolerance {self.tolerance:.0e})",
            *(f"  '{name}' moved by {self.kept[name]:.1e} (limit {self.limit(name):.0e})" for name in self.broken),
            *(f"  '{name}' is protected but no longer in the model: the module was replaced" for name in self.lost),
            *(f"  buffer '{name}' moved" for name in self.buffers),
            *(f"  buffer '{name}' changed; no output moved" for name in self.harmless),
        ]
        for task in self.layers:
            first = self.first_break(task)
            where = f"first layer that moved: {first} ({self.layers[task][first]:.1e})" if first else "no layer moved"
            bound = f"; more than the bound {self.bounds.get(task, self.tolerance):.1e}" if task in self.drifted else ""
            lines.append(f"task '{task}': output drift {self.drift(task):.1e}; {where}{bound}")
        lines += [
            f"task '{task}': not compared, it was consolidated with another forward: pass the same forward="
            for task in self.foreign
        ]
        return "\n".join([*lines, *self._missing()])

    @property
    def _unseen(self) -> bool:
        """True if all that fails is that the loader showed no samples of any task."""
        held = not (self.broken or self.buffers or self.lost or self.drifted)
        return held and self.asked and not self.layers

    def _missing(self) -> list[str]:
        return [
            f"task '{task}': not compared, its samples are not in this loader (augmented, shuffled with drop_last, or "
            "another data set?)"
            for task in self.missing
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, fit for JSON."""
        return {**asdict(self), "ok": self.ok, "worst": self.worst}
