from __future__ import annotations

import pytest
import reference_impl as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nullspace_optim.subspace.linalg import complement, polish
from nullspace_optim.subspace.projection import (
    anchor,
    anchor_drift,
    exact_products,
    project_difference_,
    project_difference_complement_,
    project_gradient_,
    project_gradient_complement_,
    restore_anchor_,
    restore_rows_,
)

M, D, K = 12, 20, 7
SIDES = pytest.mark.parametrize("side", ["right", "left"])
GROUPS = pytest.mark.parametrize("groups", [1, 3])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_basis(
    side: str,
    rank: int = K,
    groups: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int] = (M, D),
) -> Tensor:
    """An orthonormal basis of `rank` directions; later groups have fewer and are zero padded."""
    size = shape[1] if side == "right" else shape[0]
    double = torch.complex128 if dtype.is_complex else torch.float64
    columns = torch.linalg.qr(random(groups, size, rank, seed=seed + 100, dtype=double))[0]
    for group in range(1, groups):
        columns[group, :, rank - group :] = 0
    return polish(columns, dtype=dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((slow.double(found) - slow.double(expected)).norm() / slow.double(expected).norm())


@SIDES
@GROUPS
@DTYPES
def test_restore_anchor_undoes_the_protected_part_only(side, groups, dtype):
    start, basis = random(groups, M, D, dtype=dtype), make_basis(side, groups=groups, dtype=dtype)
    kept = anchor(start, basis, side)
    moved = start + random(groups, M, D, seed=1, dtype=dtype)
    expected = slow.moved_within_free_directions(moved, start, basis, side)
    result = restore_anchor_(moved, basis, kept, side)
    assert result is moved
    assert error(moved, expected) < 1e-6
    assert float(anchor_drift(moved, basis, kept, side)) < 2e-6


@SIDES
@GROUPS
@DTYPES
@pytest.mark.parametrize("rank", [1, K, 12])
def test_difference_forms_equal_the_dense_projector(side, groups, dtype, rank):
    start, basis = random(groups, M, D, dtype=dtype), make_basis(side, rank, groups, dtype=dtype)
    moved = start + random(groups, M, D, seed=1, dtype=dtype)
    expected = slow.moved_within_free_directions(moved, start, basis, side)
    through_basis = project_difference_(moved.clone(), start, basis, side)
    through_complement = project_difference_complement_(moved.clone(), start, complement(basis), side)
    assert error(through_basis, expected) < 1e-6
    assert error(through_complement, expected) < 1e-6


@SIDES
@GROUPS
def test_soft_scale_weighs_each_direction(side, groups):
    start, basis = random(groups, M, D), make_basis(side, groups=groups)
    moved, scale = start + random(groups, M, D, seed=1), torch.linspace(0, 1, K).repeat(groups, 1)
    expected = slow.moved_within_free_directions(moved, start, basis, side, scale)
    assert error(project_difference_(moved.clone(), start, basis, side, scale), expected) < 1e-6
    hard = project_difference_(moved.clone(), start, basis, side)
    assert torch.equal(project_difference_(moved.clone(), start, basis, side, torch.ones(groups, K)), hard)
    assert torch.equal(project_difference_(moved.clone(), start, basis, side, torch.zeros(groups, K)), moved)


@SIDES
def test_gradient_projection_is_that_of_gpm(side):
    gradient, basis = random(2, M, D), make_basis(side, groups=2)
    expected = slow.double(gradient) - slow.protected_part(gradient, basis, side)
    assert error(project_gradient_complement_(gradient.clone(), complement(basis), side), expected) < 1e-6
    assert error(project_gradient_(gradient, basis, side), expected) < 1e-6


def test_two_sided_is_right_then_left_and_keeps_both_anchors():
    start, right, left = random(1, M, D), make_basis("right", seed=1), make_basis("left", 5, seed=2)
    moved = start + random(1, M, D, seed=3)
    identity_m, identity_d = torch.eye(M, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    change = slow.double(moved - start)
    expected = slow.double(start) + (identity_m - slow.projector(left)) @ change @ (identity_d - slow.projector(right))
    anchors = anchor(start, right, "right"), anchor(start, left, "left")
    by_difference, by_anchor, by_complement = moved.clone(), moved.clone(), moved.clone()
    for side, basis, kept in (("right", right, anchors[0]), ("left", left, anchors[1])):
        project_difference_(by_difference, start, basis, side)
        project_difference_complement_(by_complement, start, complement(basis), side)
        restore_anchor_(by_anchor, basis, kept, side)
    for weight in (by_difference, by_anchor, by_complement):
        assert error(weight, expected) < 1e-6
        assert float(anchor_drift(weight, right, anchors[0], "right")) < 2e-6
        assert float(anchor_drift(weight, left, anchors[1], "left")) < 2e-6


@SIDES
@pytest.mark.parametrize("low_precision", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_difference_forms_are_idle_when_nothing_moved(side, dtype, low_precision):
    weight = random(2, M, D).to(dtype)
    before, basis = weight.clone(), make_basis(side, groups=2)
    project_difference_(weight, before, basis, side, low_precision=low_precision)
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
    project_difference_complement_(weight, before, complement(basis), side, low_precision=low_precision)
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))


@SIDES
def test_low_precision_products_err_relative_to_the_change(side):
    start, basis = random(1, M, D), make_basis(side)
    moved = start + 1e-4 * random(1, M, D, seed=1)
    expected = slow.moved_within_free_directions(moved, start, basis, side)
    change = slow.double(moved - start).norm()
    for result in (
        project_difference_(moved.clone(), start, basis, side, low_precision=torch.bfloat16),
        project_difference_(moved.clone(), start, basis.bfloat16(), side, low_precision=torch.bfloat16),
        project_difference_complement_(moved.clone(), start, complement(basis), side, low_precision=torch.bfloat16),
    ):
        assert result.dtype == torch.float32
        assert 1e-6 < float((slow.double(result) - expected).norm() / change) < 2e-2


@SIDES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.fault(14)
def test_half_precision_weights_are_corrected_in_float32_and_rounded_once(side, dtype):
    start, basis = random(1, M, D).to(dtype), make_basis(side)
    moved = (start + random(1, M, D, seed=1)).to(dtype)
    expected = slow.moved_within_free_directions(moved, start, basis, side)
    kept = anchor(start, basis, side)
    assert kept.dtype == torch.float32
    results = (
        restore_anchor_(moved.clone(), basis, kept, side),
        project_difference_(moved.clone(), start, basis, side),
        project_difference_complement_(moved.clone(), start, complement(basis), side),
    )
    for result in results:
        assert result.dtype == dtype
        spacing = torch.finfo(dtype).eps * expected.abs()
        assert ((slow.double(result) - expected).abs() <= 0.5 * spacing + 1e-5).all()
        drift = float(anchor_drift(result, basis, kept, side))
        assert drift <= torch.finfo(dtype).eps * float(result.float().norm() / kept.norm())


@SIDES
def test_workspace_is_used_and_changes_nothing(side):
    start, basis = random(2, M, D), make_basis(side, groups=2)
    kept, moved = anchor(start, basis, side), start + 1
    workspace = torch.full_like(kept, float("nan"))
    with_workspace = restore_anchor_(moved.clone(), basis, kept, side, workspace=workspace)
    assert torch.equal(with_workspace, restore_anchor_(moved.clone(), basis, kept, side))
    assert torch.allclose(workspace, anchor(moved, basis, side) - kept, atol=1e-5)


@SIDES
def test_parameters_and_views_are_written_in_place_without_autograd(side):
    parameter = torch.nn.Parameter(random(M, D))
    start, basis = parameter.detach().clone()[None], make_basis(side)
    kept, address = anchor(parameter[None], basis, side), parameter.data_ptr()
    assert not kept.requires_grad
    for correct in (
        lambda w: restore_anchor_(w, basis, kept, side),
        lambda w: project_difference_(w, start, basis, side),
        lambda w: project_difference_complement_(w, start, complement(basis), side),
    ):
        with torch.no_grad():
            parameter.add_(1.0)
        version = parameter._version
        correct(parameter.detach()[None])
        assert parameter.data_ptr() == address and parameter._version > version and parameter.grad_fn is None
        assert float(anchor_drift(parameter[None], basis, kept, side)) < 2e-6


@pytest.mark.fault(16)
def test_a_transposed_weight_is_corrected_through_its_strides():
    storage, basis = random(D, M), make_basis("right")
    weight = storage.T[None]
    kept = anchor(weight, basis, "right")
    storage += 1
    restore_anchor_(weight, basis, kept, "right")
    assert float(anchor_drift(storage.T[None], basis, kept, "right")) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_rows_come_back_bitwise(dtype):
    table, index = random(1, 30, 4).to(dtype), torch.tensor([0, 7, 29])
    before, kept = table.clone(), anchor(table, index, "rows")
    table += 1
    assert float(anchor_drift(table, index, kept, "rows")) > 0.1
    restore_rows_(table, index, kept)
    assert torch.equal(table[0, index], before[0, index])
    assert torch.equal(table[0, 1:7], (before + 1)[0, 1:7])
    assert float(anchor_drift(table, index, kept, "rows")) == 0.0
    table += 1
    assert torch.equal(restore_anchor_(table, index, kept, "rows")[0, index], before[0, index])


@SIDES
def test_a_basis_of_rank_zero_protects_nothing(side):
    start, basis = random(2, M, D), make_basis(side, groups=2)[:, :, :0]
    moved = start + 1
    kept = anchor(start, basis, side)
    assert torch.equal(restore_anchor_(moved.clone(), basis, kept, side), moved)
    assert torch.equal(project_difference_(moved.clone(), start, basis, side), moved)
    assert error(project_difference_complement_(moved.clone(), start, complement(basis), side), moved) < 1e-6
    assert float(anchor_drift(moved, basis, kept, side)) == 0.0


def test_a_full_basis_protects_everything():
    start, basis = random(1, M, D), make_basis("right", D)
    kept, moved = anchor(start, basis, "right"), random(1, M, D, seed=1)
    assert error(restore_anchor_(moved.clone(), basis, kept, "right"), start) < 1e-6
    assert torch.equal(project_difference_complement_(moved.clone(), start, complement(basis), "right"), start)


def test_drift_is_relative_to_the_anchor_and_safe_at_zero():
    basis = make_basis("right")
    weight = random(1, M, D)
    kept = anchor(weight, basis, "right")
    off = weight + 0.01 * (kept @ basis.mH)
    assert float(anchor_drift(off, basis, kept, "right")) == pytest.approx(0.01, rel=1e-3)
    zero = torch.zeros(1, M, D)
    none = anchor(zero, basis, "right")
    assert float(anchor_drift(zero, basis, none, "right")) == 0.0
    assert float(anchor_drift(weight, basis, none, "right")) > 1
    free_only = weight - weight @ basis @ basis.mH
    assert float(anchor_drift(free_only, basis, none, "right")) < 1e-3


def test_many_steps_leave_no_accumulated_error():
    generator = torch.Generator().manual_seed(0)
    weight, basis = random(1, M, D), make_basis("right")
    start, kept = weight.clone(), anchor(weight, basis, "right")
    free, total = torch.eye(D, dtype=torch.float64) - slow.projector(basis), torch.zeros(1, M, D, dtype=torch.float64)
    for _ in range(300):
        step = 1e-3 * torch.randn(1, M, D, generator=generator)
        total += slow.double(step) @ free
        weight += step
        restore_anchor_(weight, basis, kept, "right")
    assert float(anchor_drift(weight, basis, kept, "right")) < 1e-6
    assert error(weight - start, total) < 1e-3


@pytest.mark.fault(84)
def test_products_are_exact_under_autocast_and_low_matmul_precision():
    weight, basis = random(1, 256, 256), make_basis("right", 64, shape=(256, 256))
    exact = slow.double(weight) @ slow.double(basis)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = anchor(weight, basis, "right")
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32 and error(found, exact) < 1e-6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_exact_products_restores_the_flags_of_its_device_after_an_error(device):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ZeroDivisionError), exact_products(torch.device(device)):
            if device == "cuda" and hasattr(torch.backends.cuda.matmul, "fp32_precision"):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**20))
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def drawn(shape: tuple[int, int, int, int], side: str, share: float) -> tuple[Tensor, Tensor, Tensor]:
    groups, m, d, seed = shape
    size = d if side == "right" else m
    columns = torch.linalg.qr(random(groups, size, max(1, round(share * size)), seed=seed, dtype=torch.float64))[0]
    return random(groups, m, d, seed=seed + 1), random(groups, m, d, seed=seed + 2), polish(columns)


