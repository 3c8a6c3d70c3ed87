"""Basis stores put together, renamed, cut down to some parameters, or cast: pure functions on stores.

Two bases `U` `[s, k]` and `V` `[s, l]` of one weight become `[U Q]`, where `Q` are the directions of `V` outside the
span of `U`: with `R = V - U U^H V = Q S P^H`, the columns of `Q` with `S` above rounding. Whoever kept `W V = B` and
`W U = A` also kept `W Q = (B - A U^H V) P S^-1`, so a merge needs no weights. Where `S` is small that quotient is
inexact, and such directions are refused unless the weights are given; where `S` vanishes both files must agree.
Directions that are kept by a share are merged by `conceptors.either`, which loosens none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BasisFileError, OptionError
from ..subspace.basis import Basis, BasisStore, Extension, Fate, Side, Subspace
from ..subspace.conceptors import conceptor_of, directions_of, either
from ..subspace.linalg import polish, principal_angles
from ..subspace.matrix import matrix_of
from ..subspace.projection import anchor

ROUNDING = 1e-6  # a singular value of `R` below this means that the direction is in the other span already
STEEP = 6e-3  # above this, float32 anchors divided by it stay within the 1e-5 that is promised
AGREE = 1e-4  # relative difference of two anchors on one direction that is accepted

Weight = Callable[[str], Tensor]


def renamed(store: BasisStore, rename: Callable[[str], str]) -> BasisStore:
    """Return `store` with every parameter, bias and buffer renamed, in task records as well.

    Raises:
        BasisFileError: two names become one.
    """
    twin, of_parameter = BasisStore(), _renaming(store, rename)
    for name, basis in store.items():
        new = of_parameter(name)
        if new in twin:
            raise BasisFileError(f"renaming makes two parameters {new!a} (one of them is {name!a}); change the pattern")
        bias = rename(basis.bias) if basis.bias is not None else None
        twin.put(dataclasses.replace(basis, name=new, bias=bias))
    twin.buffers = {rename(name): buffer for name, buffer in store.buffers.items()}
    if len(twin.buffers) < len(store.buffers):
        raise BasisFileError("renaming makes two buffers one; change the pattern")
    twin.tasks = [_with_names(task, rename) for task in store.tasks]
    twin.probes = dict(store.probes)
    twin.extension = None if store.extension is None else _renamed_mode(store.extension, rename)
    return twin


def _renaming(store: BasisStore, rename: Callable[[str], str]) -> Callable[[str], str]:
    """Return `rename` for the names of parameters: experts of a mode stand below their layer, written with ``/``."""
    prefix = f"{store.extension.record.get('mode')}." if store.extension is not None else None

    def of_parameter(name: str) -> str:
        if prefix is None or not name.startswith(prefix):
            return rename(name)
        layer, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{rename(layer.replace('/', '.')).replace('.', '/')}{dot}{rest}"

    return of_parameter


def _renamed_mode(extension: Extension, rename: Callable[[str], str]) -> Extension:
    """Return what a mode stores with its layers renamed."""
    layers: Any = extension.record.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "name" in layer for layer in layers):
        return extension
    record = {**extension.record, "layers": [{**layer, "name": rename(str(layer["name"]))} for layer in layers]}
    return Extension(record, extension.tensors)


def _with_names(task: Mapping[str, object], rename: Callable[[str], str]) -> dict[str, object]:
    lists = {key: task[key] for key in ("layers", "untrained") if isinstance(task.get(key), (list, tuple))}
    return {**task, **{key: [rename(str(name)) for name in names] for key, names in lists.items()}}  # type: ignore[attr-defined]


def restricted(store: BasisStore, wanted: Callable[[str], bool]) -> BasisStore:
    """Return `store` with only the parameters and buffers whose names are `wanted`; biases come with their weight."""
    twin = store.copy()
    biases = {basis.bias for basis in store.values() if wanted(basis.name)}
    for name in store:
        if not wanted(name) and name not in biases and name in twin:
            twin.remove(name)
    twin.buffers = {name: buffer for name, buffer in store.buffers.items() if wanted(name)}
    return twin


def merged(first: BasisStore, second: BasisStore, label: str, weight: Weight | None = None) -> BasisStore:
    """Return a store that keeps whatever either keeps.

    A task of `second` whose name `first` uses for another task becomes ``name [label]``. With `weight`, which returns
    a parameter by name, all anchors of merged bases are taken from the weights.

    Raises:
        BasisFileError: the files keep different values of the same thing, so that no weights satisfy both, or
            directions are too close to be merged without the weights.
    """
    if first.extension is not None or second.extension is not None:
        raise BasisFileError(
            "experts of a mode cannot be merged: routers number the experts of one history; load the first file and "
            "train and consolidate the second task with it"
        )
    second = _distinct(first, second, label)
    twin = first.copy()
    for name, basis in second.items():
        twin.put(_joined(first[name], basis, weight) if name in first else basis)
    for name, buffer in second.buffers.items():
        if name in first.buffers and not torch.equal(first.buffers[name], buffer):
            raise BasisFileError(f"the files keep different values of the buffer {name!a}: they come from other models")
    twin.buffers = {**first.buffers, **second.buffers}
    known = {task["name"] for task in first.tasks}
    twin.tasks = [*first.tasks, *(task for task in second.tasks if task["name"] not in known)]
    twin.probes = {**second.probes, **first.probes}
    return twin


def _distinct(first: BasisStore, second: BasisStore, label: str) -> BasisStore:
    """Return `second` with other names for tasks that `first` has under the same name but another record."""
    mine = {str(task["name"]): task for task in first.tasks}
    theirs = {str(task["name"]): task for task in second.tasks}
    clash = {n for n in theirs if n in mine and not _same_task(mine[n], theirs[n], first.probes, second.probes)}
    names = {name: f"{name} [{label}]" if name in clash else name for name in theirs}
    if any(new in mine for old, new in names.items() if old != new):
        raise BasisFileError(
            f"two tasks are called {next(iter(clash))!a}; export the files under different names first"
        )
    twin = second.copy()
    twin.tasks = [{**task, "name": names[str(task["name"])]} for task in second.tasks]
    twin.probes = {names.get(task, task): probe for task, probe in second.probes.items()}
    for basis in second.values():
        twin.put(dataclasses.replace(basis, tasks=tuple(names.get(task, task) for task in basis.tasks)))
    return twin


def _same_task(mine: Any, theirs: Any, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    one, other = first.get(mine["name"], {}), second.get(theirs["name"], {})
    same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return mine == theirs and same


def _joined(first: Basis, second: Basis, weight: Weight | None) -> Basis:
    """Return one basis that keeps what two bases of one weight keep."""
    for what in ("shape", "layout", "bias"):
        both = what == "shape" or (first.subspaces and second.subspaces)
        if both and getattr(first, what) != getattr(second, what):
            raise BasisFileError(f"{first.name!a} has another {what} in each file; they come from other models")
    strict = first if first.fate.strictness >= second.fate.strictness else second
    if first.kept is not None and second.kept is not None and not torch.equal(first.kept, second.kept.to(first.kept)):
        raise BasisFileError(
            f"{first.name!a} is kept with another value in each file: no weights satisfy both; "
            "consolidate the second task on the model of the first"
        )
    if strict.fate is Fate.FROZEN or not (first.subspaces and second.subspaces):
        return strict if strict.fate is Fate.FROZEN or strict.subspaces else (first if first.subspaces else second)
    sides = {
        side: _united(first.name, first.subspaces.get(side), second.subspaces.get(side))
        for side in dict.fromkeys([*first.subspaces, *second.subspaces])
    }
    basis = dataclasses.replace(strict, subspaces=sides, layout=first.layout, bias=first.bias)
    return _finished(basis, first, second, weight)


def _finished(basis: Basis, first: Basis, second: Basis, weight: Weight | None) -> Basis:
    """Return `basis` with tasks, history, exact anchors and the fate that its free directions leave it."""
    if weight is not None:
        _anchor_again(basis, weight)
    elif any(not subspace.anchor.isfinite().all() for subspace in basis.subspaces.values()):
        raise BasisFileError(
            f"{basis.name!a}: some directions of the files are close but not equal, and float32 anchors cannot tell "
            "them apart exactly; give the weights that both files were made with (--weights)"
        )
    added = [task for task in second.tasks if task not in first.tasks]
    ranks = [min(first.rank + rank, basis.rank) for task, rank in zip(second.tasks, second.history) if task in added]
    full = any(subspace.full for subspace in basis.subspaces.values())
    kept = first.kept if first.kept is not None else second.kept
    if full and kept is None and basis.bias is None:
        if weight is None:
            raise BasisFileError(
                f"{basis.name!a} has no free direction left after the merge and is frozen, but neither file has its "
                "whole value; give the weights that both files were made with (--weights)"
            )
        kept = weight(basis.name).clone()
    return dataclasses.replace(
        basis,
        fate=Fate.FULL if full else Fate.PROTECTED,
        reason="no free direction left after merging" if full else first.reason,
        tasks=(*first.tasks, *added),
        history=(*first.history, *ranks[:-1], basis.rank) if added else first.history,
        kept=kept if full else None,
    )


def _anchor_again(basis: Basis, weight: Weight) -> None:
    """Take all anchors from the weights."""
    bias = weight(basis.bias) if basis.bias is not None else None
    with torch.no_grad(), matrix_of(weight(basis.name), basis.layout, bias, write=False) as matrix:
        for subspace in basis.subspaces.values():
            subspace.anchor = anchor(matrix, subspace.basis, subspace.side)


def _united(name: str, first: Subspace | None, second: Subspace | None) -> Subspace:
    """Return one subspace that holds two; anchors that cannot be told from the files are NaN."""
    if first is None or second is None:
        one = first or second
        assert one is not None
        return dataclasses.replace(one)
    if first.side == "rows":
        return _united_rows(name, first, second)
    parts = [
        _grown(name, first.side, *(_group(subspace, group) for subspace in (first, second)))
        for group in range(len(first.ranks))
    ]
    shares: list[Tensor] | None = None
    if first.scale is not None or second.scale is not None:
        softly = [_softened(part, first, second, group) for group, part in enumerate(parts)]
        parts, shares = [part for part, _ in softly], [share for _, share in softly]
    ranks = tuple(basis.shape[1] for basis, _ in parts)
    stack = first.basis.new_zeros(len(parts), first.size, max(ranks, default=0))
    anchors = first.anchor.new_zeros(len(parts), _columns(first).shape[1], max(ranks, default=0))
    scale = None if shares is None else first.basis.new_zeros(len(parts), max(ranks, default=0)).real.contiguous()
    for group, (basis, kept) in enumerate(parts):
        stack[group, :, : ranks[group]], anchors[group, :, : ranks[group]] = basis, kept
        if scale is not None and shares is not None:
            scale[group, : ranks[group]] = shares[group]
    summed = None
    if first.covariance is not None and second.covariance is not None:
        summed = first.covariance + second.covariance
    return dataclasses.replace(
        second,
        basis=stack,
        anchor=anchors if first.side == "right" else anchors.mH.contiguous(),
        ranks=ranks,
        covariance=summed,
        scale=scale,
        members=None,
    )


def _softened(
    part: tuple[Tensor, Tensor], first: Subspace, second: Subspace, group: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the directions of both in which they are kept by a share, with anchor columns, and these shares `[k]`."""
    basis, kept = part
    conceptors = []
    for subspace in (first, second):
        rank = subspace.ranks[group]
        share = None if subspace.scale is None else subspace.scale[group, :rank]
        conceptors.append(conceptor_of(subspace.basis[group, :, :rank].to(basis), share, basis))
    vectors, shares = directions_of(either(*conceptors))
    return (polish(basis @ vectors, dtype=basis.dtype), kept @ vectors), shares


