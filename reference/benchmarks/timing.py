"""Clocks: what is compared runs turn by turn in one process, so that a slow moment of the machine meets both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

Run = Callable[[], object]


def seconds(run: Run, device: torch.device) -> float:
    """How long `run` takes, work that it queued on `device` included."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Return when all queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(runs: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run, A B A B ..., `repeats` times, after one turn that does not count."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(seconds(run, device))
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of neighbouring runs."""
    return median(a / b for a, b in zip(over, under, strict=True))
