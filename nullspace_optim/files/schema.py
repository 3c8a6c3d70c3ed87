"""A `BasisStore` as named tensors and one JSON string, and back; what each entry means is written in `persistence`.

Nothing that is read is trusted: types, shapes, finiteness, orthonormality and SHA-256 digests are checked, and every
defect is
one `BasisFileError` that names the source, the key and the reason. Bases follow the shape convention of `layout`: `U`
is
`[g, s, k]`, its anchor `[g, m, k]` (right) or `[g, k, d]` (left); a row index is `[k]` with anchor `[k, d]`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import BasisFileError
from ..subspace.basis import Basis, BasisStore

SCHEMA_VERSION = 2


def refuse(source: str, reason: str) -> NoReturn:
    """Raise the `BasisFileError` of `source`: one sentence with `reason`."""
    raise BasisFileError(f"{source}: not a nullspace_optim file, or a damaged one: {reason}")


def parse_json(
    text: str, source: str, what: str, *, ensure_ascii: bool = True, sort_keys: bool = True
) -> dict[str, Any]:
    """Return the JSON object `text`, which must be written exactly as `json.dumps` without spaces writes it.

    Raises `BasisFileError` for duplicate keys, another spelling, another value than an object and endless nesting.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [ascii(name) for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        if repeated:
            raise ValueError(f"duplicate keys {', '.join(repeated)}")
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=unique)
        again = json.dumps(document, ensure_ascii=ensure_ascii, sort_keys=sort_keys, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        refuse(source, f"{what} is not valid JSON ({error})")
    if not isinstance(document, dict):
        refuse(source, f"{what} is a JSON {type(document).__name__}, expected an object")
    if again != text:
        refuse(source, f"{what} is not spelled as the writer spells it")
    return document


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 (hex) of a tensor's dtype, shape and bytes."""
    host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    state = hashlib.sha256(f"{host.dtype} {list(host.shape)} ".encode())
    state.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def pack(store: BasisStore) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of `store` by key, contiguous and on their own devices, and the JSON string that describes
    them.

    The tensors share memory with the store. Raises `BasisFileError` if a task record holds anything but plain JSON
    values.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in tensors_of(store):
        if key in tensors:
            raise BasisFileError(f"two tensors would be stored as {key!a}; rename one of the parameters or buffers")
        tensors[key] = tensor.detach().contiguous()
    tensors = dict(sorted(tensors.items()))
    document: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "library": _library_version(),
        "torch": torch.__version__.split("+")[0],
        "tasks": store.tasks,
        "bases": [_describe(basis) for basis in store.values()],
        "buffers": list(store.buffers),
        "probes": {task: list(values) for task, values in store.probes.items()},
        "tensors": {key: digest(tensor) for key, tensor in tensors.items()},
    }
    if store.extension is not None:
        document["mode"] = store.extension.record
    try:
        return tensors, sealed(document)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"tasks or bases hold a value that JSON has no word for ({error}); keep plain ones"
        raise BasisFileError(reason) from None


def fingerprint(store: BasisStore) -> str:
    """Return 16 hex digits over names, fates, ranks, tasks, bases and anchors: equal stores have equal fingerprints.

    Where directions are kept softly their scales stand in for the anchors, which move with every step.
    """
    lines = [json.dumps(store.tasks, sort_keys=True, default=repr)]
    for name in sorted(store):
        basis = store[name]
        lines.append(json.dumps([name, basis.fate.value, list(basis.shape), list(basis.tasks), list(basis.history)]))
        for side in sorted(basis.subspaces):
            subspace = basis.subspaces[side]
            kept = subspace.anchor if subspace.scale is None else subspace.scale  # a soft anchor moves with each step
            lines.append(f"{side} {list(subspace.ranks)} {digest(subspace.basis)} {digest(kept)}")
    if store.extension is not None:
        lines.append(json.dumps(store.extension.record, sort_keys=True))
        lines += [f"{key} {digest(tensor)}" for key, tensor in sorted(store.extension.tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _library_version() -> str:
    try:
        return version("nullspace-optim")
    except PackageNotFoundError:
        return "not installed"


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def sealed(document: dict[str, Any]) -> str:
    """Return `document` as canonical JSON that carries the digest of everything else in it."""
    seal = hashlib.sha256(_canonical(document).encode()).hexdigest()
    return _canonical({**document, "digest": seal})


def tensors_of(store: BasisStore) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of `store` with its key in a file."""
    for name, basis in store.items():
        if basis.kept is not None:
            yield f"{name}/kept", basis.kept
        for side, subspace in basis.subspaces.items():
            yield f"{name}/{side}/basis", subspace.basis
            yield f"{name}/{side}/anchor", subspace.anchor
            yield f"{name}/{side}/spectrum", subspace.spectrum
            for what in ("covariance", "scale", "members"):
                tensor = getattr(subspace, what)
                if tensor is not None:
                    yield f"{name}/{side}/{what}", tensor
    for name, tensor in store.buffers.items():
        yield f"buffer/{name}", tensor
    for task, values in store.probes.items():
        for key, tensor in values.items():
            yield f"probe/{task}/{key}", tensor
    if store.extension is not None:
        for key, tensor in store.extension.tensors.items():
            yield f"mode/{key}", tensor


def _describe(basis: Basis) -> dict[str, Any]:
    sides = {
        side: {"ranks": list(subspace.ranks), "size": subspace.size, "energy": subspace.energy}
        for side, subspace in basis.subspaces.items()
    }
    return {
        "name": basis.name,
        "shape": list(basis.shape),
        "fate": basis.fate.value,
        "reason": basis.reason,
        "layout": {"kind": basis.layout.kind, "groups": basis.layout.groups},
        "tasks": list(basis.tasks),
        "history": list(basis.history),
        "energies": list(basis.energies),
        "bias": basis.bias,
        "sides": sides,
    }
