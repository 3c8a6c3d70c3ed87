"""Few rows beside the features: bases from products among the rows, against the dense decomposition in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference_impl import orthogonality_error
from torch import Tensor, nn
from torch.optim import SGD

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.consolidation.grow import Eigenbasis, GrownBasis, decompose, grow_basis
from nullspace_optim.consolidation.grow_rows import decompose_rows
from nullspace_optim.covariance.second_moment import SecondMoment
from nullspace_optim.errors import ConsolidationError, ShapeError
from nullspace_optim.policies import (
    CODECL,
    OWM,
    SGP,
    TRGP,
    EigenvalueRatio,
    Energy,
    FixedRank,
    InfLoRA,
    KeepLoRA,
    NumericalRank,
    Policy,
    RankBudget,
    SplitLoRA,
    TailEnergy,
)
from nullspace_optim.subspace.linalg import principal_angles

SIZE = 160
APPENDING: list[Policy] = [
    Energy(0.9),
    Energy(),
    Energy(0.999, paper_code=True),
    FixedRank(12),
    NumericalRank(),
    NumericalRank(1e-6),
    RankBudget(0.1),
    SGP(),
    TRGP(),
    InfLoRA(),
    KeepLoRA(),
]
MERGING: list[Policy] = [EigenvalueRatio(), TailEnergy(), SplitLoRA(), OWM(), CODECL()]


def rows_of(seed: int, n: int = 40, dtype: torch.dtype = torch.float32, decay: float = 3.0) -> Tensor:
    """Rows `[n, 160]` whose singular values fall by `10^decay`, in directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(SIZE, n, generator=generator, dtype=torch.float64))[0]
    return (left * torch.logspace(0, -decay, n, dtype=torch.float64) @ right.T).to(dtype)


def grown(policy: Policy, candidate: Eigenbasis, before: GrownBasis | None) -> GrownBasis:
    taken = policy.ranks({str(i): spectrum for i, spectrum in enumerate(candidate.spectra)})
    stored = (before.basis, before.scale) if before else (None, None)
    return grow_basis(candidate, list(taken.values()), *stored)


def both(policy: Policy, tasks: Sequence[Tensor]) -> tuple[GrownBasis, GrownBasis]:
    """Return the last basis from the rows `[g, n, s]` of each task, and its dense twin in double precision."""
    found: GrownBasis | None = None
    dense: GrownBasis | None = None
    for number, rows in enumerate(tasks):
        count = [rows.shape[1]] * len(rows)
        few = rows.double() if policy.precise and not rows.is_complex() else rows
        options: dict[str, Any] = {"tasks": number, "name": "w"}
        found = grown(policy, decompose_rows(policy, few, count, found.basis if found else None, **options), found)
        wide = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
        stored = (dense.basis, None) if dense else (None, None)
        scale = dense.scale if dense else None
        dense = grown(policy, decompose(policy, wide.mT @ wide.conj(), count, *stored, scale=scale, **options), dense)
    assert found is not None and dense is not None
    return found, dense


def assert_same(found: GrownBasis, dense: GrownBasis) -> None:
    assert found.ranks == dense.ranks
    assert found.energy == pytest.approx(dense.energy, abs=1e-6)
    largest = float(dense.spectrum.max())
    assert torch.allclose(found.spectrum.double(), dense.spectrum.double(), rtol=1e-5, atol=1e-7 * largest)
    assert orthogonality_error(found.basis) <= 1e-6
    assert found.basis.dtype == dense.basis.dtype
    for group, rank in enumerate(found.ranks):
        ours, theirs = found.basis[group, :, :rank], dense.basis[group, :, :rank]
        if rank and not ours.is_complex():
            assert float(principal_angles(ours, theirs).max()) <= 2e-6
        assert not found.basis[group, :, rank:].any()
    for mine, other in ((found.scale, dense.scale), (found.members, dense.members)):
        assert (mine is None) == (other is None)
        assert mine is None or other is None or torch.allclose(mine.double(), other.double(), atol=1e-5)


@pytest.mark.parametrize("policy", APPENDING, ids=repr)
def test_appending_policies_take_what_a_dense_decomposition_gives(policy: Policy) -> None:
    tasks = [torch.stack([rows_of(2 * task, n=40), rows_of(2 * task + 1, n=40)]) for task in range(3)]
    assert_same(*both(policy, tasks[:1]))
    assert_same(*both(policy, tasks))


