from __future__ import annotations

import numpy as np
import pytest
import reference_impl as slow
import torch
from torch import Tensor

import nullspace_optim.subspace.linalg as linalg
from nullspace_optim.errors import ConsolidationError, NullSpaceError, ShapeError


def random_basis(size: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=dtype))[0]


def moment(size: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    rows_ = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (rows_.mH @ rows_).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=["one", "stack", "two stacks"])
def test_eigh_diagonalises_in_descending_order(dtype, lead):
    stack = torch.stack([moment(12, 40, seed, dtype) for seed in range(max(1, int(np.prod(lead))))])
    matrix = stack.reshape(*lead, 12, 12)
    values, vectors = linalg.eigh(matrix, name="w")
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mH
    assert values.dtype == matrix.real.dtype if dtype.is_complex else values.dtype == dtype
    assert vectors.dtype == dtype and vectors.shape == matrix.shape and values.shape == matrix.shape[:-1]
    assert (values.diff(dim=-1) <= 0).all()
    assert torch.allclose(rebuilt, matrix, rtol=1e-4, atol=1e-4)


def test_eigh_leaves_its_argument_alone():
    for matrix in (moment(8, 20), moment(8, 20).T, moment(16, 20)[::2, ::2]):
        before = matrix.clone()
        linalg.eigh(matrix)
        assert torch.equal(matrix, before)


@pytest.mark.fault(79)
def test_eigh_clamps_negatives_from_rounding_only():
    values, _ = linalg.eigh(moment(64, 5), name="w")
    assert (values >= 0).all() and (values[5:] < 1e-4 * values[0]).all()
    with pytest.raises(ConsolidationError, match=r"'block\.weight'.*eigenvalue"):
        linalg.eigh(torch.diag(torch.tensor([1.0, 0.5, -0.1])), name="block.weight")


def test_eigh_takes_a_residual_that_is_all_rounding():
    noise = torch.diag(torch.tensor([1e-7, 0.0, -1e-7]))
    assert (linalg.eigh(noise, name="w", scale=1.0)[0] >= 0).all()
    with pytest.raises(ConsolidationError):
        linalg.eigh(noise, name="w")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.fault(78)
def test_eigh_refuses_non_finite_input_by_name(bad):
    matrix = torch.eye(4)
    matrix[1, 2] = bad
    with pytest.raises(ConsolidationError, match=r"'visual\.proj' is not finite"):
        linalg.eigh(matrix, name="visual.proj")


@pytest.mark.parametrize("shape", [(3,), (3, 4)], ids=str)
def test_eigh_refuses_other_shapes(shape):
    with pytest.raises(ShapeError, match="'w' has shape"):
        linalg.eigh(torch.zeros(shape), name="w")


def test_eigh_of_nothing_and_of_zero():
    values, vectors = linalg.eigh(torch.zeros(2, 0, 0))
    assert values.shape == (2, 0) and vectors.shape == (2, 0, 0)
    values, vectors = linalg.eigh(torch.zeros(5, 5))
    assert not values.any() and slow.orthogonality_error(vectors) < 1e-6


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("kind", ["raises", "nan"])
@pytest.mark.fault(78)
def test_eigh_retries_in_double_then_cpu_then_with_jitter(monkeypatch, failures, kind):
    matrix, real, seen = moment(6, 20), torch.linalg.eigh, []

    def failing(array):
        seen.append(array.clone())
        if len(seen) > failures:
            return real(array)
        if kind == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        return torch.return_types.linalg_eigh((array[0] * torch.nan, array * torch.nan))

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = linalg.eigh(matrix, name="w")
    assert [a.dtype for a in seen] == [torch.float32, torch.float64, torch.float64, torch.float64][: failures + 1]
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose((vectors * values) @ vectors.T, matrix, rtol=1e-4, atol=1e-4)
    if failures == 3:
        assert 0 < (seen[3] - seen[2]).abs().max() < 1e-5 * matrix.max()


@pytest.mark.fault(78)
def test_eigh_that_never_converges_names_the_parameter(monkeypatch):
    def failing(array):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(ConsolidationError, match=r"'text\.proj'.*did not converge"):
        linalg.eigh(torch.eye(3), name="text.proj")
    assert issubclass(ConsolidationError, NullSpaceError)


@pytest.mark.parametrize("seed", range(3))
def test_largest_eigenvalue_is_a_close_lower_bound(seed):
    matrix = torch.stack([moment(40, 60, seed), torch.block_diag(moment(39, 100, seed), torch.tensor([[50.0]]))])
    exact = torch.linalg.eigvalsh(matrix.double())[:, -1]
    found = linalg.largest_eigenvalue(matrix).double()
    assert (found <= exact * (1 + 1e-5)).all() and (found >= 0.95 * exact).all()
    assert linalg.largest_eigenvalue(torch.zeros(1, 4, 4)).tolist() == [0.0]


