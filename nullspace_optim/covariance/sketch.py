"""Second moments of wide weights in memory linear in the width: Frequent Directions, with its error bound.

For rows `A` `[n, s]` the sketch keeps `B` `[l, s]`. Ghashami, Liberty, Phillips and Woodruff (2016, "Frequent
Directions: Simple and Deterministic Matrix Sketching", SIAM J. Comput. 45(5), Theorem 1.1 and section 2): `0 <= A^T A -
B^T B` and, for every `k < l`, `||A^T A - B^T B||_2 <= D <= ||A - A_k||_F^2 / (l - k)`, where `D` is the sum of what the
shrinking steps took from a direction. `D` is kept, so the bound of one run is known, not only its guarantee. Two
sketches merge into one of the same size with the same guarantee (section 3), so ranks can be added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .second_moment import wide_dtype


@dataclass(frozen=True)
class SketchedCovariance:
    """Measure weights with more than `above` inputs by a sketch of `size` rows instead of the whole second moment.

    Memory of a weight with `s` inputs: `8 size s` bytes instead of `4 s^2`. At most `size - 1` directions can be taken
    a task, and none whose energy is below the bound is certain to be found; the report states the bound.
    """

    size: int = 1024
    above: int = 8192

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 2:
            raise OptionError(f"SketchedCovariance(size={self.size!r}): expected a whole number of rows, 2 or more")
        if not isinstance(self.above, int) or self.above < self.size:
            raise OptionError(
                f"SketchedCovariance(above={self.above!r}): expected a width of at least size={self.size}; narrower "
                "weights need no sketch"
            )


class FrequentDirections:
    """Frequent Directions of the rows of each group, in the place of a `SecondMoment` of wide weights.

    `squares` `[g, s]` is the exact sum of squares per feature; `lost` `[g]` is `D` of the bound.
    """

    def __init__(self, groups: int, size: int, rows: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        """Start `groups` empty sketches of `rows` rows for `size` features."""
        self.owner = 0
        self.size = size
        self.rows = torch.zeros(groups, dtype=torch.int64)
        self.squares = torch.zeros(groups, size, dtype=dtype, device=device)
        self.lost = torch.zeros(groups, dtype=torch.float64)
        self._buffer = torch.zeros(groups, 2 * rows, size, dtype=dtype, device=device)
        self._filled = [0] * groups

    @property
    def groups(self) -> int:
        """Number of groups `g`."""
        return len(self._filled)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the sums: float32 or float64."""
        return self.squares.dtype

    @property
    def device(self) -> torch.device:
        """Device of the sketch (meta, once it was discarded)."""
        return self._buffer.device

    @property
    def kept(self) -> int:
        """Rows `l` of the sketch."""
        return self._buffer.shape[1] // 2

    @property
    def bound(self) -> Tensor:
        """`D` as a share of each group's energy, `[g]`: no direction's second moment is off by more."""
        return self.lost / self.trace().double().cpu().clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def factor(self) -> Tensor:
        """The sketch `B` `[g, l, s]`."""
        for group in range(self.groups):
            if self._filled[group] > self.kept:
                self._shrink(group)
        return self._buffer[:, : self.kept]

    def diagonal(self) -> Tensor:
        """The exact sum of squares per feature, `[g, s]`."""
        return self.squares

    def trace(self) -> Tensor:
        """The exact energy of the rows per group, `[g]`."""
        return self.squares.sum(-1)

    def end_batch(self) -> None:
        """Do nothing: batches are not normalised."""

    def update(self, rows: Tensor, groups: Sequence[int] | None = None, count: Tensor | None = None) -> None:
        """Add the rows `[g, n, s]`, as `SecondMoment.update` does."""
        index = list(range(self.groups)) if groups is None else list(groups)
        number = torch.full((len(index),), rows.shape[1]) if count is None else count.to("cpu", torch.int64)
        self.rows.index_add_(0, torch.tensor(index, dtype=torch.int64), number)
        rows = rows.detach().to(self.device)
        self.widen(wide_dtype(rows, self.dtype))
        for group, block in zip(index, rows.to(self.dtype), strict=True):
            self.squares[group] += block.square().sum(0)
            if bool(torch.isfinite(self.squares[group]).all()):
                self._append(group, block)

    def widen(self, dtype: torch.dtype) -> None:
        """Go on in `dtype`, which holds all that the present type holds."""
        self.squares, self._buffer = self.squares.to(dtype), self._buffer.to(dtype)

    def _append(self, group: int, block: Tensor) -> None:
        while len(block):
            if self._filled[group] == self._buffer.shape[1]:
                self._shrink(group)
            start = self._filled[group]
            part = block[: self._buffer.shape[1] - start]
            self._buffer[group, start : start + len(part)] = part
            self._filled[group] += len(part)
            block = block[len(part) :]

    def _shrink(self, group: int) -> None:
        """Rotate the rows into singular directions and take the `l`-th squared value from all of them."""
        _, values, directions = torch.linalg.svd(self._buffer[group], full_matrices=False)
        squares = values.square()
        cut = squares[self.kept - 1] if len(squares) >= self.kept else squares.new_zeros(())
        scaled = (squares - cut).clamp(min=0).sqrt()[: self.kept, None] * directions[: self.kept]
        self._buffer[group].zero_()[: len(scaled)] = scaled
        self._filled[group] = self.kept - 1 if len(squares) >= self.kept else len(scaled)
        self.lost[group] += float(cut)

    def merge(self, other: FrequentDirections) -> None:
        """Add the rows that another sketch of the same shape has seen."""
        self.join(other.factor, other.squares, other.lost)
        self.rows += other.rows

    def join(self, factor: Tensor, squares: Tensor, lost: Tensor) -> None:
        """Add another sketch by its parts `B` `[g, l, s]`, sums of squares `[g, s]` and `D` `[g]`."""
        for group, block in enumerate(factor.to(self._buffer)):
            self._append(group, block[block.ne(0).any(1)])
        self.squares += squares.to(self.squares)
        self.lost += lost.to(self.lost)

    def clone(self) -> FrequentDirections:
        """Return an independent copy."""
        return self.leading(self.size)

    def leading(self, size: int) -> FrequentDirections:
        """Return a copy restricted to the first `size` features; the bound holds for it as well."""
        twin = FrequentDirections.__new__(FrequentDirections)
        twin.owner, twin.size, twin.rows = self.owner, size, self.rows.clone()
        twin.squares, twin.lost = self.squares[:, :size].clone(), self.lost.clone()
        twin._buffer, twin._filled = self._buffer[..., :size].clone(), list(self._filled)
        return twin

    def discard(self) -> None:
        """Drop the sketch (another rank holds it); sums of squares and bound stay."""
        self._buffer = self._buffer.to("meta")