CASES: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: rows_of(0, n=1),
    "half as many as features": lambda: rows_of(0, n=80),
    "all rows equal": lambda: rows_of(0, n=1).expand(30, SIZE),
    "duplicated rows": lambda: rows_of(0, n=20).repeat(3, 1),
    "rank deficient": lambda: torch.randn(60, 7, generator=torch.Generator().manual_seed(0)) @ rows_of(1, n=7),
    "with zero rows": lambda: torch.cat([torch.zeros(5, SIZE), rows_of(0, n=20)]),
    "no energy": lambda: torch.zeros(6, SIZE),
    "tiny": lambda: rows_of(0, dtype=torch.float64) * 1e-20,
    "huge": lambda: rows_of(0, dtype=torch.float64) * 1e20,
    "bfloat16": lambda: rows_of(0).bfloat16().float(),
    "float16": lambda: rows_of(0).half().float(),
    "complex": lambda: torch.complex(rows_of(0), rows_of(1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [Energy(), NumericalRank()], ids=repr)
def test_rows_of_any_kind_give_what_the_dense_decomposition_gives(case: str, policy: Policy) -> None:
    rows = CASES[case]()[None]
    found, dense = both(policy, [rows])
    assert_same(found, dense)
    assert found.ranks[0] <= min(rows.shape[1], SIZE)
    again, _ = both(policy, [rows, rows])
    assert again.ranks == found.ranks and torch.equal(again.basis, found.basis)


def test_the_energy_inside_a_complex_basis_is_the_share_of_the_rows() -> None:
    rows = torch.complex(rows_of(0), rows_of(1))
    found, _ = both(Energy(0.9), [rows[None]])
    inside = rows.conj() @ found.basis[0]
    assert found.energy == pytest.approx(float(inside.norm() ** 2 / rows.norm() ** 2), abs=1e-5)
    assert found.energy >= 0.9


def test_directions_without_energy_are_filled_up_and_orthogonal() -> None:
    before, _ = both(FixedRank(3), [rows_of(0)[None]])
    candidate = decompose_rows(FixedRank(3), rows_of(1, n=4)[None], [4], before.basis)
    filled = grow_basis(candidate, [SIZE - 3], before.basis)
    assert filled.ranks == (SIZE,) and orthogonality_error(filled.basis) <= 1e-6
    assert torch.equal(filled.basis[..., :3], before.basis)
    with pytest.raises(ConsolidationError, match=f"takes {SIZE - 2} directions"):
        grow_basis(candidate, [SIZE - 2], before.basis)


def test_wrong_rows_name_the_parameter() -> None:
    before, _ = both(FixedRank(3), [rows_of(0)[None]])
    with pytest.raises(ShapeError, match=r"'c_fc\.weight' has a stored basis \(1, 160, 3\)"):
        decompose_rows(Energy(), torch.ones(1, 4, 130), [4], before.basis, name="c_fc.weight")
    with pytest.raises(ConsolidationError, match=r"'c_fc\.weight' is not finite"):
        decompose_rows(Energy(), torch.full((1, 4, SIZE), float("nan")), [4], name="c_fc.weight")


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 12, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 200), nn.Tanh(), nn.Linear(200, 3)
    )


