"""The script on the page about several processes runs as it is printed, under DDP and under FSDP2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import SHARDS_NEEDED, SHARDS_ON_CPU

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "several-processes.md"

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.skipif(not SHARDS_ON_CPU, reason=SHARDS_NEEDED))]
)
def test_the_launch_script_runs(engine: str, tmp_path: Path) -> None:
    script = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, "train.py", engine], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"{engine}: protection holds, output drift " in run.stdout
    assert float(run.stdout.rsplit("output drift ", 1)[1].split()[0]) < 0.02
    assert (tmp_path / "bases.safetensors").exists() and (tmp_path / "checkpoint" / ".metadata").exists()
