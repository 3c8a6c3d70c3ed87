"""Read what `schema` wrote and trust none of it.

Types, shapes, finiteness, orthonormality and SHA-256 digests are checked, and every defect is one `BasisFileError` that
names the source, the key and the reason. Shapes are those of `schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from ..errors import BasisFileError
from ..subspace.basis import Basis, BasisStore, Extension, Fate, Subspace
from ..subspace.layout import Kind, Layout, Side
from ..subspace.tables import overlap
from .schema import SCHEMA_VERSION, digest, parse_json, refuse, sealed

ORTHONORMAL = 1e-4  # largest entry of |U^H U - I| that is accepted
LARGEST_SIZE = 2**62
MOST_AXES = 64
EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def unpack(tensors: Mapping[str, Tensor], metadata: str, source: str) -> BasisStore:
    """Return the store that `pack` described; `source` names the file or checkpoint in errors.

    The tensors are taken over as they are, on their own devices. Raises `BasisFileError` for every defect.
    """
    document = _Record(_opened(metadata, source), "metadata", source)
    parts = _Parts(tensors, document.get("tensors", dict), source)
    store = BasisStore()
    for record in document.records("tasks"):
        if "untrained" in record.data:
            record.texts("untrained")
        store.tasks.append(dict(record.data))
    for record in document.records("bases"):
        basis = _read_basis(record, parts)
        if basis.name in store:
            record.fail("is described twice")
        store.put(basis)
    store.buffers = {name: parts.take(f"buffer/{name}") for name in document.texts("buffers")}
    probes = _Record(document.get("probes", dict), "probes", source)
    store.probes = {t: {key: parts.take(f"probe/{t}/{key}") for key in probes.texts(t)} for t in probes.data}
    store.extension = _read_extension(document, parts)
    parts.finish()
    return store


def _read_extension(document: _Record, parts: _Parts) -> Extension | None:
    """Return what a mode stored: its record, whose meaning the mode checks, and its tensors, all finite."""
    if "mode" not in document.data:
        return None
    keys = sorted(key for key in parts.unused if key.startswith("mode/"))
    tensors = {key.removeprefix("mode/"): parts.take(key) for key in keys}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            document.fail(f"mode has non-finite values in {key!a}")
    return Extension(document.get("mode", dict), tensors)


def _opened(metadata: object, source: str) -> dict[str, Any]:
    """Return the JSON document in `metadata` after checking schema version and digest."""
    if not isinstance(metadata, str):
        refuse(source, f"its metadata are a {type(metadata).__name__}, expected a string")
    document = parse_json(metadata, source, "metadata")
    schema = document.get("schema")
    if type(schema) is not int:
        refuse(source, f"metadata key 'schema' is {ascii(schema)[:80]}, expected an integer")
    if schema > SCHEMA_VERSION:
        writer = ascii(document.get("library"))[:40]
        reason = f"schema version {schema}, written by nullspace_optim {writer}; this one reads up to {SCHEMA_VERSION}"
        raise BasisFileError(f"{source}: {reason}: upgrade nullspace_optim")
    if schema < 1:
        refuse(source, f"schema version {schema} does not exist")
    contents = {key: value for key, value in document.items() if key != "digest"}
    if metadata != sealed(contents):
        refuse(source, "the metadata do not match their own digest; fetch or save the file again")
    return document


class _Record:
    """One JSON object with typed access; `where` names it in errors."""

    def __init__(self, data: object, where: str, source: str) -> None:
        self.where = where
        self.source = source
        self.data: dict[str, Any] = data if isinstance(data, dict) else self.fail("is not a JSON object")

    def fail(self, reason: str) -> NoReturn:
        refuse(self.source, f"{self.where} {reason}")

    def get(self, key: str, *types: type) -> Any:
        value = self.data.get(key)
        if type(value) not in types:
            expected = " or ".join(kind.__name__ for kind in types)
            self.fail(f"has {ascii(value)[:80]} under key {key!a}, expected {expected}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            self.fail(f"has a key {key!a} that is not a list of strings")
        return tuple(values)

    def sizes(self, key: str) -> tuple[int, ...]:
        values = self.get(key, list)
        if not all(type(value) is int and 0 <= value < LARGEST_SIZE for value in values):
            self.fail(f"has a key {key!a} that is not a list of sizes")
        return tuple(values)

    def shares(self, key: str) -> tuple[float, ...]:
        values = self.get(key, list)
        if not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
            self.fail(f"has a key {key!a} that is not a list of shares")
        return tuple(values)

    def records(self, key: str) -> list[_Record]:
        found = []
        for place, data in enumerate(self.get(key, list)):
            name = ascii(data["name"]) if isinstance(data, dict) and "name" in data else ""
            found.append(_Record(data, f"{key}[{place}] {name}".rstrip(), self.source))
        return found


class _Parts:
    """The tensors of a file: complete, intact and each used once."""

    def __init__(self, tensors: Mapping[str, Tensor], digests: dict[str, Any], source: str) -> None:
        self.tensors = tensors
        self.source = source
        self.unused = set(tensors)
        missing, unexpected = sorted(digests.keys() - tensors.keys()), sorted(tensors.keys() - digests.keys())
        if missing or unexpected:
            lists = {"missing": missing, "unexpected": unexpected}.items()
            refuse(source, "; ".join(f"{what} tensors: {', '.join(map(ascii, keys))}" for what, keys in lists if keys))
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                refuse(source, f"{key!a} is a {type(tensor).__name__}, expected a tensor")
            if digest(tensor) != digests[key]:
                refuse(source, f"tensor {key!a} does not match its digest (content, dtype or shape was changed)")

    def take(self, key: str) -> Tensor:
        if key not in self.unused:
            refuse(self.source, f"tensor {key!a} is missing or used twice")
        self.unused.remove(key)
        return self.tensors[key]

    def optional(self, key: str) -> Tensor | None:
        return self.take(key) if key in self.unused else None

    def finish(self) -> None:
        if self.unused:
            refuse(self.source, f"no parameter uses the tensors {', '.join(map(ascii, sorted(self.unused)))}")


def _read_basis(record: _Record, parts: _Parts) -> Basis:
    name, fate, shape = record.get("name", str), record.get("fate", str), record.sizes("shape")
    if fate not in {item.value for item in Fate}:
        record.fail(f"has the unknown fate {ascii(fate)[:80]}")
    if len(shape) > MOST_AXES:
        record.fail(f"has {len(shape)} axes, at most {MOST_AXES} are allowed")
    basis = Basis(
        name=name,
        shape=shape,
        fate=Fate(fate),
        reason=record.get("reason", str),
        layout=_read_layout(record, shape),
        tasks=record.texts("tasks"),
        history=record.sizes("history"),
        energies=record.shares("energies") if "energies" in record.data else (),
        bias=record.get("bias", str, type(None)),
        kept=parts.optional(f"{name}/kept"),
    )
    if basis.energies and len(basis.energies) != len(basis.tasks):
        record.fail(f"has {len(basis.energies)} energies of {len(basis.tasks)} tasks")
    if basis.kept is not None and tuple(basis.kept.shape) != shape:
        record.fail(f"has a kept value of shape {list(basis.kept.shape)}, expected {list(shape)}")
    sides: dict[Side, Subspace] = {}
    for side, data in record.get("sides", dict).items():
        if side not in get_args(Side):
            record.fail(f"has the unknown side {ascii(side)[:80]}")
        part = _Record(data, f"{record.where} {side}", record.source)
        sides[side] = _read_subspace(part, side, basis, parts)
    if {"left", "rows"} <= set(sides) and overlap(sides["left"], sides["rows"]) > ORTHONORMAL:
        record.fail("keeps rows and a left side that overlap, which no step can hold; consolidate its tasks again")
    return replace(basis, subspaces=sides)


def _read_layout(record: _Record, shape: tuple[int, ...]) -> Layout:
    data = _Record(record.get("layout", dict), f"{record.where} layout", record.source)
    kind, groups = data.get("kind", str), data.get("groups", int)
    if kind not in get_args(Kind) or groups < 1:
        expected = f"one of {', '.join(get_args(Kind))} and groups >= 1"
        data.fail(f"is {ascii(kind)[:80]} with {groups} groups, expected {expected}")
    layout = Layout(kind, groups)
    if record.get("sides", dict):
        axes = {"batched": 3, "transposed": 2}.get(kind, 1)
        if len(shape) < axes or (kind != "batched" and shape[0] % groups):
            data.fail(f"{kind!r} with {groups} groups does not fit the shape {list(shape)}")
    return layout


def _read_subspace(record: _Record, side: Side, basis: Basis, parts: _Parts) -> Subspace:
    key = f"{basis.name}/{side}"
    subspace = Subspace(
        side=side,
        basis=parts.take(f"{key}/basis"),
        anchor=parts.take(f"{key}/anchor"),
        ranks=record.sizes("ranks"),
        size=record.get("size", int),
        spectrum=parts.take(f"{key}/spectrum"),
        energy=record.get("energy", float, int),
        covariance=parts.optional(f"{key}/covariance"),
        scale=parts.optional(f"{key}/scale") if side != "rows" else None,
        members=parts.optional(f"{key}/members") if side != "rows" else None,
    )
    (_check_rows if side == "rows" else _check_columns)(record, basis, subspace)
    for what in ("basis", "anchor", "spectrum", "covariance", "scale"):
        tensor = getattr(subspace, what)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            record.fail(f"has non-finite values in its {what}")
    if side != "rows":
        _check_orthonormal(record, subspace)
    return subspace


def _matrix_shape(basis: Basis) -> tuple[int, int, int]:
    """Return `(g, m, d)` of the protected matrix; a bias folded in is one more column."""
    groups, m, d = basis.layout.matrix_shape(basis.shape)
    return groups, m, d + (basis.bias is not None)


def _expect(record: _Record, what: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        record.fail(f"has a {what} of shape {list(tensor.shape)}, expected {list(shape)}")


def _check_rows(record: _Record, basis: Basis, subspace: Subspace) -> None:
    """Check a row index: `int64` `[k]`, different rows out of the `m` of an ungrouped matrix."""
    groups, rows, columns = _matrix_shape(basis)
    index, k = subspace.basis, subspace.rank
    if groups != 1 or len(subspace.ranks) != 1 or subspace.size != rows or index.dtype != torch.int64:
        record.fail(f"is not an int64 index into {rows} rows of one matrix")
    _expect(record, "basis", index, (k,))
    _expect(record, "anchor", subspace.anchor, (k, columns))
    host = index.cpu()
    if k and (host.min() < 0 or host.max() >= rows or len(set(host.tolist())) < k):
        record.fail(f"has row numbers that are repeated or not within 0..{rows - 1}")


def _check_columns(record: _Record, basis: Basis, subspace: Subspace) -> None:
    """Check `U` `[g, s, k]`, its anchor, spectrum `[g, s]` and covariance `[g, s, s]` against the weight's shape."""
    groups, m, d = _matrix_shape(basis)
    s = d if subspace.side == "right" else m
    if subspace.size != s or len(subspace.ranks) != groups:
        found = f"has size {subspace.size} and {len(subspace.ranks)} groups"
        record.fail(f"{found}, the weight {list(basis.shape)} has {s} and {groups}")
    k = subspace.basis.shape[-1] if subspace.basis.ndim else 0
    if k > s or max(subspace.ranks, default=0) > k:
        record.fail(f"has rank {max(subspace.ranks, default=0)} and {k} columns in dimension {s}")
    _expect(record, "basis", subspace.basis, (groups, s, k))
    _expect(record, "anchor", subspace.anchor, (groups, m, k) if subspace.side == "right" else (groups, k, d))
    _expect(record, "spectrum", subspace.spectrum, (groups, s))
    _expect(record, "covariance", subspace.covariance, (groups, s, s))
    _expect(record, "scale", subspace.scale, (groups, k))
    _expect(record, "members", subspace.members, (len(basis.tasks), groups, k))
    _check_scale(record, subspace)
    if subspace.basis.dtype not in EXACT:
        record.fail(f"has a basis of dtype {subspace.basis.dtype}, expected float32 or wider")


