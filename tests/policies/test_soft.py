"""Directions that are kept by part: the kernel against dense mathematics, and the promise under a real optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference_impl as slow
import torch
from reference_impl import orthogonality_error
from spectra import consolidate, moment_of, task_rows
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import mlp, train

from nullspace_optim import SGP, Fate, NullSpaceOptimizer, Policy, StaleAnchorError
from nullspace_optim.consolidation.grow import GrownBasis
from nullspace_optim.policies import CODECL, OWM, VPTNSP
from nullspace_optim.subspace.linalg import orthonormalise
from nullspace_optim.subspace.projection import anchor, project_difference_, shift_anchor_, yield_anchor_

SOFT: tuple[Policy, ...] = (SGP(0.97), CODECL(), OWM(), VPTNSP(0.9))
POLICIES = pytest.mark.parametrize("policy", SOFT, ids=lambda policy: type(policy).__name__)


def basis_of(size: int, rank: int, groups: int = 1) -> Tensor:
    return orthonormalise(torch.randn(groups, size, rank, dtype=torch.float64))


# ---- the kernel


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_moving_anchor_equals_the_dense_soft_projection_of_every_step(side: Any) -> None:
    weight, U = torch.randn(2, 6, 9, dtype=torch.float64), basis_of(9 if side == "right" else 6, 4, 2)
    scale = torch.rand(2, 4, dtype=torch.float64)
    kept, expected = anchor(weight, U, side), weight.clone()
    for _ in range(5):
        step = torch.randn_like(weight)
        expected = slow.moved_within_free_directions(expected + step, expected, U, side, scale)
        yield_anchor_(weight.add_(step), U, kept, scale, side)
        assert torch.allclose(weight, expected, atol=1e-12)
        assert torch.allclose(kept, anchor(weight, U, side), atol=1e-12)


def test_the_difference_form_moves_the_anchor_alike() -> None:
    weight, U, scale = torch.randn(1, 6, 9), basis_of(9, 4).float(), torch.rand(1, 4)
    before, kept = weight.clone(), anchor(weight, U, "right")
    moved = weight + torch.randn_like(weight)
    other, followed = moved.clone(), kept.clone()
    project_difference_(moved, before, U, "right", scale, kept=kept)
    yield_anchor_(other, U, followed, scale, "right")
    assert torch.allclose(moved, other, atol=1e-5) and torch.allclose(kept, followed, atol=1e-5)


def test_a_scale_of_one_keeps_the_anchor_bitwise_and_zero_protects_nothing() -> None:
    weight, U = torch.randn(1, 6, 9), basis_of(9, 2).float()
    kept = anchor(weight, U, "right")
    first, moved = kept.clone(), weight + 1
    yield_anchor_(weight.add_(1), U, kept, torch.tensor([[1.0, 0.0]]), "right")
    assert torch.equal(kept[..., 0], first[..., 0])
    assert torch.allclose(kept[..., 1], (moved @ U)[..., 1], atol=1e-5)
    assert torch.allclose((weight @ U)[..., 0], first[..., 0], atol=1e-5)


def test_two_soft_sides_are_the_product_of_both_projections() -> None:
    weight, right, left = torch.randn(1, 6, 9, dtype=torch.float64), basis_of(9, 3), basis_of(6, 2)
    s_right, s_left = torch.rand(1, 3, dtype=torch.float64), torch.rand(1, 2, dtype=torch.float64)
    A, B, expected = anchor(weight, right, "right"), anchor(weight, left, "left"), weight.clone()
    for _ in range(4):
        step = torch.randn_like(weight)
        inner = slow.moved_within_free_directions(step, torch.zeros_like(step), right, "right", s_right)
        expected = expected + slow.moved_within_free_directions(inner, torch.zeros_like(step), left, "left", s_left)
        yield_anchor_(weight.add_(step), right, A, s_right, "right")
        removed = yield_anchor_(weight, left, B, s_left, "left")
        shift_anchor_(A, right, removed, left, "right")
        assert torch.allclose(weight, expected, atol=1e-12)
        assert torch.allclose(A, weight @ right, atol=1e-12) and torch.allclose(B, left.mT @ weight, atol=1e-12)


# ---- the rules against the papers' formulas


@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0, 25.0])
def test_sgp_is_the_papers_importance_by_singular_value_decomposition(alpha: float) -> None:
    policy, tasks, before = SGP(0.9, alpha), [task_rows(t, n=30, decay=1.5) for t in range(4)], None
    for done in range(1, 5):
        before = consolidate(policy, moment_of(tasks[done - 1], dtype=torch.float64), before)
        memory, importance = slow.sgp(tasks[:done], 0.9, alpha)
        assert before.ranks == (memory.shape[1],)
        dense = slow.projector(before.basis * before.scale.sqrt()[:, None, :])[0]
        assert torch.allclose(dense, (memory * importance) @ memory.T, atol=2e-5)
    assert float(before.scale.max()) == 1.0 and float(before.scale.min()) < 0.999


@pytest.mark.parametrize("aperture, gain, floor", [(6.0, 0.95, 0.2), (1.0, 0.5, 0.0), (30.0, 0.99, 0.2), (4, 0.9, 0.6)])
def test_code_cl_is_jaegers_boolean_logic_by_inverses(aperture: float, gain: float, floor: float) -> None:
    policy, tasks, before = CODECL(aperture, gain, floor), [task_rows(t, n=40, decay=2.0) for t in range(3)], None
    for done in range(1, 4):
        earlier, before = before, consolidate(policy, moment_of(tasks[done - 1], dtype=torch.float64), before)
        found = slow.projector(before.basis * before.scale.sqrt()[:, None, :])[0]
        assert torch.allclose(found, slow.code_cl(tasks[:done], aperture, gain, floor), atol=1e-5)
        if earlier is not None:
            old = slow.projector(earlier.basis * earlier.scale.sqrt()[:, None, :])[0]
            assert floor > 0 or float(torch.linalg.eigvalsh(found - old).min()) >= -1e-5  # OR never loosens
    assert before.covariance is None and before.renewed


# ---- what holds for all of them


@POLICIES
def test_bases_stay_orthonormal_over_fifty_tasks_and_scales_stay_shares(policy: Policy) -> None:
    before: GrownBasis | None = None
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randn(16, 64, generator=generator) * torch.logspace(0, -2, 64)
        before = consolidate(policy, moment_of(rows[:, torch.randperm(64, generator=generator)]), before)
        assert orthogonality_error(before.basis) <= 1e-6
        assert before.scale is not None and before.scale.shape == (1, before.basis.shape[2])
        assert 0 <= float(before.scale.min()) and float(before.scale.max()) <= 1


@POLICIES
def test_groups_have_scales_of_their_own(policy: Policy) -> None:
    rows = [task_rows(0), task_rows(1, n=3), torch.zeros(2, 24, dtype=torch.float64)]
    later = [task_rows(4), task_rows(5, n=3), task_rows(6, n=2)]
    together = consolidate(policy, moment_of(*later), consolidate(policy, moment_of(*rows)))
    for group in range(3):
        alone = consolidate(policy, moment_of(later[group]), consolidate(policy, moment_of(rows[group])))
        rank = alone.ranks[0]
        assert together.ranks[group] == rank
        assert torch.allclose(together.scale[group, :rank], alone.scale[0], atol=1e-3)
        assert not together.scale[group, rank:].any()


def _rows(seed: int, n: int = 64) -> Tensor:
    return task_rows(seed, n=n, decay=2.0).float() * 8


def _train(optimizer: Any, model: nn.Module, steps: int, seed: int = 9) -> None:
    inputs = _rows(seed)
    targets = torch.randn(len(inputs), 8, generator=torch.Generator().manual_seed(seed))
    train(optimizer, model, steps, inputs, targets)


def _protected(policy: Policy, base: Any = None, **options: Any) -> tuple[nn.Module, NullSpaceOptimizer]:
    model = mlp()
    base = base or AdamW(model.parameters(), lr=0.01)
    optimizer = NullSpaceOptimizer(base, model, policy=policy, **options)
    _train(optimizer, model, 20, seed=8)
    optimizer.consolidate([_rows(0)], progress=False)
    return model, optimizer


@POLICIES
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_step_lets_the_free_share_of_each_direction_through_and_no_more(policy: Policy, precision: Any) -> None:
    """`W_t U - W_0 U = (1 - s) * sum of what the base wanted to change along U`, after 200 AdamW steps."""
    model = mlp()
    base = AdamW(model.parameters(), lr=0.003)
    weight = model[0].weight
    seen: dict[str, Tensor] = {}
    wanted = torch.zeros(16, 24, dtype=torch.float64)
    base.register_step_pre_hook(lambda *_: seen.update(before=weight.detach().double().clone()))
    base.register_step_post_hook(lambda *_: wanted.add_(weight.detach().double() - seen["before"]))  # runs before ours
    optimizer = NullSpaceOptimizer(base, model, policy=policy, precision=precision)
    optimizer.consolidate([_rows(0)], progress=False)
    subspace = optimizer.bases["0.weight"].subspaces["right"]
    U, scale, start = subspace.basis[0].double(), subspace.scale[0].double(), weight.detach().double().clone()
    assert 0 < int((scale < 0.99).sum())
    _train(optimizer, model, 200)
    report = optimizer.verify()
    assert report.ok, str(report)
    allowed = (wanted @ U) * (1 - scale)
    moved = (weight.detach().double() - start) @ U
    assert float(allowed.norm()) > 1e-3
    error = float((moved - allowed).norm())
    assert error <= (1e-5 * float(start.norm()) if precision == "exact" else 5e-3 * float(wanted.norm()))
    full = scale == 1
    assert not full.any() or float(moved[:, full].norm() / (start @ U)[:, full].norm()) <= 1e-5


@POLICIES
def test_softly_kept_weights_that_are_edited_are_found(policy: Policy) -> None:
    model, optimizer = _protected(policy)
    _train(optimizer, model, 5)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    assert not optimizer.verify().ok
    with pytest.raises(StaleAnchorError, match=r"'0\.weight'.*reanchor"):
        _train(optimizer, model, 1)
    optimizer.reanchor()
    _train(optimizer, model, 5)
    assert optimizer.verify().ok


@POLICIES
def test_a_resumed_run_equals_the_uninterrupted_one(policy: Policy, tmp_path: Any) -> None:
    model, optimizer = _protected(policy)
    _train(optimizer, model, 5)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    optimizer.save(tmp_path / "bases")
    _train(optimizer, model, 5)
    other = mlp()
    other.load_state_dict(weights)
    again = NullSpaceOptimizer(AdamW(other.parameters(), lr=0.01), other, policy=policy)
    torch.save(state, tmp_path / "state")
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    _train(again, other, 5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert again.verify().ok
    other.load_state_dict(weights)
    again.load(tmp_path / "bases")
    _train(again, other, 5)
    assert again.verify().ok


@POLICIES
def test_the_gradient_alone_is_scaled_as_published(policy: Policy) -> None:
    model = mlp()
    base = SGD(model.parameters(), lr=0.01)
    plain = NullSpaceOptimizer(base, model, policy=policy, project="gradient")
    plain.consolidate([_rows(0)], progress=False)
    subspace = plain.bases["0.weight"].subspaces["right"]
    before = model[0].weight.detach().clone()
    plain.zero_grad()
    model(_rows(9)).square().mean().backward()
    gradient = model[0].weight.grad.clone()
    plain.step()
    expected = slow.moved_within_free_directions(
        (before - 0.01 * gradient)[None], before[None], subspace.basis, "right", subspace.scale
    )
    assert torch.allclose(model[0].weight.detach().double(), expected[0], atol=1e-6)


@POLICIES
def test_tasks_can_follow_each_other_and_full_means_nothing_is_let_through(policy: Policy) -> None:
    model, optimizer = _protected(policy)
    for task in range(1, 4):
        _train(optimizer, model, 20, seed=20 + task)
        report = optimizer.consolidate([_rows(task)], progress=False)
        assert optimizer.verify().ok and optimizer.bases["0.weight"].fate is Fate.PROTECTED
        assert 0 < optimizer.capacity()["0.weight"] < 1
        line = next(p for p in report.parameters if p.name == "0.weight")
        assert line.free == int(24 - optimizer.bases["0.weight"].subspaces["right"].held)
