"""Other ways to do the same work, each beside what the library does: prediction, outcome, error against float64.

    python -m reference.benchmarks.variants
    python -m reference.benchmarks.variants --only split,blocks

Shapes are those of one ViT-B block, `W` `[3072, 768]`, `[768, 3072]` and so on, a quarter of the directions kept. The
library's arithmetic is written out here in plain torch, so that each variant differs from it in one thing. Nothing of a
variant that was rejected is in the package; `RESULTS.md` says which were taken.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import scipy.linalg
import torch
from scipy.linalg import blas
from torch import Tensor

from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.benchmarks.timing import Run, in_turn

BLOCK = 256


@dataclass(frozen=True)
class Problem:
    """A weight before and after the base's step `[m, d]`, its basis `[d, k]`, its anchor and its workspace `[m, k]`."""

    before: Tensor
    weight: Tensor
    basis: Tensor
    anchor: Tensor
    space: Tensor

    @property
    def exact(self) -> Tensor:
        """The corrected weight in float64."""
        weight, basis = self.weight.double(), self.basis.double()
        return weight - (weight @ basis - self.anchor.double()) @ basis.T


@dataclass(frozen=True)
class Variant:
    """What is tried instead of what, what it should bring (old time over new), and how to run both.

    Runs return their result, if it has an error; `exact` is that result in float64.
    """

    name: str
    instead: str
    predicted: str
    usual: Callable[[], Any]
    variant: Callable[[], Any]
    exact: Tensor | None = None


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    torch.manual_seed(0)
    rows = []
    for name in options.only.split(","):
        for variant in VARIANTS[name](options.width, device):
            progress(variant.name)
            rows.append(_row(variant, options.repeats, device))
    table = Table(
        "Variants",
        (
            "variant",
            "instead of",
            "predicted",
            "usual (ms)",
            "variant (ms)",
            "usual / variant",
            "error, usual / variant",
        ),
        tuple(rows),
        f"Median of {options.repeats} turns. Predicted and measured: time of the usual way over that of the variant. "
        "Error: relative to the same result in float64, Frobenius norm.",
    )
    return finish("variants", arguments, device, time.perf_counter() - started, [table], options.output)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m reference.benchmarks.variants", description=about)
    parser.add_argument("--only", default=",".join(VARIANTS), help=f"which of {','.join(VARIANTS)}")
    parser.add_argument("--width", type=int, default=768, help="d of the narrow matrices; the wide ones have 4 d")
    parser.add_argument("--repeats", type=int, default=5, help="turns a figure")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--output", default="", help="folder for variants.md and variants.json")
    return parser.parse_args(arguments)


def _row(variant: Variant, repeats: int, device: torch.device) -> tuple[str, ...]:
    found = in_turn({"usual": variant.usual, "variant": variant.variant}, repeats, device)
    usual, other = (1e3 * median(found[name]) for name in ("usual", "variant"))
    errors = ""
    if variant.exact is not None:
        errors = " / ".join(f"{_error(run(), variant.exact):.0e}" for run in (variant.usual, variant.variant))
    times = (f"{usual:.3g}", f"{other:.3g}", f"{usual / other:.2f}")
    return variant.name, variant.instead, variant.predicted, *times, errors


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def problem(m: int, d: int, k: int, device: torch.device, step: float = 1e-3) -> Problem:
    """A random weight, moved by a random step of relative size `step`."""
    before = torch.randn(m, d, device=device) / d**0.5
    basis = torch.linalg.qr(torch.randn(d, k, device=device))[0]
    weight = before + step * torch.randn_like(before) / d**0.5
    return Problem(before, weight, basis, before @ basis, torch.empty(m, k, device=device))


