"""Bases that grow: orthonormal, never touched once stored, and with the figures of the dense formulas."""

from __future__ import annotations

import pytest
import reference_impl as slow
import torch
from reference_impl import orthogonality_error
from spectra import consolidate, moment_of, task_rows

from nullspace_optim.consolidation.grow import decompose, grow_basis
from nullspace_optim.errors import ConsolidationError, ShapeError
from nullspace_optim.policies import (
    Energy,
    FixedRank,
    NumericalRank,
    RankBudget,
    TailEnergy,
)
from nullspace_optim.subspace.linalg import principal_angles


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("policy", [Energy(0.9), TailEnergy()], ids=["append", "accumulate"])
@pytest.mark.fault(81)
def test_bases_stay_orthonormal_over_fifty_tasks(policy, size):
    before, generator = None, torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randn(size // 4, size, generator=generator) * torch.logspace(0, -2, size)
        rows = rows[:, torch.randperm(size, generator=generator)]
        before = consolidate(policy, moment_of(rows), before)
        assert orthogonality_error(before.basis) <= 1e-6
    assert before.basis.dtype == torch.float32
    assert size // 4 < before.ranks[0] <= size


@pytest.mark.parametrize("policy", [Energy(0.9), FixedRank(20), NumericalRank(), RankBudget()], ids=repr)
def test_appending_never_touches_stored_columns(policy):
    before = None
    for seed in range(4):
        moment = moment_of(task_rows(3 * seed, n=5), task_rows(3 * seed + 1, n=9), task_rows(3 * seed + 2, n=2))
        after = consolidate(policy, moment, before)
        for group in range(3):
            kept = before.ranks[group] if before else 0
            if before:
                assert torch.equal(after.basis[group, :, :kept], before.basis[group, :, :kept])
            assert after.ranks[group] >= kept
            assert not after.basis[group, :, after.ranks[group] :].any()
        assert after.dropped == 0.0 and after.covariance is None
        before = after


def test_groups_grow_independently():
    groups = [task_rows(0), task_rows(1, n=3), torch.zeros(2, 24, dtype=torch.float64), task_rows(2)]
    policy, later = Energy(0.9), [task_rows(5), task_rows(6), task_rows(7), torch.zeros(2, 24, dtype=torch.float64)]
    together = consolidate(policy, moment_of(*later), consolidate(policy, moment_of(*groups)))
    for group in range(4):
        alone = consolidate(policy, moment_of(later[group]), consolidate(policy, moment_of(groups[group])))
        assert together.ranks[group] == alone.ranks[0]
        if alone.ranks[0]:
            found = together.basis[group, :, : alone.ranks[0]]
            assert principal_angles(found, alone.basis[0]).max() < 1e-3


@pytest.mark.fault(77)
def test_appending_fills_up_to_every_direction_and_no_further():
    before = consolidate(FixedRank(23), moment_of(task_rows(0)))
    full = consolidate(FixedRank(24), moment_of(task_rows(0)), before)
    assert full.ranks == (24,) and full.energy == pytest.approx(1.0)
    assert orthogonality_error(full.basis) <= 1e-6
    after = consolidate(FixedRank(24), moment_of(task_rows(1)), full)
    assert torch.equal(after.basis, full.basis) and after.energy == 1.0


def test_directions_without_energy_are_still_orthogonal_to_what_is_stored():
    rows = task_rows(0, n=4)
    before = consolidate(NumericalRank(), moment_of(rows, dtype=torch.float64))
    candidate = decompose(Energy(), moment_of(rows), [4], before.basis)
    filled = grow_basis(candidate, [20], before.basis)
    assert filled.ranks == (24,) and orthogonality_error(filled.basis) <= 1e-6


def test_the_examined_residual_is_that_of_the_dense_formula():
    before = consolidate(FixedRank(6), moment_of(task_rows(0)))
    moment = moment_of(task_rows(1))
    candidate = decompose(Energy(), moment, [40], before.basis, name="w")
    free = torch.eye(24, dtype=torch.float64) - slow.projector(before.basis)[0]
    dense = torch.linalg.eigvalsh(free @ slow.double(moment[0]) @ free).flip(0).clamp(min=0)
    found = candidate.spectra[0]
    assert torch.allclose(candidate.values[0].double(), dense, atol=1e-5 * float(dense[0]))
    assert found.covered == pytest.approx(1 - float(dense.sum() / moment[0].trace()), abs=1e-5)
    assert (found.kept, found.free, found.size, found.rows) == (6, 18, 24, 40)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(slow.double(moment[0]))[-1]), rel=0.05)