def _columns(subspace: Subspace) -> Tensor:
    """Return the anchor with one column a direction: `[g, m, k]`, or `[g, d, k]` for side "left"."""
    return subspace.anchor if subspace.side == "right" else subspace.anchor.mH


def _group(subspace: Subspace, group: int) -> tuple[Tensor, Tensor]:
    """Return basis and anchor columns of one group in double precision."""
    rank = subspace.ranks[group]
    double = torch.complex128 if subspace.basis.is_complex() else torch.float64
    return subspace.basis[group, :, :rank].to(double), _columns(subspace)[group, :, :rank].to(double)


def _grown(name: str, side: Side, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return basis `[s, r]` and anchor columns of the span of both."""
    (U, A), (V, B) = first, second  # noqa: N806
    inside = U.mH @ V
    outside = V - U @ inside
    difference = B - A @ inside
    Q, S, P = torch.linalg.svd(outside, full_matrices=False)  # noqa: N806
    new = ROUNDING < S
    new[max(0, U.shape[0] - U.shape[1]) :] = False
    agreed = difference @ P[~new].mH
    size = torch.linalg.vector_norm(B).clamp_min(1e-30)
    if float(torch.linalg.vector_norm(agreed)) > AGREE * float(size):
        raise BasisFileError(
            f"the files keep different values of {name!a} on the directions they share ({side}): they come from other "
            "weights, and no weights satisfy both; consolidate the second task on the model of the first"
        )
    anchors = difference @ P[new].mH / S[new]
    anchors[:, S[new] < STEEP] = torch.nan
    fresh = polish(Q[:, new], dtype=U.dtype)
    return torch.cat([U, fresh - U @ (U.mH @ fresh)], dim=1), torch.cat([A, anchors], dim=1)


def _united_rows(name: str, first: Subspace, second: Subspace) -> Subspace:
    """Return the union of two row indices."""
    common = torch.isin(second.basis, first.basis)
    mine = first.anchor[torch.isin(first.basis, second.basis)]
    if not torch.allclose(mine, second.anchor[common].to(mine), rtol=AGREE, atol=0):
        raise BasisFileError(
            f"the files keep different values of the same rows of {name!a}: they come from other weights; "
            "consolidate the second task on the model of the first"
        )
    index, order = torch.cat([first.basis, second.basis[~common]]).sort()
    anchors = torch.cat([first.anchor, second.anchor[~common].to(first.anchor)])[order]
    return dataclasses.replace(second, basis=index, anchor=anchors, ranks=(len(index),))


def cast(store: BasisStore, dtype: torch.dtype) -> BasisStore:
    """Return `store` with real anchors and kept values in `dtype`, float32 or float64.

    Raises:
        OptionError: a half-precision type. Rounded to bfloat16, the columns of a basis are no longer orthonormal, and
            made so again they span other directions: what was kept would no longer be. The message says by how much.
    """
    if dtype not in (torch.float32, torch.float64):
        raise OptionError(
            f"cannot cast to {str(dtype).removeprefix('torch.')}: {_tilt(store, dtype)}; "
            "exactness needs float32 (compress the file instead)"
        )
    twin = store.copy()
    for name, basis in store.items():
        sides = {
            side: dataclasses.replace(part, anchor=_in(dtype, part.anchor)) for side, part in basis.subspaces.items()
        }
        kept = None if basis.kept is None else _in(dtype, basis.kept)
        twin.put(dataclasses.replace(basis, name=name, subspaces=sides, kept=kept))
    return twin


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Return a real `tensor` in `dtype`; whole numbers, and complex64, the one complex type of a file, as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _tilt(store: BasisStore, dtype: torch.dtype) -> str:
    """Say how far rounding to `dtype` turns the kept directions and moves the anchors."""
    angle, moved = 0.0, 0.0
    for subspace in _dense(store.values()):
        for basis, rank in zip(subspace.basis, subspace.ranks):
            if rank and rank < subspace.size:
                angle = max(angle, float(principal_angles(basis[:, :rank], basis[:, :rank].to(dtype).float())[0]))
        size = float(subspace.anchor.abs().square().sum()) ** 0.5
        change = float((subspace.anchor.to(dtype).to(subspace.anchor) - subspace.anchor).abs().square().sum()) ** 0.5
        moved = max(moved, change / size if size else 0.0)
    return (
        f"rounding turns kept directions by up to {angle:.1e} radians and moves anchors by up to {moved:.1e} of their "
        "size, where 1e-5 is promised"
    )


def _dense(bases: Iterable[Basis]) -> Iterable[Subspace]:
    return (part for basis in bases for part in basis.subspaces.values() if part.side != "rows" and part.rank)
