"""Basis stores renamed or cut down to some parameters: pure functions on stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import BasisFileError
from ..subspace.basis import BasisStore, Extension


def rename_store(store: BasisStore, rename: Callable[[str], str]) -> BasisStore:
    """Return `store` with every parameter, bias and buffer renamed, in task records as well.

    Raises:
        BasisFileError: two names become one.
    """
    twin, of_parameter = BasisStore(), _rename_parameters(store, rename)
    for name, basis in store.items():
        new = of_parameter(name)
        if new in twin:
            raise BasisFileError(f"renaming makes two parameters {new!a} (one of them is {name!a}); change the pattern")
        bias = rename(basis.bias) if basis.bias is not None else None
        twin.put(dataclasses.replace(basis, name=new, bias=bias))
    twin.buffers = {rename(name): buffer for name, buffer in store.buffers.items()}
    if len(twin.buffers) < len(store.buffers):
        raise BasisFileError("renaming makes two buffers one; change the pattern")
    twin.tasks = [_rename_task(task, rename) for task in store.tasks]
    twin.probes = dict(store.probes)
    twin.extension = None if store.extension is None else _rename_mode(store.extension, rename)
    return twin


def _rename_parameters(store: BasisStore, rename: Callable[[str], str]) -> Callable[[str], str]:
    """Return `rename` for the names of parameters: experts of a mode stand below their layer, written with ``/``."""
    prefix = f"{store.extension.record.get('mode')}." if store.extension is not None else None

    def of_parameter(name: str) -> str:
        if prefix is None or not name.startswith(prefix):
            return rename(name)
        layer, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{rename(layer.replace('/', '.')).replace('.', '/')}{dot}{rest}"

    return of_parameter


def _rename_mode(extension: Extension, rename: Callable[[str], str]) -> Extension:
    """Return what a mode stores with its layers renamed."""
    layers: Any = extension.record.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "name" in layer for layer in layers):
        return extension
    record = {**extension.record, "layers": [{**layer, "name": rename(str(layer["name"]))} for layer in layers]}
    return Extension(record, extension.tensors)


def _rename_task(task: Mapping[str, object], rename: Callable[[str], str]) -> dict[str, object]:
    lists = {key: task[key] for key in ("layers", "untrained") if isinstance(task.get(key), (list, tuple))}
    return {**task, **{key: [rename(str(name)) for name in names] for key, names in lists.items()}}  # type: ignore[attr-defined]


def match_store(store: BasisStore, names: Collection[str]) -> BasisStore:
    """Return `store` under `names`, if one prefix taken off or put before all its parameters makes them known.

    A loss module holds the model as `model`; what was consolidated through one is then loaded into the other. Shapes
    and anchors are compared later, as always. `store` itself is returned where nothing is to do, or no prefix helps.
    """
    first = next((name for name in store if name not in names), None)
    if first is None or store.extension is not None:
        return store
    parts = first.split(".")
    fewer = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
    more = [name.removesuffix(first) for name in names if name.endswith(f".{first}")]
    renames = [_without(prefix) for prefix in fewer if all(name.startswith(prefix) for name in store)]
    renames += [_below(prefix) for prefix in more]
    fitting = [rename for rename in renames if all(rename(name) in names for name in store)]
    return rename_store(store, fitting[0]) if len(fitting) == 1 else store


def _without(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _below(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def restrict_store(store: BasisStore, wanted: Callable[[str], bool]) -> BasisStore:
    """Return `store` with only the parameters and buffers whose names are `wanted`; biases come with their weight."""
    twin = store.copy()
    biases = {basis.bias for basis in store.values() if wanted(basis.name)}
    for name in store:
        if not wanted(name) and name not in biases and name in twin:
            twin.remove(name)
    twin.buffers = {name: buffer for name, buffer in store.buffers.items() if wanted(name)}
    return twin
