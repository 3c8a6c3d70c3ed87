from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

from reference.training import tracking
from reference.training.tracking import peak_memory, reset_peak_memory


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/proc/self/clear_refs").exists(), reason="only Linux counts anew"
)
def test_the_peak_of_one_run_does_not_hold_that_of_the_run_before() -> None:
    def peak() -> float:
        found = peak_memory()["process_mib"]
        assert found is not None
        return found

    reset_peak_memory()
    before = peak()
    large = torch.ones(2**26)  # 256 MiB
    while_large = peak()
    del large
    reset_peak_memory()
    assert while_large > before + 200 and peak() < while_large - 200


def test_results_say_when_and_from_which_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    package = tmp_path / "reference"
    package.mkdir()
    (package / "tracking.py").write_text("1")
    monkeypatch.setattr(tracking, "__file__", str(package / "tracking.py"))
    assert tracking.provenance()["commit"] is None
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    found = tracking.provenance()
    assert found["commit"] == head[:10] and date.fromisoformat(found["date"] or "") <= date.today()
    (package / "tracking.py").write_text("2")
    assert tracking.provenance()["commit"] == head[:10] + "+"
