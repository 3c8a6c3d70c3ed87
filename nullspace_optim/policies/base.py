"""Policies: rules for the number of protected directions of a second moment.

A policy gets eigenvalues only; `consolidation.grow` builds the bases. Eigenvalues are `[s]`, descending, of `K = X^T X`
`[s, s]` over the rows `X` `[n, s]` that met a weight, so an eigenvalue is a squared singular value of `X` and the trace
is the rows' energy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

Merge = Literal["append", "accumulate", "or"]


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of one group of one weight, from which a policy decides.

    * `values` `[s]`: eigenvalues, descending; append: of the residual `(I - U U^H) K (I - U U^H)` of the new task,
      with `U` the stored basis; accumulate: of the merged `K`.
    * `total`: the trace, append: of the new task's `K`; accumulate: of the merged `K`.
    * `largest`: the largest eigenvalue of the matrix that `total` is the trace of (within a few per cent).
    * `covered`: share of `total` that the stored basis already holds, 0..1 (1 where `total` is 0); accumulate: 0.
    * `kept`: rank already stored; accumulate: 0, because all directions are chosen anew.
    * `rows`: rows that the new task's `K` was summed over.
    * `stored` `[kept]`: energy `u^H K u` of the new task along each stored direction.
    * `tasks`: how many tasks this weight was consolidated for before.
    * `name`: of the parameter, or of the first of those that share these rows.
    """

    values: Tensor
    total: float
    largest: float
    covered: float
    kept: int
    rows: int
    stored: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    tasks: int = 0
    name: str = ""

    @property
    def size(self) -> int:
        """`s`, the number of all directions."""
        return int(self.values.shape[0])

    @property
    def free(self) -> int:
        """Directions that are not stored yet; at most so many can be taken."""
        return self.size - self.kept

    @property
    def shares(self) -> Tensor:
        """Share of `total` in each direction `[s]`, float64; zeros where `total` is 0."""
        values = self.values.double()
        return values / self.total if self.total > 0 else torch.zeros_like(values)

    def above(self, cut: float) -> int:
        """Return how many eigenvalues are strictly larger than `cut` (none of an all-zero matrix at cut 0)."""
        return int((self.values.double() > cut).sum())


@dataclass(frozen=True)
class Policy:
    """Rule for the directions that a task protects; a subclass is one paper's rule with its constants as defaults.

    * `merge`: "append" adds directions to the stored basis, whose span only grows; "accumulate" sums second moments
      over tasks and chooses all directions anew, so old ones may be dropped; "or" sums the `odds` of tasks, which are
      stored as directions and scales alone (conceptors).
    * `precise`: second moments are kept in float64.
    * `batch_frobenius`: each batch's second moment is divided by its Frobenius norm before it is added (GNSP).
    * `from_weights`: the rule looks at a weight `W` instead of its rows: at `W^T W` with `m` rows on the right side and
      `W W^T` with `d` rows on the left one, and both sides are protected (OSF).
    """

    merge: ClassVar[Merge] = "append"
    precise: ClassVar[bool] = False
    batch_frobenius: ClassVar[bool] = False
    from_weights: ClassVar[bool] = False

    @property
    def joint(self) -> bool:
        """True if the rule must see the spectra of all weights at once: it overrides `ranks`."""
        return type(self).ranks is not Policy.ranks

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """Return how many leading directions of each spectrum to take: new (append) or all (accumulate)."""
        return {key: min(self.rank(spectrum), spectrum.free) for key, spectrum in spectra.items()}

    def rank(self, spectrum: Spectrum) -> int:
        """Return the same for one spectrum alone; joint rules override `ranks` instead."""
        raise NotImplementedError(f"{type(self).__name__} must implement rank() or ranks()")

    def rows(self, counts: Tensor, kept: Tensor) -> Tensor:
        """Return the rows of an embedding to keep for a new task, as a mask `[n]`: by default each that was read.

        `counts` `[n]`: samples of the task that looked each row up. `kept` `[n]`: rows that are stored already.
        """
        return counts > 0

    def scale(self, spectrum: Spectrum, take: int, before: Tensor | None) -> Tensor | None:
        """Return how strongly each of the `kept + take` directions is protected, 0..1; `None`: all of them fully.

        `before` `[kept]` is what was stored; 1 for directions that had no scale.
        """
        return None

    def members(self, spectrum: Spectrum, take: int) -> Tensor | None:
        """Return which of the `kept + take` directions span the new task's own subspace, as a mask; `None`: unknown."""
        return None

    def odds(self, moment: Tensor, rows: Tensor) -> Tensor:
        """Return `s / (1 - s)` of the new task's scales `s` as a matrix `[g, s, s]` (only for the merge "or").

        `moment` `[g, s, s]` is the sum over `rows` `[g]` rows.
        """
        raise NotImplementedError(f'{type(self).__name__} merges by "or" and must implement odds()')

    def accumulated(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return the second moment `[g, s, s]` of all tasks: the sum of the earlier ones' and the new one's."""
        return new if old is None else old + new
