"""A Trainer in two processes by `accelerate launch`: DDP, FSDP2, their checkpoints, explicit optimizers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import SHARDS_NEEDED, SHARDS_ON_CPU

pytest.importorskip("transformers", minversion="5.0")  # before, FSDP2 had other arguments
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(not SHARDS_ON_CPU, reason=SHARDS_NEEDED),
]
SUPPORT = Path(__file__).resolve().parents[1] / "support"
NAMES = [
    "replicas",
    "shards",
    "sharded_checkpoints_and_a_trainer_class_of_ones_own",
    "a_basis_file_of_replicas_in_shards_and_an_optimizer_class",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    paths = [str(SUPPORT.parents[1]), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = str(SUPPORT / "trainer_scenarios.py")
    run = subprocess.run(
        [*launch, script, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    told = [folder / f"outcome-{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in told), run.stderr[-3000:]
    return [json.loads(path.read_text()) for path in told]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_keep_and_learn(name: str, outcomes: list[dict[str, str]]) -> None:
    for outcome in outcomes:
        assert outcome.get(name, "not run") == "passed", outcome.get(name, "not run")
