"""Bases of weights that have grown, against dense projectors of the old weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stores import orthonormal, subspace
from torch import Tensor

from nullspace_optim.errors import ShapeError
from nullspace_optim.subspace.basis import Basis, Fate, Subspace
from nullspace_optim.subspace.growth import check_shapes, contains, leading_block, widen
from nullspace_optim.subspace.layout import Layout

# layout, old shape, new shape
GROWN: list[tuple[Layout, tuple[int, ...], tuple[int, ...]]] = [
    (Layout(), (4, 6), (7, 6)),
    (Layout(), (4, 6), (4, 9)),
    (Layout(), (4, 6), (7, 9)),
    (Layout(), (4, 3, 2, 2), (5, 4, 2, 2)),
    (Layout(), (4, 3, 2, 2), (5, 4, 3, 3)),
    (Layout("grouped", 2), (4, 3, 2), (8, 3, 2)),
    (Layout("grouped", 2), (4, 3, 2), (4, 5, 2)),
    (Layout("transposed"), (4, 3, 2), (6, 5, 2)),
    (Layout("transposed", 2), (4, 3, 2), (6, 5, 2)),
    (Layout("batched"), (2, 4, 6), (3, 5, 8)),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def directions(layout: Layout, shape: tuple[int, ...], side: Any, part: Subspace, new: tuple[int, ...]) -> set[Any]:
    """Return every protected functional of the weight as a dense tensor of the `new` shape, rounded: the slow way."""
    groups, m, d = layout.matrix_shape(shape)
    found = set()
    for group in range(groups):
        for column in range(part.ranks[group]):
            for other in range(m if side == "right" else d):
                matrix = torch.zeros(groups, m, d)
                if side == "right":
                    matrix[group, other] = part.basis[group, :, column]
                else:
                    matrix[group, :, other] = part.basis[group, :, column]
                dense = torch.zeros(new)
                dense[tuple(slice(n) for n in shape)] = layout.from_matrix(matrix, shape)
                found.add(tuple(dense.flatten().tolist()))
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("layout", "old", "new"), GROWN)
def test_a_wider_weight_keeps_every_functional_of_the_old_one(
    layout: Layout, old: tuple[int, ...], new: tuple[int, ...], side: Any
) -> None:
    before = torch.randn(old)
    groups = layout.matrix_shape(old)[0]
    part = subspace(side, layout.to_matrix(before), tuple(1 + g % 2 for g in range(groups)), covariance=side == "right")
    part.scale = torch.rand(groups, max(part.ranks)).round(decimals=2)
    part.members = torch.rand(2, groups, max(part.ranks)) < 0.5
    if side == "left":  # its covariance is [m, m]
        part.covariance = torch.eye(part.size).repeat(groups, 1, 1)
    basis = Basis("w", old, Fate.FULL, "", layout, {side: part}, ("a", "b"), kept=before)
    after = torch.randn(new)
    leading_block(after, old).copy_(before + 1e-3 * torch.randn(old))  # anchors stay, whatever rounding did since
    wide = widen(basis, after, None)
    found = wide.subspaces[side]
    assert wide.fate is Fate.PROTECTED and wide.kept is None and wide.shape == new
    matrix = wide.layout.to_matrix(after)
    anchors = matrix @ found.basis if side == "right" else found.basis.mT @ matrix
    assert torch.allclose(found.anchor, anchors, atol=0.03)
    assert set(part.anchor.flatten().tolist()) <= set(found.anchor.flatten().tolist())
    assert directions(layout, old, side, part, new) <= directions(wide.layout, new, side, found, new)
    assert found.rank == part.rank and found.spectrum.shape == found.basis.shape[:2]
    assert float(found.covariance.sum()) == float(part.covariance.sum())
    assert float(found.scale.sum()) == float(part.scale.sum()) and int(found.members.sum()) == int(part.members.sum())


def test_a_joint_bias_stays_the_last_column() -> None:
    before, bias = torch.randn(4, 6), torch.randn(4)
    U = orthonormal(1, 7, (3,))
    joint = torch.cat([before, bias[:, None]], 1)
    part = Subspace("right", U, (joint @ U[0])[None], (3,), 7, torch.ones(1, 7), 1.0, torch.eye(7)[None])
    basis = Basis("w", (4, 6), Fate.PROTECTED, "", Layout(), {"right": part}, bias="b")
    after, wider = torch.randn(5, 8), torch.randn(5)
    after[:4, :6], wider[:4] = before, bias
    found = widen(basis, after, wider).subspaces["right"]
    assert torch.equal(found.basis[0, :6], U[0, :6]) and torch.equal(found.basis[0, 8], U[0, 6])
    assert not found.basis[0, 6:8].any() and torch.equal(found.anchor[0, :4], part.anchor[0])
    assert torch.allclose(found.anchor[0], torch.cat([after, wider[:, None]], 1) @ found.basis[0], atol=1e-6)


def test_kept_rows_and_frozen_values_are_the_old_ones() -> None:
    before, index = torch.randn(5, 3), torch.tensor([0, 4])
    part = Subspace("rows", index, before[index], (2,), 5, torch.zeros(1, 0), 1.0)
    after = torch.randn(9, 4)
    found = widen(Basis("w", (5, 3), Fate.PROTECTED, "", subspaces={"rows": part}), after, None).subspaces["rows"]
    assert found.size == 9 and torch.equal(found.basis, index) and not found.full
    assert torch.equal(found.anchor[:, :3], before[index]) and torch.equal(found.anchor[:, 3], after[index, 3])
    frozen = widen(Basis("w", (5, 3), Fate.FROZEN, "", kept=before), after, None)
    assert frozen.kept is not None and torch.equal(frozen.kept[:5, :3], before)
    assert torch.equal(frozen.kept[5:], after[5:]) and frozen.kept is not after


def test_groups_that_grow_in_size_are_left_to_the_caller() -> None:
    part = subspace("right", torch.randn(2, 2, 3), (1, 1))
    basis = Basis("w", (4, 3), Fate.FULL, "", Layout("grouped", 2), {"right": part}, kept=torch.zeros(4, 3))
    same = widen(basis, torch.randn(5, 3), None)
    assert same.shape == (4, 3) and same.fate is Fate.PROTECTED and same.kept is None


@pytest.mark.parametrize(("shape", "fits"), [((4, 6), True), ((4, 9), True), ((3, 9), False), ((4, 6, 1), False)])
def test_only_larger_shapes_of_as_many_axes_fit(shape: tuple[int, ...], fits: bool) -> None:
    basis = Basis("w", (4, 6), Fate.FROZEN, "", kept=torch.zeros(4, 6))
    tensor = torch.zeros(shape)
    assert contains(shape, (4, 6)) is fits
    if fits:
        check_shapes({"w": basis}, {"w": tensor})
        block: Tensor = leading_block(tensor, (4, 6))
        block.add_(1)
        assert float(tensor.sum()) == 24
    else:
        with pytest.raises(ShapeError, match="'w' is"):
            check_shapes({"w": basis}, {"w": tensor})
    check_shapes({"w": Basis("w", (4, 6), Fate.FREE, "")}, {"w": tensor})  # free: of no consequence
