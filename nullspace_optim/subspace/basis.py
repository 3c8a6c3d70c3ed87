"""Bases of earlier tasks: one `Basis` a parameter, all of them in a `BasisStore`.

Shapes follow `layout`: a right basis `U` is `[g, d, k]` with anchor `A = W U` `[g, m, k]`; a left basis is `[g, m,
k]` with anchor `U^H W` `[g, k, d]`; a row index is `[k]` with anchor `[k, d]`. Groups of smaller rank are padded with
zero columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import get_args

from torch import Tensor

from .layout import Layout, Side


class Fate(str, Enum):
    """State of a trainable parameter after a consolidation; it only ever gets stricter."""

    FREE = "free"
    PROTECTED = "protected"
    FULL = "full"
    FROZEN = "frozen"

    @property
    def strictness(self) -> int:
        """0 for free up to 2 for full and frozen."""
        return {"free": 0, "protected": 1, "full": 2, "frozen": 2}[self.value]


@dataclass
class Subspace:
    """One protected side of one weight.

    `basis` is `U` `[g, s, k]`, or the `int64` row index `[k]` for side "rows"; `spectrum` `[g, s]` holds the last
    task's second-moment eigenvalues, descending; `energy` is the share of that task's energy inside `U`.

    `scale` `[g, k]` in 0..1 protects softly: of every step's movement along a direction the share `1 - scale` is let
    through, and `anchor` follows it. `None`: every direction is kept as it was (scale 1). `members` `[tasks, g, k]`
    tells which directions span which task's own subspace, for policies that need it (TRGP).
    """

    side: Side
    basis: Tensor
    anchor: Tensor
    ranks: tuple[int, ...]
    size: int
    spectrum: Tensor
    energy: float
    covariance: Tensor | None = None
    scale: Tensor | None = None
    members: Tensor | None = None

    def __repr__(self) -> str:
        return f"Subspace({self.side!r}, rank {self.rank} of {self.dimension}, energy {self.energy:.4%})"

    @property
    def rank(self) -> int:
        """Protected directions, summed over groups."""
        return sum(self.ranks)

    @property
    def dimension(self) -> int:
        """All directions of this side, summed over groups."""
        return self.size * len(self.ranks)

    @property
    def held(self) -> float:
        """Protected directions, each counted by its scale, summed over groups."""
        return float(self.rank) if self.scale is None else float(self.scale.double().sum())

    @property
    def full(self) -> bool:
        """True if no direction of any group is free, not even by part."""
        return self.rank >= self.dimension and (self.scale is None or self.held >= self.dimension)


def all_kept(sides: Mapping[Side, Subspace]) -> bool:
    """True if one of the `sides` is full, or the frozen rows and the left side, which lies outside them, together."""
    together = [sides[side] for side in ("left", "rows") if side in sides]
    outputs = sum(side.held for side in together) >= max((side.dimension for side in together), default=1)
    return outputs or any(side.full for side in sides.values())


@dataclass
class Basis:
    """The fate of one parameter and, if it is protected, its subspaces.

    `kept` is the value of a frozen parameter; `reason` explains its fate; `tasks` names the consolidations
    that used it, `history` the rank after each of them and `energies` the least share of each one's energy in a side.
    """

    name: str
    shape: tuple[int, ...]
    fate: Fate
    reason: str
    layout: Layout = field(default_factory=Layout)
    subspaces: dict[Side, Subspace] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    history: tuple[int, ...] = ()
    energies: tuple[float, ...] = ()
    bias: str | None = None
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        """Put the sides in one order, in which steps correct them, whatever the order of tasks or of a file."""
        self.subspaces = {side: self.subspaces[side] for side in get_args(Side) if side in self.subspaces}

    def __repr__(self) -> str:
        sides = ", ".join(f"{side} {s.rank} of {s.dimension}" for side, s in self.subspaces.items()) or self.reason
        return f"Basis({self.name!r} {list(self.shape)}, {self.fate.value}: {sides})"

    @property
    def main(self) -> Subspace | None:
        """The subspace with the largest share of used directions (a parameter mostly has one)."""
        return max(self.subspaces.values(), key=lambda s: s.rank / max(1, s.dimension), default=None)

    @property
    def U(self) -> Tensor:  # noqa: N802  (the mathematical name)
        """The basis of the main side: `[s, k]` for one group, `[g, s, k]` for several, `[k]` row index for
        embeddings.
        """
        if self.main is None:
            raise KeyError(f"'{self.name}' has no basis: it is {self.fate.value} ({self.reason})")
        basis = self.main.basis
        return basis[0] if basis.ndim == 3 and basis.shape[0] == 1 else basis

    @property
    def spectrum(self) -> Tensor | None:
        """Eigenvalues `[g, s]` of the last task's second moment on the main side, descending."""
        return None if self.main is None else self.main.spectrum

    def energy(self, task: str) -> float:
        """Share of the energy of `task` that is kept, on the side where it is least; 1 if nothing is known of it.

        Of a basis that each task chooses anew, and of one without `energies`, it is at most that of the last task.
        """
        sides = self.subspaces.values()
        found = dict(zip(self.tasks, self.energies, strict=True)) if self.energies else {}
        if task not in found or any(side.covariance is not None for side in sides):
            known = [found.get(task, 1.0), *(side.energy for side in sides if not math.isnan(side.energy))]
            return max(0.0, min(known))
        return found[task]

    @property
    def _axis(self) -> tuple[Subspace, ...]:
        """The sides of that axis of which most is used: one side, or frozen rows and the left side beside them."""
        axes = [tuple(s for s in self.subspaces.values() if (s.side == "right") is right) for right in (True, False)]
        return max(axes, key=lambda sides: sum(s.rank / max(1, s.dimension) for s in sides))

    @property
    def rank(self) -> int:
        """Protected directions of the fuller axis, summed over groups."""
        return sum(side.rank for side in self._axis)

    @property
    def dimension(self) -> int:
        """All directions of that axis, summed over groups; 0 without a basis."""
        return max((side.dimension for side in self._axis), default=0)

    @property
    def held(self) -> float:
        """Protected directions of that axis, each counted by its scale, summed over groups."""
        return sum(side.held for side in self._axis)

    @property
    def free_share(self) -> float:
        """Share of directions that later tasks may still use: 1 if free, 0 if frozen or full."""
        if self.fate in (Fate.FROZEN, Fate.FULL):
            return 0.0
        used = {side: subspace.held / max(1, subspace.dimension) for side, subspace in self.subspaces.items()}
        return (1.0 - used.get("right", 0.0)) * max(0.0, 1.0 - used.get("left", 0.0) - used.get("rows", 0.0))

    @property
    def still(self) -> int:
        """Number of elements of the parameter that no later step can change."""
        if self.fate in (Fate.FROZEN, Fate.FULL):
            return math.prod(self.shape)
        rows = self.subspaces.get("rows")
        return 0 if rows is None else rows.rank * (math.prod(self.shape) // max(1, self.shape[0]))


class Capacity(dict[str, float]):
    """Share of directions still free, by parameter name; `mean` counts the directions of weights with a basis only."""

    def __init__(self, store: Mapping[str, Basis]) -> None:
        super().__init__({name: basis.free_share for name, basis in store.items()})
        self._dimensions = {name: b.main.dimension for name, b in store.items() if b.main and "rows" not in b.subspaces}

    @property
    def mean(self) -> float:
        """Free share of all directions of the weights that have a basis; 1 if there are none.

        Biases, gains and tables of which rows are frozen are left out.
        """
        total = sum(self._dimensions.values())
        free = sum(self[name] * dimension for name, dimension in self._dimensions.items())
        return free / total if total else 1.0

    def __repr__(self) -> str:
        lowest = sorted(self._dimensions, key=lambda name: self[name])[:3]
        names = ", ".join(f"'{name}' {self[name]:.0%}" for name in lowest)
        return f"Capacity({self.mean:.0%} free in {len(self._dimensions)} weights; least: {names or 'none'})"


@dataclass(frozen=True)
class Extension:
    """Data of a mode beside the bases: one record of plain JSON values and tensors by key."""

    record: dict[str, object]
    tensors: dict[str, Tensor]


class BasisStore(Mapping[str, Basis]):
    """All bases of one optimizer by parameter name, the consolidated tasks and the buffers they relied on.

    The store is one mutable object for the lifetime of an optimizer: `replace` swaps its content at once, so a
    consolidation is either wholly visible or not at all.
    """

    def __init__(self) -> None:
        self._bases: dict[str, Basis] = {}
        self.tasks: list[dict[str, object]] = []
        self.buffers: dict[str, Tensor] = {}
        self.probes: dict[str, dict[str, Tensor]] = {}
        self.extension: Extension | None = None

    def __repr__(self) -> str:
        fates = ", ".join(f"{n} {f.value}" for f in Fate if (n := sum(b.fate is f for b in self.values())))
        return f"BasisStore({len(self.tasks)} tasks; {fates or 'nothing protected'})"

    def __getitem__(self, name: str) -> Basis:
        return self._bases[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)

    def energy(self, task: str) -> float:
        """Share of the energy of `task` that is kept, at the parameter where it is least; 1 if none met it."""
        return min((basis.energy(task) for basis in self.values() if task in basis.tasks), default=1.0)

    def replace(self, other: BasisStore) -> None:
        """Take over the whole content of `other`."""
        self.__dict__.update(other.__dict__)

    def copy(self) -> BasisStore:
        """Return a store with the same bases (tensors shared, containers new)."""
        twin = BasisStore()
        twin._bases = dict(self._bases)
        twin.tasks = list(self.tasks)
        twin.buffers = dict(self.buffers)
        twin.probes = dict(self.probes)
        twin.extension = self.extension
        return twin

    def put(self, basis: Basis) -> None:
        """Store `basis` under its parameter's name."""
        self._bases[basis.name] = basis

    def remove(self, name: str) -> Basis:
        """Remove and return the basis of `name`, with the entry of a bias that only this basis protected."""
        basis = self._bases.pop(name)
        if basis.bias is not None and basis.bias in self and self[basis.bias].kept is None:
            del self._bases[basis.bias]
        return basis
