"""A run over a sequence of tasks: saved after each, taken up where it stopped, written when finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from reference.training.tracking import write_json, writing


class SavedRun:
    """Base class of runs: `finished` will hold the results, `checkpoint` the state of a begun run until then.

    A child has `count` tasks of which `done` are finished, and the methods `_begin()`, `_one_task(number)` (which calls
    `_save()` in the end), `_results()`, `_state()`, `_take_up(state)`, `_identity()` with the settings that must be
    equal for a run to go on, and `_checked(saved, path)`, which refuses others.
    """

    finished: Path
    checkpoint: Path
    count: int
    done: int
    device: torch.device | str = "cpu"

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Go through all tasks that are left and return what the results file holds.

        Raises:
            ExperimentError: resuming a run of other settings, or a file cannot be written.
        """
        if resume and self.finished.exists():
            self.checkpoint.unlink(missing_ok=True)  # killed between the two
            return self._checked(json.loads(self.finished.read_text(encoding="utf-8")), self.finished)
        self._begin(resume and self._load())
        for number in range(self.done, self.count):
            self._one_task(number)
        results = self._results()
        write_json(self.finished, results)
        self.checkpoint.unlink()
        return results

    def _save(self) -> None:
        """Write the state of this moment in one move; the optimizer's state holds the bases as well."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.checkpoint) as draft:
            torch.save({"identity": json.dumps(self._identity()), **self._state()}, draft)

    def _load(self) -> bool:
        """Take up the saved state, if there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self._checked(json.loads(state["identity"]), self.checkpoint)
        self._take_up(state)
        return True
