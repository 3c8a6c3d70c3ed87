"""Floors and peers of the correction at tiny sizes: what is counted, and that all of it runs."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from counts import counted
from torch import nn

from nullspace_optim import FixedRank, NullSpaceOptimizer
from reference.benchmarks import counting, peers
from reference.benchmarks.outcome import Table
from reference.benchmarks.workload import Still
from reference.training.tracking import resident_peak

CPU = torch.device("cpu")


def column(table: Table, name: str) -> list[str]:
    return [row[table.header.index(name)] for row in table.rows]


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("k", [8, 24])
def test_counted_operations_are_those_that_torch_counts(k: int, precision: Any) -> None:
    model = nn.Linear(32, 16, bias=False)
    optimizer = NullSpaceOptimizer(Still(model.parameters()), model, policy=FixedRank(k), precision=precision)
    optimizer.consolidate([torch.randn(40, 32)], progress=False)
    optimizer.step()
    with counted() as counter:
        for _ in range(16):
            optimizer.step()
    (work,) = counting.correction(optimizer.bases, precision)
    assert 16 * (work.float32 + work.bfloat16) == counter.get_total_flops()
    assert work.bfloat16 == (0 if precision == "exact" else 4 * 16 * 32 * min(k, 32 - k))


def test_bytes_and_floor_of_one_matrix_by_hand() -> None:
    anchor = counting.matrix_work(6, 8, 2, "exact")
    assert (anchor.float32, anchor.bytes) == (4 * 6 * 8 * 2, 4 * (2 * 6 * 8 + 2 * 8 + 2 * 6))
    difference = counting.matrix_work(6, 8, 6, "exact")
    again = 4 * (2 * 6 * 8 + 6 * (6 + 8)) / 16
    assert difference.float32 == 4 * 6 * 8 * 2 + 4 * 6 * 8 * 6 / 16
    assert difference.bytes == 4 * (5 * 6 * 8 + 2 * 8) + again
    machine = counting.Rates("", float32=100.0, bfloat16=1000.0, bandwidth=1e9)
    assert anchor.floor(machine) == 3.84
    assert counting.Work(bytes=2e9, float32=1.0).floor(machine) == 2.0


def test_floors_are_printed_by_model_and_rank() -> None:
    outcome = counting.main(["--models", "tiny", "--shares", "1/4,3/4", "--repeats", "1", "--product", "64"])
    rates, table = outcome.tables
    assert rates.rows[1] == ("H200, published peaks", "67,000", "989,500", "4,800")
    assert column(table, "k/d") == ["1/4", "3/4"] * 2
    assert all(float(ratio) > 0 for ratio in column(table, "measured / floor"))
    counted = counting.main(["--models", "tiny", "--shares", "1/4", "--repeats", "0", "--product", "64"]).tables[1]
    assert column(counted, "measured (ms)") == ["", ""]


def test_every_method_takes_a_step_on_the_same_matrices() -> None:
    installed = [name for name in ("osf", "galore") if importlib.util.find_spec(peers.PACKAGES[name])]
    arguments = ["--model", "tiny", "--blocks", "1", "--batch", "4", "--images", "4", "--repeats", "1"]
    (table,) = peers.main([*arguments, "--shares", "1/4"]).tables
    assert column(table, "method") == [peers.METHODS[m][0] for m in ("exact", "fast", "dense", *installed)]
    held = dict(zip(column(table, "method"), column(table, "held (MB)")))
    shapes = [(256, 64), (64, 256), (128, 32), (32, 128)]  # outputs, inputs
    stored = sum(4 * (d // 4) * (m + d) for m, d in shapes)
    assert float(held["ours, exact"]) == pytest.approx(stored / 1e6, abs=0.06)
    assert float(held["dense P before AdamW"]) == pytest.approx(sum(4 * d * d for _, d in shapes) / 1e6, abs=0.06)


def test_a_method_whose_package_is_missing_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.installed("exact,galore") == ["exact"]
    assert "galore-torch is left out: python -m pip install galore-torch" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of Linux")
def test_a_peak_is_that_of_the_process_itself() -> None:
    before = resident_peak()
    block = torch.ones(64 * 2**20 // 4)
    assert resident_peak() - before >= 0.9 * block.nbytes or before >= 2 * block.nbytes
