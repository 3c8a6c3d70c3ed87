"""SIGKILL at random moments of save, step, consolidate and a whole experiment: nothing is torn, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nullspace_optim.persistence import load

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


class Victims:
    """A process that forks children to be killed (see `victim.py`)."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("victim.py")), *options]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def run(self, job: str, folder: Path, delay: float | None = None) -> int:
        """Run a job, kill it after `delay` seconds if it still runs, and return its exit status."""
        assert self.server.stdin is not None
        folder.mkdir(exist_ok=True)
        print(job, folder, file=self.server.stdin, flush=True)
        child = int(self.answer())
        if delay is not None:
            while job == "save" and not (folder / "started").exists():
                time.sleep(0.005)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)  # at worst a zombie: the server reaps it after this
        status = int(self.answer())
        assert status in (0, -signal.SIGKILL), (folder / "error.txt").read_text(encoding="utf-8")
        return status

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    server = Victims()
    yield server
    server.close()


def leaves(path: Path) -> list[Any]:
    return torch.utils._pytree.tree_leaves(torch.load(path, weights_only=True))


def identical(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, two)
    )


@pytest.mark.fault(85)
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.nightly)])
def test_a_killed_save_leaves_the_old_or_the_new_file_whole(kills: int, victims: Victims, tmp_path: Path) -> None:
    dice = random.Random(kills)
    found = set()
    for number in range(kills):
        victims.run("save", tmp_path, delay=dice.random() * 0.1 + (0.5 if not number else 0.0))
        (tmp_path / "started").unlink()
        if (tmp_path / "bases").exists():
            found.add(len(load(tmp_path / "bases")))
    assert found and found <= {0, 11}, found
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".tmp"} == {"bases"}


@pytest.mark.fault(85, 119)
@pytest.mark.parametrize("kills", [4, pytest.param(70, marks=pytest.mark.nightly)])
def test_a_killed_training_resumes_to_the_same_bits(kills: int, victims: Victims, tmp_path: Path) -> None:
    dice = random.Random(kills)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    began = time.perf_counter()
    assert victims.run("train", straight) == 0
    lasting = time.perf_counter() - began
    killed = runs = 0
    while killed < kills:
        assert (runs := runs + 1) < 20 * kills, "the jobs end before they are killed"
        status = victims.run("train", broken, delay=dice.random() * lasting / 2)
        killed += status != 0
        if (broken / "bases").exists():
            load(broken / "bases")
        if status == 0:
            check_and_start_over(straight, broken)
    while not (broken / "final.pt").exists():
        victims.run("train", broken)
    check_and_start_over(straight, broken)


def check_and_start_over(straight: Path, broken: Path) -> None:
    """Compare the end of a run that was killed with the one that was not."""
    assert identical(leaves(straight / "final.pt"), leaves(broken / "final.pt"))
    assert (straight / "bases").read_bytes() == (broken / "bases").read_bytes()
    for name in ("final.pt", "bases"):
        (broken / name).unlink()


@pytest.mark.fault(119)
@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.nightly)])
def test_a_killed_experiment_resumes_to_the_same_matrix_and_weights(kills: int, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("sklearn")
    victims = Victims("--reference")
    try:
        began = time.perf_counter()
        assert victims.run("experiment", tmp_path / "straight") == 0
        lasting = time.perf_counter() - began
        expected = json.loads((tmp_path / "straight" / "results.json").read_text(encoding="utf-8"))
        dice, killed, number = random.Random(kills), 0, 0
        while killed < kills:
            folder = tmp_path / f"broken{number}"
            status = victims.run("experiment", folder, delay=(0.1 + dice.random()) * lasting / 2)
            killed += status != 0
            if status == 0 or killed == kills:
                assert victims.run("experiment", folder) == 0
                results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
                assert results["accuracy"] == expected["accuracy"]
                assert identical(leaves(folder / "weights.pt"), leaves(tmp_path / "straight" / "weights.pt"))
                number += 1
    finally:
        victims.close()