def _check_scale(record: _Record, subspace: Subspace) -> None:
    """Check that scales are shares, and that no padded column is kept or a member."""
    scale, members = subspace.scale, subspace.members
    if scale is not None and (scale.dtype != torch.float32 or not bool(((scale >= 0) & (scale <= 1)).all())):
        record.fail("has scales that are not float32 numbers in 0..1")
    if members is not None and members.dtype != torch.bool:
        record.fail(f"has members of dtype {members.dtype}, expected bool")
    for group, rank in enumerate(subspace.ranks):
        padded = (
            scale is not None and scale[group, rank:].any(),
            members is not None and members[:, group, rank:].any(),
        )
        if any(map(bool, padded)):
            record.fail(f"keeps columns beyond its rank {rank}")


def _check_orthonormal(record: _Record, subspace: Subspace) -> None:
    """Check that each group's `U` has its rank in orthonormal columns and only zeros in the others."""
    columns = subspace.basis.detach().cpu()
    columns = columns.to(torch.promote_types(columns.dtype, torch.float64))
    used = (columns != 0).any(1)
    if tuple(used.sum(-1).tolist()) != subspace.ranks:
        record.fail(f"has {used.sum(-1).tolist()} columns that are not zero, its ranks are {list(subspace.ranks)}")
    error = (columns.mH @ columns - torch.diag_embed(used.to(columns.dtype))).abs()
    if error.numel() and float(error.max()) > ORTHONORMAL:
        found = f"|U^H U - I| reaches {error.max():.1e}, expected < {ORTHONORMAL:.0e}"
        record.fail(f"has a basis that is not orthonormal: {found}")
