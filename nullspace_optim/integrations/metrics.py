"""Figures of protection under fixed names, for the logger of any trainer."""

from __future__ import annotations

from typing import Any

from ..report import ConsolidationReport
from .unwrap import unwrap


def metrics(optimizer: Any, report: ConsolidationReport | None = None) -> dict[str, float]:
    """Return the figures of `optimizer` that a logger shows; costs about one step, so once an epoch is enough.

    ``nullspace/free``: share of the directions that are free; ``nullspace/frozen``: share of the trained numbers that
    no later step can change; ``nullspace/drift``: largest relative change of a kept quantity (rounding is 1e-7 to
    1e-5). With the `report` of a consolidation also ``nullspace/kept``: share of the outputs of earlier tasks that is
    unmoved, of the task that has moved most (0 where they moved by more than their size).

    Several processes (FSDP2) must all call it.

    Args:
        optimizer: a `NullSpaceOptimizer`, or what a framework made of it.
        report: what `consolidate` returned.

    Raises:
        OptionError: there is no `NullSpaceOptimizer` inside.
    """
    ours = unwrap(optimizer)
    numbers = sum(parameter.numel() for parameter in ours._core.parameters.values())
    still = sum(basis.still for basis in ours.bases.values())
    found = {
        "nullspace/free": ours.capacity().mean,
        "nullspace/frozen": still / max(1, numbers),
        "nullspace/drift": ours.verify().worst,
    }
    if report is not None and report.drift:
        found["nullspace/kept"] = max(0.0, 1.0 - max(report.drift.values()))
    return found