def shapes(width: int, device: torch.device) -> list[Problem]:
    """The four matrices of a block, a quarter of the inputs kept."""
    sizes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    return [problem(m, d, d // 4, device) for m, d in sizes]


def anchored(p: Problem, weight: Tensor) -> Tensor:
    """The anchor form, in place on `weight`."""
    torch.addmm(p.anchor, weight, p.basis, beta=-1, out=p.space)
    return weight.addmm_(p.space, p.basis.T, alpha=-1)


def projected(p: Problem, weight: Tensor, product: torch.dtype, basis: Tensor) -> Tensor:
    """The difference form with products in `product`, in place on `weight`; `basis` may have that type already."""
    basis = basis.to(product)
    inside = (weight - p.before).to(product) @ basis
    return weight.sub_(inside @ basis.T)


def on_copies(run: Callable[[Problem, Tensor], Tensor], problems: Sequence[Problem]) -> Callable[[], Tensor]:
    """Run a correction on every problem; the last corrected weight is returned. Weights are restored first."""
    places = [p.weight.clone() for p in problems]

    def all_of_them() -> Tensor:
        for p, place in zip(problems, places):
            place.copy_(p.weight)
            run(p, place)
        return places[-1]

    return all_of_them


@contextmanager
def converting(device: torch.device) -> Iterator[None]:
    """Let the library of products turn float32 operands into bfloat16 (TF32 on a GPU) by itself."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    before, backend.matmul.fp32_precision = backend.matmul.fp32_precision, "tf32" if device.type == "cuda" else "bf16"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def batched(width: int, device: torch.device) -> Iterator[Variant]:
    """One `baddbmm` for twelve equal matrices, weights stacked by a copy there and back."""
    for size, predicted in ((width, "0.9: as many operations, two copies more"), (64, "above 2: a launch a stack")):
        problems = [problem(size, size, size // 4, device) for _ in range(12)]
        stack = torch.stack([p.weight for p in problems])
        basis, anchor = torch.stack([p.basis for p in problems]), torch.stack([p.anchor for p in problems])

        places = [torch.empty_like(p.weight) for p in problems]

        def together(
            problems: Any = problems, stack: Tensor = stack, u: Tensor = basis, a: Tensor = anchor, places: Any = places
        ) -> Tensor:
            torch._foreach_copy_(list(stack.unbind()), [p.weight for p in problems])
            stack.baddbmm_(torch.baddbmm(a, stack, u, beta=-1), u.mT, alpha=-1)
            torch._foreach_copy_(places, list(stack.unbind()))
            return stack[-1]

        usual = on_copies(anchored, problems)
        yield Variant(
            f"12 matrices {size} x {size} in one batch", "one after another", predicted, usual, together,
            problems[-1].exact,
        )  # fmt: skip


def foreach(width: int, device: torch.device) -> Iterator[Variant]:
    """Copies of all weights before the base's step by one call."""
    for size, predicted in ((width, "1.0: bound by memory"), (64, "about 2: one call for twelve")):
        sources = [torch.randn(size, size, device=device) for _ in range(12)]
        targets = [torch.empty_like(source) for source in sources]

        def one_by_one(sources: Any = sources, targets: Any = targets) -> None:
            for target, source in zip(targets, sources):
                target.copy_(source)

        together = partial(torch._foreach_copy_, targets, sources)
        yield Variant(f"_foreach_copy_ of 12 x {size} x {size}", "a copy each", predicted, one_by_one, together)


def rare(width: int, device: torch.device) -> Iterator[Variant]:
    """Correct every fourth step only: the forward passes in between see weights that have moved."""
    problems = shapes(width, device)
    once = on_copies(anchored, problems)

    def four_times() -> Tensor:
        return [once() for _ in range(4)][-1]

    def fourth() -> Tensor:
        once()
        return problems[-1].weight

    predicted = "4.0; error: what one step moves"
    yield Variant("correction every 4th step", "every step", predicted, four_times, fourth, problems[-1].exact)


def space(width: int, device: torch.device) -> Iterator[Variant]:
    """A new residual for each correction instead of a buffer."""
    problems = shapes(width, device)

    def fresh(p: Problem, weight: Tensor) -> Tensor:
        return weight.addmm_(torch.addmm(p.anchor, weight, p.basis, beta=-1), p.basis.T, alpha=-1)

    usual = on_copies(anchored, problems)
    predicted = "0.95: new pages, 1/4 of the weight's bytes"
    yield Variant(
        "residual allocated anew", "one buffer", predicted, usual, on_copies(fresh, problems), problems[-1].exact
    )


def fast(width: int, device: torch.device) -> Iterator[Variant]:
    """Fast products of the difference form: who converts to bfloat16, and when."""
    problems = shapes(width, device)
    narrow = {id(p): p.basis.bfloat16() for p in problems}
    usual = on_copies(lambda p, w: projected(p, w, torch.bfloat16, p.basis), problems)
    exact = problems[-1].exact

    def converted(p: Problem, weight: Tensor) -> Tensor:
        with converting(device):
            inside = torch.mm(weight - p.before, p.basis, out=p.space)
            return weight.addmm_(inside, p.basis.T, alpha=-1)

    def halves(p: Problem, weight: Tensor) -> Tensor:
        return projected(p, weight, torch.bfloat16, narrow[id(p)])

    def blocks(p: Problem, weight: Tensor) -> Tensor:
        basis = narrow[id(p)]
        for top in range(0, len(weight), BLOCK):
            rows = weight[top : top + BLOCK]
            inside = (rows - p.before[top : top + BLOCK]).bfloat16() @ basis
            rows.sub_(inside @ basis.T)
        return weight

    what = "difference form, bfloat16 casts"
    yield Variant(
        "conversion inside the product", what, "1.2: fewer passes", usual, on_copies(converted, problems), exact
    )
    yield Variant(
        "basis stored in bfloat16 too", what, "1.1: k d bytes less", usual, on_copies(halves, problems), exact
    )
    yield Variant(f"blocks of {BLOCK} rows", what, "1.3: stays in cache", usual, on_copies(blocks, problems), exact)


def split(width: int, device: torch.device) -> Iterator[Variant]:
    """Exact products from bfloat16 ones: `W = W1 + W2 (+ W3)`, the small products of parts left out."""
    problems = shapes(width, device)
    parts = {id(p): pieces(p.basis, 3) for p in problems}
    usual, exact = on_copies(anchored, problems), problems[-1].exact

    def anchor_form(p: Problem, weight: Tensor, number: int) -> Tensor:
        with converting(device):
            residual = sum_of_products(pieces(weight, number), parts[id(p)], number) - p.anchor
            return weight.sub_(sum_of_products(pieces(residual, 2), [u.T for u in parts[id(p)]], 2))

    def difference_form(p: Problem, weight: Tensor) -> Tensor:
        with converting(device):
            inside = sum_of_products(pieces(weight - p.before, 2), parts[id(p)], 2)
            return weight.sub_(sum_of_products(pieces(inside, 2), [u.T for u in parts[id(p)]], 2))

    what = "anchor form, float32"
    three, two = (on_copies(partial(anchor_form, number=n), problems) for n in (3, 2))
    yield Variant("6 + 3 bfloat16 products", what, "float32 / bfloat16 rate, over 4.5", usual, three, exact)
    yield Variant("3 + 3 bfloat16 products", what, "the same over 3; error 1e-5", usual, two, exact)
    differing = on_copies(difference_form, problems)
    yield Variant("3 + 3 products of the difference", what, "the same over 3, one copy more", usual, differing, exact)


def pieces(matrix: Tensor, number: int) -> list[Tensor]:
    """`number` float32 matrices of bfloat16 values that add up to `matrix`, each 2^-8 of the one before."""
    found = []
    for _ in range(number):
        found.append(matrix.bfloat16().float())
        matrix = matrix - found[-1]
    return found


def sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor], number: int) -> Tensor:
    """The products of parts `i + j < number`, smallest first."""
    order = sorted(((i, j) for i in range(number) for j in range(number - i)), key=lambda pair: -sum(pair))
    total = left[order[0][0]] @ right[order[0][1]]
    for i, j in order[1:]:
        total.addmm_(left[i], right[j])
    return total


