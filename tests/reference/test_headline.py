"""The figure of the README: its numbers are those of the committed runs, and its curve is what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from reference.evaluation.headline import HERE, METHODS, RUNS, draw, lost, matrices

README = HERE.parent / "README.md"


def test_what_is_lost_is_the_mean_over_earlier_tasks_since_each_was_trained() -> None:
    accuracy = np.array([[80.0, 5.0, 5.0], [70.0, 60.0, 5.0], [50.0, 62.0, 90.0]])
    assert lost(accuracy).tolist() == [-10.0, (-30.0 + 2.0) / 2]


def test_the_numbers_of_the_readme_are_those_of_the_committed_runs() -> None:
    means = [lost(matrices(RUNS, method).mean(axis=0))[-1] for method in METHODS]
    named = re.search(r"!\[[^]]*?([\d.]+) points[^]]*?([\d.]+), this library ([\d.]+)\]", README.read_text("utf-8"))
    assert named is not None
    assert [f"{-mean:.1f}" for mean in means] == list(reversed(named.groups()))


def test_the_figure_is_written(tmp_path: Path) -> None:
    draw(RUNS, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_the_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run of 'nullspace-reference'"):
        draw(tmp_path, tmp_path / "figure.png")
