"""What every test file relies on: seeds, one torch thread a worker, no network, and the folder of real data."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

# Properties: 50 examples of each, the same ones every time; `--hypothesis-profile nightly` draws 1,000 new ones.
CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", max_examples=50, derandomize=True, **CALM)
settings.register_profile("nightly", max_examples=1000, print_blob=True, **CALM)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real data: `NULLSPACE_DATA`, else `../shared/data` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("NULLSPACE_DATA", beside))
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not a folder; set NULLSPACE_DATA")
    return root
