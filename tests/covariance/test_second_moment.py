"""Second moments equal a float64 oracle, merge, and are exact for shared, grouped and normalised sums."""

from __future__ import annotations

import pytest
import torch
from training import relative_drift

from nullspace_optim.covariance.second_moment import SecondMoment


def oracle(rows: torch.Tensor) -> torch.Tensor:
    """`[g, n, s]` -> `[g, s, s]` by explicit float64 outer products."""
    total = torch.zeros(rows.shape[0], rows.shape[2], rows.shape[2], dtype=torch.float64)
    for group, block in enumerate(rows.double()):
        for row in block:
            total[group] += torch.outer(row, row)
    return total


@pytest.mark.parametrize("groups,size", [(1, 5), (1, 130), (3, 70), (40, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_sum_equals_outer_products(groups: int, size: int, dtype: torch.dtype) -> None:
    rows = torch.randn(groups, 50, size)
    moment = SecondMoment(groups, size, dtype=dtype)
    moment.update(rows[:, :20])
    moment.update(rows[:, 20:])
    assert relative_drift(moment.matrix, oracle(rows)) < 1e-6
    assert moment.rows.tolist() == [50] * groups
    assert torch.equal(moment.matrix, moment.matrix.mT)


def test_updates_continue_after_the_matrix_was_read() -> None:
    rows = torch.randn(1, 40, 30)
    moment = SecondMoment(1, 30)
    for part in rows.split(10, dim=1):
        moment.update(part)
        _ = moment.matrix
    assert relative_drift(moment.matrix, oracle(rows)) < 1e-6


@pytest.mark.fault(49)
def test_noncontiguous_and_half_precision_rows_are_cast_up_first() -> None:
    rows = torch.randn(30, 40).bfloat16().T[None]
    moment = SecondMoment(1, 30)
    moment.update(rows)
    assert relative_drift(moment.matrix, oracle(rows.float())) < 1e-6


@pytest.mark.fault(67)
def test_user_autocast_does_not_reach_the_sum() -> None:
    rows = torch.randn(40, 20, 9)
    moment = SecondMoment(40, 9)
    with torch.autocast("cpu", torch.bfloat16):
        moment.update(rows)
    assert relative_drift(moment.matrix, oracle(rows)) < 1e-6


def test_merge_equals_one_pass_and_clone_is_independent() -> None:
    rows = torch.randn(2, 60, 12)
    left, right = SecondMoment(2, 12), SecondMoment(2, 12)
    left.update(rows[:, :25])
    twin = left.clone()
    right.update(rows[:, 25:])
    left.merge(right)
    assert relative_drift(left.matrix, oracle(rows)) < 1e-6
    assert relative_drift(twin.matrix, oracle(rows[:, :25])) < 1e-6
    assert left.rows.tolist() == [60, 60]


def test_trace_and_diagonal_need_no_mirror() -> None:
    rows = torch.randn(1, 20, 7)
    moment = SecondMoment(1, 7)
    moment.update(rows)
    assert torch.allclose(moment.trace(), rows.square().sum((1, 2)))
    assert torch.allclose(moment.diagonal(), rows.square().sum(1))


def test_a_subset_of_groups_is_updated() -> None:
    rows = torch.randn(2, 20, 6)
    moment = SecondMoment(4, 6)
    moment.update(rows, groups=(3, 1))
    full = torch.zeros(4, 20, 6)
    full[3], full[1] = rows
    assert relative_drift(moment.matrix, oracle(full)) < 1e-6
    assert moment.rows.tolist() == [0, 20, 0, 20]


def test_batch_frobenius_normalises_each_batch_not_each_update() -> None:
    first, second = torch.randn(1, 30, 8) * 9, torch.randn(1, 20, 8)
    moment = SecondMoment(1, 8, batch_frobenius=True)
    moment.update(first[:, :10])
    moment.update(first[:, 10:])
    moment.end_batch()
    moment.update(second)
    moment.end_batch()
    expected = sum(g / torch.linalg.matrix_norm(g)[:, None, None] for g in (oracle(first), oracle(second)))
    assert relative_drift(moment.matrix, expected) < 1e-6


@pytest.mark.fault(53)
def test_no_rows_is_a_valid_sum() -> None:
    moment = SecondMoment(1, 4)
    moment.update(torch.zeros(1, 0, 4))
    assert moment.matrix.tolist() == torch.zeros(1, 4, 4).tolist()


def test_leading_features_drop_the_constant_input() -> None:
    rows = torch.cat([torch.randn(1, 9, 4), torch.ones(1, 9, 1)], dim=-1)
    moment = SecondMoment(1, 5)
    moment.update(rows)
    assert relative_drift(moment.leading(4).matrix, oracle(rows[..., :4])) < 1e-6


def test_complex_rows_use_the_adjoint() -> None:
    rows = torch.randn(1, 9, 4, dtype=torch.complex64)
    moment = SecondMoment(1, 4, dtype=torch.complex64)
    moment.update(rows)
    expected = sum(torch.outer(row, row.conj()) for row in rows[0])
    assert torch.allclose(moment.matrix[0], expected, atol=1e-5)
