"""Costs of training and consolidation: seconds per iteration and per 1,000 consolidated images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def summary_of_steps(steps: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of (loss, seconds) of each step: how many there were, mean loss of the last tenth, median seconds."""
    losses, seconds = zip(*steps)
    return {
        "iterations": len(steps),
        "loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        "seconds_per_iteration": float(np.median(seconds)),
    }


def costs(training: Sequence[dict[str, Any]], consolidations: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Seconds per iteration and per 1,000 consolidated images; None where there were none.

    Iterations: median over the tasks after the first, since some methods protect nothing before it ends.
    """
    iterations = [task["seconds_per_iteration"] for task in training[1:] or training]
    images = sum(part["images"] for part in consolidations)
    seconds = sum(part["seconds"] for part in consolidations)
    return {
        "seconds_per_iteration": float(np.median(iterations)) if iterations else None,
        "consolidation_seconds_per_1000_images": 1000 * seconds / images if images else None,
    }
