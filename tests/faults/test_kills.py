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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nullspace_optim.files.basis_file import load
from reference.methods import METHODS

TIMES = {
    "seconds", "seconds_by_activity", "peak_memory", "training", "consolidations", "seconds_per_iteration",
    "consolidation_seconds_per_1000_images",
}  # fmt: skip

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


class Victims:
    """A process that forks children to be killed (see `victim.py`)."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, str(Path(__file__).parents[1] / "support" / "victim.py"), *options]
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
            with suppress(ProcessLookupError):  # it had ended, and the server had reaped it
                os.kill(child, signal.SIGKILL)
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


@pytest.fixture(scope="module")
def experimenters() -> Iterator[Victims]:
    pytest.importorskip("open_clip")
    pytest.importorskip("sklearn")
    server = Victims("--reference")
    yield server
    server.close()


QUICK = ("finetune", "zscl", "replay", "nullspace-reference")  # the others are killed at night
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in sorted(METHODS)]
DEATHS = ("beginning", "training-0", "saving-0", "training-1", "consolidation-1", "saving-1", "ending")
UNTRAINED = ("beginning", "saving-0", "saving-1", "ending")


@pytest.mark.fault(119)
@pytest.mark.parametrize("method", EVERY)
def test_every_method_survives_a_kill_in_every_phase(method: str, experimenters: Victims, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert experimenters.run(f"experiment:{method}", straight) == 0
    for death in DEATHS if METHODS[method].trains else UNTRAINED:
        assert experimenters.run(f"experiment:{method}:{death}", broken) == -signal.SIGKILL, death
    left = torch.load(broken / "checkpoint.pt", weights_only=True)  # the last kill fell between the results and the end
    weights = torch.load(straight / "weights.pt", weights_only=True)
    assert all(torch.equal(left["method"]["model"][key], value) for key, value in weights.items())
    assert experimenters.run(f"experiment:{method}", broken) == 0
    check_results(straight, broken)


@pytest.mark.nightly
@pytest.mark.fault(119)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_survives_kills_at_random_moments(method: str, experimenters: Victims, tmp_path: Path) -> None:
    began = time.perf_counter()
    assert experimenters.run(f"experiment:{method}", tmp_path / "straight") == 0
    lasting = time.perf_counter() - began
    dice, killed, number = random.Random(method), 0, 0
    while killed < 5:
        folder = tmp_path / f"broken{number}"
        status = experimenters.run(f"experiment:{method}", folder, delay=dice.random() * lasting)
        killed += status != 0
        if status == 0 or killed == 5:
            assert experimenters.run(f"experiment:{method}", folder) == 0
            check_results(tmp_path / "straight", folder)
            number += 1


def check_results(straight: Path, broken: Path) -> None:
    """Compare what a run that was killed leaves behind with one that was not: every figure, every weight."""
    one, two = (json.loads((place / "results.json").read_text(encoding="utf-8")) for place in (straight, broken))
    assert one.keys() == two.keys()
    assert {key for key in one if one[key] != two[key]} <= TIMES
    assert [task["loss"] for task in one["training"]] == [task["loss"] for task in two["training"]]
    if (broken / "weights.pt").exists():  # a kill after the results leaves no time to write them
        assert identical(leaves(broken / "weights.pt"), leaves(straight / "weights.pt"))
    assert {path.name for path in broken.iterdir()} - {"weights.pt", "weights.draft"} == {"results.json", "log.jsonl"}
