from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from reference.tracking import peak_memory, reset_peak_memory


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