@given(SHAPES, st.sampled_from(["right", "left"]), st.floats(0, 1))
@PROPERTY
def test_property_projection_is_idempotent(shape, side, share):
    start, moved, basis = drawn(shape, side, share)
    once = project_difference_(moved.clone(), start, basis, side)
    twice = project_difference_(once.clone(), start, basis, side)
    assert torch.allclose(once, twice, atol=1e-5)
    kept = anchor(start, basis, side)
    assert torch.allclose(restore_anchor_(moved.clone(), basis, kept, side), once, atol=1e-5)


@given(SHAPES, st.sampled_from(["right", "left"]), st.floats(0, 1))
@PROPERTY
def test_property_the_complement_is_untouched(shape, side, share):
    start, moved, basis = drawn(shape, side, share)
    free = complement(basis)
    before = anchor(moved, free, side)
    for result in (
        restore_anchor_(moved.clone(), basis, anchor(start, basis, side), side),
        project_difference_(moved.clone(), start, basis, side),
    ):
        assert torch.allclose(anchor(result, free, side), before, atol=1e-5)


@given(SHAPES, st.floats(0, 1))
@PROPERTY
def test_property_row_permutations_commute_with_the_right_projection(shape, share):
    start, moved, basis = drawn(shape, "right", share)
    order = torch.randperm(start.shape[1], generator=torch.Generator().manual_seed(shape[3]))
    projected = project_difference_(moved.clone(), start, basis, "right")
    permuted = project_difference_(moved[:, order].clone(), start[:, order], basis, "right")
    assert torch.allclose(projected[:, order], permuted, atol=1e-5)
    gradient = project_gradient_(moved.clone(), basis, "right")
    assert torch.allclose(gradient[:, order], project_gradient_(moved[:, order].clone(), basis, "right"), atol=1e-5)
