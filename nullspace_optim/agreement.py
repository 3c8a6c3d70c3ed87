"""What the ranks of one run must have in common before they add anything up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .basis import Basis, BasisStore
from .schema import digest


def facts_of(
    options: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    store: BasisStore,
    *,
    task: str | None = None,
    digests: bool = False,
) -> Iterator[tuple[str, str]]:
    """Yield pairs (what, value) in a fixed order: options, tasks, parameters, bases.

    With `digests` every byte of bases and anchors counts (a file that was just loaded), otherwise fates and ranks.
    """
    for key, value in options.items():
        yield f"option {key}", repr(value)
    if task is not None:
        yield "the name of this task", repr(task)
    yield "the consolidated tasks", repr([record["name"] for record in store.tasks])
    for name, parameter in parameters.items():
        yield f"parameter '{name}'", f"{list(parameter.shape)} {parameter.dtype}"
    for name in sorted(store):
        yield f"the basis of '{name}'", _described(store[name], digests)


def _described(basis: Basis, digests: bool) -> str:
    sides = []
    for side, subspace in sorted(basis.subspaces.items()):
        marks = f" {digest(subspace.basis)[:16]} {digest(subspace.anchor)[:16]}" if digests else ""
        sides.append(f"{side} rank {list(subspace.ranks)}{marks}")
    return f"{basis.fate.value} {'; '.join(sides)}".strip()
