"""Comparison of two basis stores: spans by principal angles, anchors on the directions that both keep.

Angles are those of Björck and Golub (1973) between the spans of two bases `[s, k]` and `[s, l]`: `min(k, l)` angles in
radians; all zero if the smaller span lies in the larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from ..subspace.basis import Basis, BasisStore, Subspace
from ..subspace.layout import Side
from ..subspace.linalg import principal_angles


@dataclass(frozen=True)
class SideComparison:
    """One side of one parameter in two stores.

    `ranks` are both ranks (0 where a store lacks the side); `angle` is the largest principal angle in radians over all
    groups and `shared` the number of directions that both keep, those with an angle within the tolerance; `anchors` is
    the relative difference of the anchors on them. NaN where there is nothing to compare.
    """

    side: Side
    ranks: tuple[int, int]
    angle: float
    shared: int
    anchors: float


@dataclass(frozen=True)
class Comparison:
    """One parameter in two stores; `None` as a fate stands for a store that lacks it.

    `kept` is the relative difference of the kept values of a frozen parameter (NaN where not both keep one); `notes`
    name the differences in words.
    """

    name: str
    fates: tuple[str | None, str | None]
    sides: tuple[SideComparison, ...] = ()
    kept: float = nan
    notes: tuple[str, ...] = ()


def compare_stores(first: BasisStore, second: BasisStore, tolerance: float = 1e-4) -> list[Comparison]:
    """Return a comparison of every parameter of either store, first those of `first`, in its order.

    `tolerance` (radians, relative change) is the difference that counts as none.
    """
    names = [*first, *(name for name in second if name not in first)]
    return [_compare(name, first.get(name), second.get(name), tolerance) for name in names]


def _compare(name: str, first: Basis | None, second: Basis | None, tolerance: float) -> Comparison:
    fates = (first.fate.value if first else None, second.fate.value if second else None)
    if first is None or second is None:
        return Comparison(name, fates, notes=(f"only in the {'first' if second is None else 'second'} file",))
    if first.shape != second.shape or first.layout != second.layout or first.bias != second.bias:
        shapes = f"{list(first.shape)} against {list(second.shape)}"
        return Comparison(name, fates, notes=(f"another weight: {shapes}, or another layout or bias",))
    sides = tuple(
        _compare_sides(side, first.subspaces.get(side), second.subspaces.get(side), tolerance)
        for side in dict.fromkeys([*first.subspaces, *second.subspaces])
    )
    kept = nan
    if first.kept is not None and second.kept is not None:
        kept = _relative(second.kept, first.kept)
    notes = [f"fate {first.fate.value} -> {second.fate.value}"] if first.fate is not second.fate else []
    notes += [note for side in sides for note in _notes(side, tolerance)]
    notes += ["other scales"] if _scales_differ(first, second) else []
    notes += ["another kept value"] if kept > tolerance else []
    return Comparison(name, fates, sides, kept, tuple(notes))


def _scales_differ(first: Basis, second: Basis) -> bool:
    """Return whether directions are kept by other shares."""
    for side, part in first.subspaces.items():
        one, other = part.scale, second.subspaces[side].scale if side in second.subspaces else None
        if (one is None) != (other is None):
            return True
        if one is not None and other is not None and (one.shape != other.shape or not torch.allclose(one, other)):
            return True
    return False


def _notes(side: SideComparison, tolerance: float) -> list[str]:
    """Return the differences on one side in words."""
    few, many = min(side.ranks), max(side.ranks)
    notes = []
    if side.shared < few:
        notes.append(f"{side.side}: {few - side.shared} of {few} directions differ")
    elif few < many:
        larger = "second" if side.ranks[1] == many else "first"
        notes.append(f"{side.side}: {many - few} more directions in the {larger} file")
    if side.anchors > tolerance:
        notes.append(f"{side.side}: other anchors (made with other weights)")
    return notes


def _compare_sides(side: Side, first: Subspace | None, second: Subspace | None, tolerance: float) -> SideComparison:
    ranks = (first.rank if first else 0, second.rank if second else 0)
    if first is None or second is None or not min(ranks):
        return SideComparison(side, ranks, nan, 0, nan)
    if side == "rows":
        return _compare_rows(first, second, ranks)
    largest, shared, moved, size = 0.0, 0, 0.0, 0.0
    for group, (k, l) in enumerate(zip(first.ranks, second.ranks)):  # noqa: E741  (the letters of the mathematics)
        U, V = first.basis[group, :, :k], second.basis[group, :, :l]  # noqa: N806
        if not min(k, l):
            continue
        angles = principal_angles(U, V)
        largest = max(largest, float(angles[0]))
        common = int((angles <= tolerance).sum())
        shared += common
        anchors = [_columns(part, group, rank) for part, rank in ((first, k), (second, l))]
        difference, length = _anchors_apart(U, V, anchors[0], anchors[1], common)
        moved, size = moved + difference, size + length
    return SideComparison(side, ranks, largest, shared, (moved / size) ** 0.5 if size else nan)


def _columns(part: Subspace, group: int, rank: int) -> Tensor:
    """Return the anchor of one group as columns, one a direction: `[m, k]`, or `[d, k]` for side "left"."""
    anchor = part.anchor[group]
    return anchor[:, :rank] if part.side == "right" else anchor[:rank].mH


def _anchors_apart(U: Tensor, V: Tensor, A: Tensor, B: Tensor, common: int) -> tuple[float, float]:  # noqa: N803
    """Return squared difference and squared size of two anchors on the `common` directions of `U` and `V`."""
    wide = torch.complex128 if U.is_complex() else torch.float64
    left, _, right = torch.linalg.svd(U.to(wide).mH @ V.to(wide), full_matrices=False)
    mine = A.to(wide) @ left[:, :common]
    theirs = B.to(wide) @ right.mH[:, :common]
    return float((mine - theirs).abs().square().sum()), float(mine.abs().square().sum())


def _compare_rows(first: Subspace, second: Subspace, ranks: tuple[int, int]) -> SideComparison:
    """Compare two row indices; there are no angles between rows, they are shared or not."""
    common = first.basis[torch.isin(first.basis, second.basis)]
    mine = first.anchor[torch.isin(first.basis, common)]
    theirs = second.anchor[torch.isin(second.basis, common)]  # both indices are sorted
    return SideComparison("rows", ranks, nan, len(common), _relative(theirs, mine) if len(common) else nan)


def _relative(now: Tensor, then: Tensor) -> float:
    wide = torch.complex128 if then.is_complex() else torch.float64
    now, then = now.to(wide), then.to(wide)
    return float((now - then).norm() / then.norm().clamp_min(torch.finfo(torch.float64).tiny))