@pytest.mark.parametrize("size, rank", [(64, 20), (256, 256), (7, 1), (5, 0)], ids=str)
def test_polish_reaches_1e_7(size, rank):
    rough = (
        random_basis(size, rank) + 1e-4 * torch.randn(size, rank, generator=torch.Generator().manual_seed(1))
    ).float()
    fine = linalg.polish(rough)
    assert fine.dtype == torch.float32
    assert slow.orthogonality_error(linalg.polish(rough, dtype=torch.float64)) <= 1e-7
    assert slow.orthogonality_error(fine) <= 3e-7
    assert torch.allclose(fine, rough, atol=1e-3)


def test_polish_keeps_zero_columns_and_the_span():
    rough = (random_basis(32, 10).float() * (1 + 1e-5))[None].repeat(2, 1, 1)
    rough[1, :, 7:] = 0
    fine = linalg.polish(rough)
    assert not fine[1, :, 7:].any()
    assert slow.orthogonality_error(fine) <= 3e-7
    assert linalg.principal_angles(fine[1], rough[1]).max() < 1e-6


def test_polish_is_what_makes_float32_eigenvectors_orthonormal():
    vectors = linalg.eigh(moment(256, 300))[1]
    assert slow.orthogonality_error(vectors) > 3e-7 > slow.orthogonality_error(linalg.polish(vectors))


def test_polish_refuses_what_is_not_a_basis():
    with pytest.raises(ConsolidationError, match="orthonormalise"):
        linalg.polish(3.0 * random_basis(8, 3))


def test_polish_and_orthonormalise_are_complex_safe():
    basis = random_basis(16, 5, dtype=torch.complex128)
    assert slow.orthogonality_error(linalg.polish((basis + 1e-4).to(torch.complex64))) <= 3e-7
    assert torch.allclose(linalg.orthonormalise(basis), basis)


def test_orthonormalise_spans_the_same_and_keeps_signs_and_zeros():
    columns = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    columns[1, :, 4:] = 0
    basis = linalg.orthonormalise(columns)
    assert basis.dtype == torch.float32 and not basis[1, :, 4:].any()
    assert slow.orthogonality_error(basis) < 5e-7
    assert linalg.principal_angles(basis[1], columns[1]).max() < 1e-6
    assert ((basis * columns).sum(1)[0] > 0).all()
    assert torch.allclose(linalg.orthonormalise(basis), basis, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 13, 29, 30])
def test_complement_completes_the_basis(rank, dtype):
    double = torch.complex128 if dtype.is_complex else torch.float64
    basis = linalg.polish(random_basis(30, rank, dtype=double), dtype=dtype)
    rest = linalg.complement(basis)
    assert rest.shape == (30, 30 - rank) and rest.dtype == dtype
    assert slow.orthogonality_error(torch.cat([basis, rest], dim=1)) <= 5e-7
    exact = linalg.complement(random_basis(30, rank, dtype=double))
    assert slow.orthogonality_error(torch.cat([random_basis(30, rank, dtype=double), exact], dim=1)) <= 1e-7


def test_complement_of_a_stack_is_zero_padded():
    basis = torch.zeros(3, 10, 4)
    for group, rank in enumerate((4, 2, 0)):
        basis[group, :, :rank] = random_basis(10, rank, group).float()
    rest = linalg.complement(basis)
    assert rest.shape == (3, 10, 10)
    assert [(rest[g] != 0).any(0).sum().item() for g in range(3)] == [6, 8, 10]
    total = slow.projector(basis) + slow.projector(rest)
    assert torch.allclose(total, torch.eye(10, dtype=torch.float64).expand(3, 10, 10), atol=1e-6)


def test_principal_angles_agree_with_the_twin_and_are_exact_near_zero():
    first, second = random_basis(40, 7, 1), random_basis(40, 4, 2)
    assert torch.allclose(linalg.principal_angles(first, second), slow.principal_angles(first, second))
    tilt = torch.eye(3, 1, dtype=torch.float64)
    tilted = torch.tensor([[np.cos(1e-9)], [np.sin(1e-9)], [0.0]])
    assert linalg.principal_angles(tilt, tilted).item() == pytest.approx(1e-9, rel=1e-6)


def test_principal_angles_ignore_zero_columns_and_refuse_stacks():
    basis = torch.cat([random_basis(6, 2), torch.zeros(6, 3, dtype=torch.float64)], dim=1)
    assert linalg.principal_angles(basis, basis).shape == (2,)
    assert linalg.principal_angles(basis, torch.zeros(6, 2)).shape == (0,)
    for other in (torch.zeros(1, 6, 2), torch.zeros(7, 2)):
        with pytest.raises(ShapeError, match="two bases"):
            linalg.principal_angles(basis, other)


def test_orthogonality_error_is_the_worst_of_the_stack():
    stack = torch.eye(4)[None].repeat(3, 1, 1)
    assert slow.orthogonality_error(stack) == 0.0
    stack[1, :, 0] *= 2
    stack[2, :, 3] = 0
    assert slow.orthogonality_error(stack) == pytest.approx(3.0)
    assert slow.orthogonality_error(torch.zeros(4, 0)) == 0.0