def compiled(width: int, device: torch.device) -> Iterator[Variant]:
    """`torch.compile` of the correction."""
    problems = shapes(width, device)
    anchor_form = torch.compile(anchored)
    difference = torch.compile(partial(projected, product=torch.bfloat16))
    exact = problems[-1].exact
    yield Variant(
        "torch.compile, anchor form", "eager", "1.0: two library products", on_copies(anchored, problems),
        on_copies(anchor_form, problems), exact,
    )  # fmt: skip
    yield Variant(
        "torch.compile, fast difference form", "eager", "1.3: passes fused",
        on_copies(lambda p, w: projected(p, w, torch.bfloat16, p.basis), problems),
        on_copies(lambda p, w: difference(p, w, basis=p.basis), problems), exact,
    )  # fmt: skip


def symmetric(width: int, device: torch.device) -> Iterator[Variant]:
    """Second moments by a whole product, or by BLAS, instead of block columns of the lower triangle."""
    rows = torch.randn(1600, 4 * width, device=device)
    total = torch.zeros(4 * width, 4 * width, device=device)
    step = max(1, len(total) // 8)

    def columns() -> None:
        for left in range(0, len(total), step):
            total[left:, left : left + step].addmm_(rows[:, left:].T, rows[:, left : left + step])

    def update() -> None:
        blas.ssyrk(1.0, rows.numpy().T, beta=1.0, c=total.numpy().T, lower=0, overwrite_c=1)

    whole = partial(total.addmm_, rows.T, rows)
    yield Variant("X^T X as a product", "block columns", "0.56: 16/9 of the operations", columns, whole)
    if device.type == "cpu":
        yield Variant("BLAS ssyrk", "block columns", "1.1: 8/9 of the operations", columns, update)


def eigen(width: int, device: torch.device) -> Iterator[Variant]:
    """Ways to find leading eigenvectors of a second moment."""
    for size in (width, 4 * width):
        moment = decaying(size).to(device)
        usual = partial(torch.linalg.eigh, moment)
        if device.type == "cpu":
            top = [size - size // 4, size - 1]
            settings = {"driver": "evr", "subset_by_index": top, "check_finite": False}
            subset = partial(scipy.linalg.eigh, moment.numpy(), **settings)
            predicted = "1.5: half the back-transform"
            yield Variant(f"largest quarter of {size} only (scipy evr)", "all", predicted, usual, subset)
        finder = partial(range_finder, moment, size // 4)
        yield Variant(f"randomised range finder, {size // 4} of {size}", "all", "5 to 10", usual, finder)
    stack = torch.stack([decaying(width).to(device) for _ in range(4)])
    one_by_one: Run = lambda: [torch.linalg.eigh(m) for m in stack]  # noqa: E731
    yield Variant(f"4 x {width} in one eigh", "each", "1.0", one_by_one, partial(torch.linalg.eigh, stack))


def decaying(size: int) -> Tensor:
    """A second moment with eigenvalues `1 / i`, as flat as those of activations."""
    vectors = torch.linalg.qr(torch.randn(size, size))[0]
    return (vectors / torch.arange(1, size + 1)) @ vectors.T


def range_finder(moment: Tensor, rank: int, passes: int = 2) -> tuple[Tensor, float]:
    """Directions `[s, rank]` near the leading ones (Halko, Martinsson and Tropp 2011, algorithm 4.4), and the share of
    the energy that they hold, exactly: a certificate for rules of energy.
    """
    found = torch.linalg.qr(moment @ torch.randn(len(moment), rank, device=moment.device))[0]
    for _ in range(passes - 1):
        found = torch.linalg.qr(moment @ found)[0]
    return found, float((found * (moment @ found)).sum() / moment.trace())


VARIANTS: Mapping[str, Callable[[int, torch.device], Iterator[Variant]]] = {
    "batched": batched,
    "foreach": foreach,
    "rare": rare,
    "space": space,
    "fast": fast,
    "split": split,
    "compiled": compiled,
    "symmetric": symmetric,
    "eigen": eigen,
}

if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