def consolidated(policy: Policy, batches: list[Tensor], bias: str) -> NullSpaceOptimizer:
    model = model_of()
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=policy, bias=bias)  # type: ignore[arg-type]
    for task in range(2):
        optimizer.consolidate([batch + task for batch in batches], progress=False)
    optimizer.detach()
    return optimizer


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bias", ["freeze", "joint"])
@pytest.mark.parametrize("policy", [Energy(), NumericalRank(), SGP(), *MERGING], ids=repr)
def test_a_model_is_protected_as_by_whole_second_moments(
    policy: Policy, bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(torch.randn(3, 2, 16, 6, 6, generator=torch.Generator().manual_seed(1)))
    few = consolidated(policy, batches, bias)
    monkeypatch.setattr(SecondMoment, "_has_room", lambda self, number: False)
    whole = consolidated(policy, batches, bias)
    for name, basis in whole.bases.items():
        ours = few.bases[name]
        assert (ours.fate, ours.history) == (basis.fate, basis.history), name
        if basis.main is None or ours.main is None:
            continue
        for mine, other in zip(ours.main.basis, basis.main.basis, strict=True):
            assert float(principal_angles(mine, other).max()) <= 2e-3, name  # float32 sums find no better
        assert ours.main.energy == pytest.approx(basis.main.energy, abs=1e-5)


def test_eigenvectors_of_few_rows_are_found_among_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    solve = torch.linalg.eigh

    def eigh(matrix: Tensor) -> Any:
        solved.append(matrix.shape[-1])
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    batches = list(torch.randn(3, 2, 16, 6, 6, generator=torch.Generator().manual_seed(1)))
    consolidated(Energy(), batches, "freeze")
    assert sorted(solved[:3]) == [6, 6, 144]  # 96 patches beside 144 features are not few, 6 rows are


def test_more_rows_than_half_the_features_are_summed_up() -> None:
    rows = rows_of(0, n=90)
    moment = SecondMoment(1, SIZE)
    for part in (rows[:30], rows[30:80]):
        moment.update(part[None])
        assert moment.factor is not None
    assert torch.equal(moment.factor[0], rows[:80])
    assert torch.allclose(moment.diagonal(), rows[None, :80].square().sum(1))
    twin, narrow = moment.clone(), moment.leading(130)
    moment.update(rows[None, 80:])
    assert moment.factor is None and twin.factor is not None
    assert torch.allclose(moment.matrix[0], rows.T @ rows, atol=1e-5)
    assert torch.allclose(twin.matrix[0], rows[:80].T @ rows[:80], atol=1e-5)
    assert narrow.factor is not None and torch.equal(narrow.factor[0], rows[:80, :130])
    assert moment.rows.tolist() == [90] and twin.rows.tolist() == [80]


def test_few_rows_are_copies_of_what_was_seen() -> None:
    rows = rows_of(0, n=8)
    seen = rows.clone()
    moment = SecondMoment(1, SIZE)
    moment.update(rows[None])
    rows.zero_()
    assert moment.factor is not None and torch.equal(moment.factor[0], seen)


def test_rows_of_some_groups_alone_are_summed_up() -> None:
    moment = SecondMoment(2, SIZE)
    moment.update(torch.stack([rows_of(0), rows_of(1)]))
    moment.update(rows_of(2)[None], groups=[1])
    wanted = [rows_of(0).T @ rows_of(0), rows_of(1).T @ rows_of(1) + rows_of(2).T @ rows_of(2)]
    assert moment.factor is None and torch.allclose(moment.matrix, torch.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_few_rows_too_small_or_large_to_square_are_kept_in_double_precision(size: float) -> None:
    moment = SecondMoment(1, SIZE)
    moment.update(rows_of(0)[None])
    moment.update(size * rows_of(1)[None])
    assert moment.factor is not None and moment.dtype == moment.factor.dtype == torch.float64
    assert bool(torch.isfinite(moment.diagonal()).all())


def test_the_progress_bar_counts_the_decompositions(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of()
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model)
    optimizer.consolidate([torch.randn(2, 16, 6, 6)], name="flowers", progress=True)
    shown = capsys.readouterr().err
    assert "directions of flowers" in shown and "0/3 [" in shown
    optimizer.consolidate([torch.randn(2, 16, 6, 6)], progress=False)
    assert capsys.readouterr().err == ""


def test_sketches_are_named_once_where_decompositions_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nullspace_optim.consolidation.notes.WIDE", 120)
    images = torch.randn(6, 16, 6, 6)  # 96 patches beside 144 features, 6 rows beside 192 and 200
    said = []
    for policy in (Energy(), SGP()):
        model = model_of()
        optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=policy)
        said += [optimizer.consolidate([images], progress=False).notes for _ in range(2)]
    hints = [[note for note in notes if "SketchedCovariance" in note] for notes in said]
    assert [len(found) for found in hints] == [1, 0, 0, 0]
    assert hints[0][0].startswith("1 weights have more than 120 inputs ('0.weight': 144)")


def test_a_fixed_rank_takes_no_directions_of_rounding() -> None:
    model = nn.Linear(SIZE, 3)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=FixedRank(12))
    for rank in (5, 10, 12):
        optimizer.consolidate([torch.randn(5, SIZE)], progress=False)
        assert optimizer.bases["weight"].rank == rank
