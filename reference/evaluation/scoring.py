"""Accuracy on every task after every task, in one or several ways of scoring, with the images that were right.

A way of scoring is one of the method's `evaluations` (with or without the task's number, say) and a rule for prompt
templates. The first of both fill the accuracy matrix; all others are stored beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reference.config import Config
from reference.data.tasks import Task
from reference.evaluation.geometry import gap_figures
from reference.methods import Method
from reference.training.steps import accuracy, scores

Rule = Literal["first", "all", "gnsp"]
Gap = dict[str, float] | None


@dataclass
class Board:
    """One way of scoring: the pretrained row, then one row per finished task; `right[0]` belongs to `pretrained`.

    `accuracy[j][i]` is in percent, NaN where it was not measured; `right[j][i]` is `packed` booleans, one an image;
    `gaps[j][i]` are `gap_figures`, None where they were not measured.
    """

    pretrained: list[float] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)
    right: list[list[str]] = field(default_factory=list)
    gaps: list[list[Gap]] = field(default_factory=list)

    def add(self, row: list[Tensor | str | None], gaps: list[Gap] | None = None) -> None:
        """Append what was found for each task: booleans, the packed entry of an earlier row, or None; and gaps."""
        self.gaps.append(gaps or [None] * len(row))
        entries = ["" if cell is None else cell if isinstance(cell, str) else packed(cell) for cell in row]
        values = [float("nan") if not entry else accuracy(unpacked(entry)) for entry in entries]
        self.right.append(entries)
        if self.pretrained:
            self.accuracy.append(values)
        else:
            self.pretrained = values


def packed(correct: Tensor) -> str:
    """Booleans `[n]` as `<n>:<base64 of their bits>`."""
    return f"{len(correct)}:{base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode('ascii')}"


def unpacked(text: str) -> Tensor:
    """The booleans `[n]` that `packed` wrote."""
    count, _, bits = text.partition(":")
    whole = np.unpackbits(np.frombuffer(base64.b64decode(bits), dtype=np.uint8))
    return torch.from_numpy(whole[: int(count)].astype(bool))


class Scorer:
    """Scores the model of a method on all tasks."""

    def __init__(self, method: Method, tasks: list[Task], config: Config) -> None:
        self.method, self.tasks, self.config = method, tasks, config
        self.rules: tuple[Rule, ...] = tuple(dict.fromkeys((config.evaluation_templates, *config.also_templates)))

    @property
    def names(self) -> list[str]:
        """The ways of scoring; the first is the main one."""
        return [f"{kind}, {rule} templates" for kind in self.method.evaluations for rule in self.rules]

    def add_row(self, boards: dict[str, Board], number: int | None) -> None:
        """Score after task `number` (None: before the first) and append a row to every board."""
        last = number == len(self.tasks) - 1
        rows: dict[str, list[Tensor | str | None]] = {name: [] for name in self.names}
        gaps: list[Gap] = []
        for i, task in enumerate(tqdm(self.tasks, desc="evaluate", leave=False, disable=None)):
            own = self.method.scored == "own"
            found: Iterable[Tensor | str | None]
            if number is None or self.method.scored == "all" or (last and not own) or (own and i == number):
                found = self._score(task, i, number, gaps)
            else:
                found = [boards[name].right[-1][i] if own else None for name in self.names]
                gaps.append(boards[self.names[0]].gaps[-1][i] if own else None)
            for row, cell in zip(rows.values(), found):
                row.append(cell)
        for name, row in rows.items():
            boards.setdefault(name, Board()).add(row, gaps if name == self.names[0] else None)

    def _score(self, task: Task, i: int, number: int | None, gaps: list[Gap]) -> list[Tensor]:
        found: list[Tensor] = []
        counts = tuple(self._templates(rule, task, i, number) for rule in self.rules)
        for kind in self.method.evaluations:
            with self.method.evaluating(kind, task):
                look = None if found else lambda *seen: gaps.append(gap_figures(*seen))
                vectors = partial(self.method.class_vectors, kind, task)
                found += scores(self.method.clip, task, self.config, counts, look, vectors)
        return found

    def _templates(self, rule: Rule, task: Task, i: int, number: int | None) -> int:
        """Number of prompt templates of a class; `gnsp`: one for tasks before the one just trained, else all."""
        single = rule == "first" or (rule == "gnsp" and number is not None and i < number)
        return 1 if single else len(task.templates)
