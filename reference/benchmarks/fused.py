"""Candidate for a GPU: the fast difference form as a Triton kernel, beside the eager calls and torch's compiler.

    python -m reference.benchmarks.fused        ViT-B/16's shapes on a GPU; on a CPU a toy, by Triton's interpreter

`W <- W - ((W - previous) U) U^T`, `W` `[g, m, d]`, `U` `[g, d, k]`, products in bfloat16. Bytes a float32 weight: eager
32 (difference 12, cast 6, products 4, subtraction 10), two launches 16 (read both; read and write `W`), one launch 12.
One would hold the coordinates of its rows on the chip: 64 rows at `k` = 1,536, half of 3,072, are 384 KiB of float32
sums, where an H100 has 227, and 768 rows are 12 programs for its 132 processors. So the kernel is launched twice, for
`C = (W - previous) U` and for `W - C U^T`, in tiles. The library gets it only if a GPU shows that it is faster.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__" and ("cpu" in sys.argv or not torch.cuda.is_available()):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from reference.benchmarks import outcome
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.benchmarks.workload import in_turn, ratio

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GRAPHIC = torch.cuda.is_available() and not INTERPRETED
SHAPES = ((768, 768), (3072, 768), (768, 3072)) if GRAPHIC else ((24, 20), (20, 24))
BLOCKS, LAYERS, REPEATS = ((64, 128), 12, 50) if GRAPHIC else ((16,), 1, 1)

try:
    import triton
    import triton.language as tl

    jit: Callable[[Any], Any] = triton.jit
except ImportError:  # torch for macOS, Windows or CPUs alone comes without it
    triton, jit = None, lambda function: function


@jit
def _places(start, group, row, column, stride_0, stride_1, stride_2):  # type: ignore[no-untyped-def]
    """Addresses of the entries `row` x `column` of matrix `group`."""
    return start + group * stride_0 + row[:, None] * stride_1 + column[None, :] * stride_2


@jit
def _rounded(values, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Round to the nearest bfloat16, ties to even. The interpreter truncates, and multiplies bfloat16 as integers: what
    it gets are the rounded numbers in float32.
    """
    if NATIVE:
        found = values.to(tl.bfloat16)
    else:
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        found = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return found


@jit
def _multiply(  # type: ignore[no-untyped-def]
    left, previous, right, out, height, inner, width, l0, l1, l2, p0, p1, p2, r0, r1, r2, o0, o1, o2,
    FIRST: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One tile of `out = (left - previous) right` if `FIRST`, else of `out -= left right`; products are rounded."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, inner, DEPTH):
        step = start + tl.arange(0, DEPTH)
        inside = (row[:, None] < height) & (step[None, :] < inner)
        factor = tl.load(_places(left, group, row, step, l0, l1, l2), inside, 0.0)
        if FIRST:
            before = tl.load(_places(previous, group, row, step, p0, p1, p2), inside, 0.0)
            factor = factor.to(tl.float32) - before.to(tl.float32)
        inside = (step[:, None] < inner) & (column[None, :] < width)
        other = tl.load(_places(right, group, step, column, r0, r1, r2), inside, 0.0)
        total = tl.dot(_rounded(factor, NATIVE), _rounded(other, NATIVE), total)
    place, inside = _places(out, group, row, column, o0, o1, o2), (row[:, None] < height) & (column[None, :] < width)
    result = _rounded(total, NATIVE)
    if not FIRST:
        result = tl.load(place, inside, 0.0).to(tl.float32) - result.to(tl.float32)
        if out.dtype.element_ty == tl.bfloat16:
            result = _rounded(result, NATIVE)
    tl.store(place, result, inside)


def fused_(weight: Tensor, previous: Tensor, basis: Tensor, side: str = "right", block: int = 64) -> Tensor:
    """`project_difference_` with bfloat16 products in two launches: `W` `[g, m, d]`, real, in place; return it.

    `basis` is `[g, d, k]`, of the side "left" `[g, m, k]`; a tile has `block` rows and columns.
    """
    matrix, before = (weight, previous) if side == "right" else (weight.mT, previous.mT)
    basis, height = basis.to(torch.bfloat16), matrix.shape[1]
    inside = torch.empty(len(basis), height, basis.shape[2], dtype=basis.dtype, device=basis.device)
    for first, left, right, out in ((True, matrix, basis, inside), (False, inside, basis.mT, matrix)):
        if inside.numel():
            grid = triton.cdiv(out.shape[2], block), triton.cdiv(height, block), len(basis)
            sizes = height, left.shape[2], out.shape[2], *left.stride(), *before.stride(), *right.stride()
            _multiply[grid](left, before, right, out, *sizes, *out.stride(), first, not INTERPRETED, block,
                            min(block, 4096 // block), num_warps=max(1, block // 16))  # fmt: skip
    return weight


def eager_(weight: Tensor, previous: Tensor, basis: Tensor) -> Tensor:
    """The calls of `project_difference_` for a float32 weight, side "right" and bfloat16 products."""
    return weight.sub_(torch.bmm(torch.bmm((weight - previous).to(basis.dtype), basis), basis.mT))


def main(arguments: Sequence[str]) -> Outcome | None:
    """Time all forms; return None where triton is missing."""
    options = outcome.parser("fused", __doc__).parse_args(arguments)
    if triton is None:
        progress("fused: left out, since triton cannot be imported")
        return None
    started, forms = time.perf_counter(), {"eager": eager_}
    if GRAPHIC:
        forms["compiled"] = torch.compile(eager_)
    forms |= {f"tiles of {block}": partial(fused_, block=block) for block in BLOCKS}
    rows = [_row(*shape, part, forms, options.device) for shape in SHAPES for part in (16, 4, 2)]
    header = ("W", "k/d", "eager (ms)", *(f"{name} / eager" for name in [*forms][1:]), "difference / change")
    note = f"{LAYERS} weights a turn, {REPEATS} turns, without the copy. Largest difference of a `W` from eager's."
    table = Table("The fast difference form, float32 weights", header, tuple(rows), note)
    return finish("fused", arguments, options.device, started, [table], options.output)


def _row(m: int, d: int, part: int, forms: dict[str, Any], device: torch.device) -> tuple[str, ...]:
    """Time all forms in turn on weights `[1, m, d]`, of whose inputs one `part` is kept."""
    torch.manual_seed(0)
    progress(f"{m} x {d}, k/d 1/{part}")
    basis = torch.linalg.qr(torch.randn(1, d, d // part))[0].to(device, torch.bfloat16)
    before = [torch.randn(1, m, d, device=device) for _ in range(LAYERS)]
    moved = [weight + 1e-3 * torch.randn_like(weight) for weight in before]
    own = {form: [weight.clone() for weight in moved] for form in forms}
    runs = {form: lambda form=form: list(map(forms[form], own[form], before, LAYERS * [basis])) for form in forms}
    for run in runs.values():
        run()
    apart = max(float((weights[0] - own["eager"][0]).abs().max()) for weights in own.values())
    apart /= float((moved[0] - before[0]).abs().max())
    eager, *others = in_turn(runs, REPEATS, device).values()
    times = f"{1e3 * median(eager):.3f}", *(f"{ratio(one, eager):.2f}" for one in others)
    return f"{m} x {d}", f"1/{part}", *times, f"{apart:.1e}"


if __name__ == "__main__":
    main(sys.argv[1:])
