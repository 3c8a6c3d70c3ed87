"""The Triton kernel of the fast difference form, by Triton's interpreter, beside the library's calls and mathematics.

Triton decides when it is imported whether it interprets, so the kernel runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nullspace_optim.subspace.projection import project_difference_
from reference.benchmarks import fused, gpu

BFLOAT16 = torch.bfloat16
triton_only = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch comes without triton")

# Groups, outputs, inputs, rank, and rows and columns of a tile: one tile and several, sizes that fill them and not.
SIZES = {
    "one tile": (1, 16, 16, 8, 16),
    "smaller than a tile": (1, 5, 3, 1, 16),
    "several tiles": (1, 32, 48, 16, 16),
    "odd": (1, 37, 50, 21, 16),
    "a stack": (3, 19, 33, 7, 16),
    "larger tiles": (1, 37, 70, 35, 32),
    "rank 0": (2, 9, 11, 0, 16),
    "rank 1": (1, 33, 17, 1, 16),
}
CASES = [(size, side, dtype) for size in SIZES for side in ("right", "left") for dtype in (torch.float32, BFLOAT16)]
SCRIPT = """
import sys, torch
from reference.benchmarks.fused import INTERPRETED, fused_
assert INTERPRETED
cases = torch.load(sys.argv[1])
for case in cases:
    fused_(*case["given"])
torch.save(cases, sys.argv[2])
"""

Case = dict[str, Any]


def made(size: str, side: str, dtype: torch.dtype, moved: float = 0.1) -> Case:
    """Arguments of the kernel: `W` and `previous` inside of larger tensors of NaN, which nothing may read or write."""
    g, m, d, k, block = SIZES[size]
    draw = torch.Generator().manual_seed(m * d)
    basis = torch.linalg.qr(torch.randn(g, *((d, k) if side == "right" else (m, k)), generator=draw))[0]
    previous, frame = (torch.full((g, m + 2, d + 3), float("nan"), dtype=dtype) for _ in range(2))
    previous[:, :m, :d] = torch.randn(g, m, d, generator=draw)
    frame[:, :m, :d] = previous[:, :m, :d].float() + moved * torch.randn(g, m, d, generator=draw)
    given = frame[:, :m, :d], previous[:, :m, :d], basis[..., : min(k, basis.shape[1])], side, block
    return {"given": given, "frame": frame, "start": given[0].clone()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Case]:
    """Every case after the kernel, `W` corrected in place; the unmoved weights too."""
    folder = tmp_path_factory.mktemp("fused")
    names: list[Any] = [*CASES, *(("unmoved", dtype) for dtype in (torch.float32, BFLOAT16))]
    cases = [made(*name) if len(name) == 3 else made("odd", "right", name[1], moved=0.0) for name in names]
    torch.save(cases, folder / "given.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder / "given.pt"), str(folder / "found.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, torch.load(folder / "found.pt"), strict=True))


def projected(case: Case, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The correction in float64, with the difference, its coordinates and the lifted product `rounded`."""
    _, previous, basis, side, _ = case["given"]
    moved, basis = rounded(case["start"].double() - previous.double()), basis.to(BFLOAT16).double()
    if side == "left":
        return (case["start"].double().mT - rounded(rounded(moved.mT @ basis) @ basis.mT)).mT
    return case["start"].double() - rounded(rounded(moved @ basis) @ basis.mT)


def size_of_change(case: Case) -> float:
    return float((case["start"].double() - case["given"][1].double()).norm())


@triton_only
@pytest.mark.parametrize(("size", "side", "dtype"), CASES, ids=str)
def test_it_is_the_projection_of_the_change(size: str, side: str, dtype: Any, results: dict[Any, Case]) -> None:
    case = results[size, side, dtype]
    weight = case["given"][0]
    bound = 4e-3 * size_of_change(case) + (0 if dtype == torch.float32 else 2**-8 * float(weight.double().norm()))
    assert float((weight.double() - projected(case, lambda exact: exact)).norm()) <= bound
    nearest = projected(case, lambda exact: exact.float().to(BFLOAT16).double()).to(dtype)
    assert (
        float((weight != nearest).double().mean()) <= 0.02
    )  # where a float32 sum falls on the other side of a rounding


@triton_only
@pytest.mark.parametrize(("size", "side", "dtype"), CASES, ids=str)
def test_it_is_what_the_library_computes(size: str, side: Any, dtype: Any, results: dict[Any, Case]) -> None:
    case = results[size, side, dtype]
    weight, previous, basis, *_ = case["given"]
    twin = project_difference_(case["start"].clone(), previous, basis, side, low_precision=BFLOAT16)
    assert float((weight.double() - twin.double()).norm()) <= 1e-3 * size_of_change(case)
    assert float((weight != twin).double().mean()) <= 0.02
    assert torch.equal(twin, case["start"]) == (basis.shape[2] == 0)


@triton_only
@pytest.mark.parametrize(("size", "side", "dtype"), CASES, ids=str)
def test_nothing_beside_the_weight_is_written(size: str, side: str, dtype: Any, results: dict[Any, Case]) -> None:
    case = results[size, side, dtype]
    weight, frame = case["given"][0], case["frame"]
    assert weight.data_ptr() == frame.data_ptr()
    assert bool(frame[:, weight.shape[1] :].isnan().all() and frame[:, :, weight.shape[2] :].isnan().all())


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_a_weight_that_did_not_move_stays_bitwise(dtype: torch.dtype, results: dict[Any, Case]) -> None:
    case = results["unmoved", dtype]
    assert torch.equal(case["given"][0], case["start"]) and torch.equal(case["given"][1], case["start"])


@triton_only
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("block", [64, 128])
def test_both_launches_compile_for_a_gpu(
    block: int, dtype: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", minversion="3.4")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    left, right, out = (dtype, "bf16", "bf16") if first else ("bf16", "bf16", dtype)
    constants = {"FIRST": first, "NATIVE": True, "BLOCK": block, "DEPTH": min(block, 4096 // block)}
    signature = dict.fromkeys(fused._multiply.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {"left": f"*{left}", "previous": f"*{dtype}", "right": f"*{right}", "out": f"*{out}"}
    source = ASTSource(fused._multiply, signature, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": block // 16})
    assert made.metadata.shared <= 227 * 1024  # bytes a block of threads can have on an H100
    assert ".bf16.bf16" in made.asm["ptx"]  # products are those of tensor cores


def test_the_eager_calls_are_the_librarys() -> None:
    weight, previous, basis, *_ = made("odd", "right", torch.float32)["given"]
    basis = basis.to(BFLOAT16)
    twin = project_difference_(weight.clone(), previous, basis, "right", low_precision=BFLOAT16)
    assert torch.equal(fused.eager_(weight.clone(), previous, basis), twin)


@triton_only
def test_a_toy_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    assert gpu.main(["--output", str(tmp_path), "--parts", "fused", "--toy"]) == 0
    (table,) = json.loads((tmp_path / "fused.json").read_text())["tables"]
    assert [row[1] for row in table["rows"]] == ["1/16", "1/4", "1/2"] * 2
    assert all(float(row[-1]) <= 0.01 for row in table["rows"])


def test_without_triton_it_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fused, "triton", None)
    assert fused.main([]) is None
    assert capsys.readouterr().err == "fused: left out, since triton cannot be imported\n"


def test_it_can_be_imported_without_triton() -> None:
    script = "import sys; sys.modules['triton'] = None; from reference.benchmarks.fused import main; main([])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (0, ["fused: left out, since triton cannot be imported"])