@pytest.mark.parametrize("policy", [Energy(0.9), TailEnergy(0.3)], ids=["append", "accumulate"])
def test_energy_is_the_share_of_the_new_task_inside_the_basis(policy):
    before = consolidate(policy, moment_of(task_rows(0), task_rows(1)))
    moment = moment_of(task_rows(2), 3 * task_rows(3))
    after = consolidate(policy, moment, before)
    inside = (slow.projector(after.basis) @ slow.double(moment)).diagonal(dim1=1, dim2=2).sum()
    assert after.energy == pytest.approx(float(inside / slow.double(moment).diagonal(dim1=1, dim2=2).sum()), abs=1e-5)


def test_dropped_is_the_share_of_old_directions_lost():
    first = consolidate(TailEnergy(0.3), moment_of(task_rows(0)))
    assert first.dropped == 0.0
    same = consolidate(TailEnergy(0.3), moment_of(task_rows(0)), first)
    assert same.dropped == pytest.approx(0.0, abs=1e-5)
    other = consolidate(TailEnergy(0.3), moment_of(task_rows(9)), first)
    angles = slow.projector(other.basis)[0] @ slow.double(first.basis[0])
    expected = 1 - float((angles**2).sum()) / first.ranks[0]
    assert 0 < other.dropped == pytest.approx(expected, abs=1e-5)


def test_complex_second_moments_grow_too():
    generator = torch.Generator().manual_seed(0)
    before = None
    for _ in range(3):
        rows = torch.randn(4, 10, generator=generator, dtype=torch.complex128)
        before = consolidate(Energy(0.99), moment_of(rows, dtype=torch.complex64), before)
        assert before.basis.dtype == torch.complex64 and orthogonality_error(before.basis) <= 1e-6
        leftover = rows.conj() - rows.conj() @ slow.projector(before.basis)[0].mT
        assert float(leftover.norm() ** 2 / rows.norm() ** 2) <= 0.01 + 1e-5


def test_examine_and_choose_leave_their_arguments_alone():
    moment = moment_of(task_rows(0))
    for policy in (Energy(), TailEnergy()):
        first = consolidate(policy, moment)
        saved = [t.clone() for t in (moment, first.basis, *(() if first.covariance is None else (first.covariance,)))]
        consolidate(policy, moment, first)
        now = [moment, first.basis, *(() if first.covariance is None else (first.covariance,))]
        assert all(torch.equal(a, b) for a, b in zip(saved, now))


def test_the_result_is_deterministic():
    runs = [
        consolidate(Energy(0.9), moment_of(task_rows(1)), consolidate(Energy(0.9), moment_of(task_rows(0))))
        for _ in "ab"
    ]
    assert torch.equal(runs[0].basis, runs[1].basis)


def test_wrong_arguments_name_the_parameter():
    basis = consolidate(FixedRank(2), moment_of(task_rows(0))).basis
    with pytest.raises(ShapeError, match=r"'c_fc\.weight' has stored shape \(1, 24, 2\)"):
        decompose(Energy(), torch.eye(10)[None], [4], basis, name="c_fc.weight")
    with pytest.raises(ConsolidationError, match=r"'c_fc\.weight' is not finite"):
        decompose(Energy(), torch.full((1, 24, 24), float("nan")), [4], basis, name="c_fc.weight")
    candidate = decompose(Energy(), moment_of(task_rows(0)), [4], basis, name="c_fc.weight")
    for number in (-1, 23):
        with pytest.raises(ConsolidationError, match=rf"takes {number} directions of 'c_fc\.weight', expected 0 to 22"):
            grow_basis(candidate, [number], basis)
