"""Frequent Directions against the whole second moment: the published bound, merging, memory, and a consolidation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import Energy, FixedRank, NullSpaceOptimizer, SketchedCovariance, TailEnergy
from nullspace_optim.covariance.sketch import FrequentDirections
from nullspace_optim.errors import OptionError

SIZE, ROWS = 120, 20


def decaying(rows: int, seed: int = 0) -> Tensor:
    """Return rows `[rows, 120]` whose spectrum decays over three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, SIZE, generator=generator)
        * torch.logspace(0, -3, SIZE)
        @ torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0]
    )


def sketched(*parts: Tensor) -> FrequentDirections:
    sketch = FrequentDirections(1, SIZE, ROWS, dtype=torch.float32, device="cpu")
    for part in parts:
        sketch.update(part[None])
    return sketch


def assert_bound(sketch: FrequentDirections, rows: Tensor) -> None:
    """Theorem 1.1: `0 <= A^T A - B^T B`, and its norm is at most `||A - A_k||_F^2 / (l - k)` for every `k < l`."""
    exact, factor = rows.double().T @ rows.double(), sketch.factor[0].double()
    values = torch.linalg.eigvalsh(exact - factor.T @ factor)
    rounding = 1e-5 * float(torch.linalg.matrix_norm(exact, 2))
    assert float(values.min()) >= -rounding
    assert float(values.max()) <= float(sketch.lost[0]) + rounding
    tails = torch.linalg.eigvalsh(exact).flip(0).clamp(min=0).flip(0).cumsum(0).flip(0)  # ||A - A_k||_F^2
    published = min(float(tails[k]) / (ROWS - k) for k in range(ROWS))
    assert float(values.max()) <= float(sketch.lost[0]) + rounding <= published + 2 * rounding
    assert torch.allclose(sketch.trace(), rows.square().sum()[None], rtol=1e-4)
    assert float(values.max()) > 1e-4 * float(exact.trace()) / SIZE  # the sketch did lose something


def test_the_published_bound_holds() -> None:
    rows = decaying(500)
    assert_bound(sketched(*rows.split(33)), rows)


def test_merged_sketches_keep_the_bound() -> None:
    rows = decaying(500)
    merged = sketched(rows[:200])
    merged.merge(sketched(rows[200:]))
    assert_bound(merged, rows)
    assert merged.rows.tolist() == [500]


def test_few_rows_are_kept_exactly() -> None:
    rows = decaying(ROWS)
    sketch = sketched(rows)
    assert torch.equal(sketch.factor[0], rows) and float(sketch.lost) == 0.0


def test_memory_is_linear_in_the_width() -> None:
    held = [
        FrequentDirections(1, width, ROWS, dtype=torch.float32, device="cpu")._buffer.numel() for width in (1000, 2000)
    ]
    assert held == [2 * ROWS * 1000, 2 * ROWS * 2000]


def test_leading_features_and_copies() -> None:
    rows = decaying(300)
    sketch = sketched(rows)
    part = sketch.leading(50)
    exact = rows[:, :50].double().T @ rows[:, :50].double()
    error = torch.linalg.matrix_norm(exact - part.factor[0].double().T @ part.factor[0].double(), 2)
    assert float(error) <= float(part.lost) + 1e-5 * float(exact.trace())
    twin = sketch.clone()
    twin.update(rows[None])
    assert sketch.rows.tolist() == [300] and not torch.equal(twin.squares, sketch.squares)


def wrapped(model: nn.Module, **options: object) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, **options)  # type: ignore[arg-type]


def test_consolidation_by_sketch_protects_as_much_as_it_says() -> None:
    model = nn.Sequential(nn.Linear(SIZE, 8), nn.Linear(8, 4))
    sketch = SketchedCovariance(size=60, above=100)
    optimizer = wrapped(model, policy=Energy(0.95), covariance=sketch)
    tasks = [decaying(400, seed) for seed in (1, 2)]
    for rows in tasks:
        report = optimizer.consolidate(rows.split(50), progress=False)
        line = next(row for row in report.parameters if row.name == "0.weight")
        u = optimizer.bases["0.weight"].U.double()
        true = float((rows.double() @ u).square().sum() / rows.double().square().sum())
        assert 0.95 <= line.energy <= true + 1e-6
        assert any("sketches of 60 rows" in note and "Theorem 1.1" in note for note in report.notes)
        assert float((u.T @ u - torch.eye(u.shape[1])).norm()) < 1e-5
    for _ in range(5):
        optimizer.zero_grad()
        model(tasks[0]).square().mean().backward()
        optimizer.step()
    assert optimizer.verify().ok
    assert len(optimizer.bases["1.weight"].spectrum[0]) == 8


def test_a_rank_beyond_the_sketch_takes_what_is_known() -> None:
    model = nn.Linear(SIZE, 4)
    optimizer = wrapped(model, policy=FixedRank(100), covariance=SketchedCovariance(size=30, above=100))
    optimizer.consolidate(decaying(400).split(50), progress=False)
    assert 28 <= optimizer.bases["weight"].rank <= 30


@pytest.mark.parametrize(
    "options,match",
    [
        ({"covariance": "rough"}, "expected 'exact' or a SketchedCovariance"),
        ({"covariance": SketchedCovariance(), "policy": TailEnergy()}, "TailEnergy needs whole second moments"),
    ],
    ids=["unknown", "accumulating policy"],
)
def test_bad_options_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        wrapped(nn.Linear(3, 2), **options)
    with pytest.raises(OptionError, match="size=1"):
        SketchedCovariance(size=1)
    with pytest.raises(OptionError, match="above=5"):
        SketchedCovariance(size=10, above=5)
