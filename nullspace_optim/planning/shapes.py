"""Shapes of one training step of a model: weights that meet rows and the second moments they share.

Weights are stacks of matrices `[g, m, d]` (see `layout`). One multiplication and one addition are two FLOPs, as
`torch.utils.flop_counter` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..subspace.layout import Kind, MatrixSide

EIGH = 9  # FLOPs of all eigenpairs of a symmetric matrix `[s, s]` over `s^3` (Golub and Van Loan, section 8.3)
CACHE = 2**25  # bytes of a matrix that stays in a processor's cache
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Moment:
    """One second moment `[g, s, s]` of a consolidation; `rows` met it in one batch, summed over groups.

    `sketched` is the number `l` of rows of its sketch (see `sketch`), 0 where it is held whole.
    """

    groups: int
    size: int
    rows: int
    sketched: int = 0

    def bytes(self, entry: int) -> int:
        """Bytes of the sum in entries of `entry` bytes: `[g, s, s]`, or `[g, 2 l, s]` and the squares `[g, s]`."""
        return self.groups * self.size * entry * (2 * self.sketched + 1 if self.sketched else self.size)

    @property
    def flops(self) -> int:
        """FLOPs of adding the rows of one batch: a product, or a singular value decomposition for `l + 1` rows each."""
        if not self.sketched:
            return 2 * self.rows * self.size**2
        return self.rows * _svd(2 * self.sketched, self.size) // (self.sketched + 1)

    @property
    def solving(self) -> int:
        """FLOPs of finding the directions."""
        return self.groups * (_svd(self.sketched, self.size) if self.sketched else EIGH * self.size**3)

    def read(self, entry: int) -> int:
        """Bytes that finding the directions reads from memory: the reduction to tridiagonal form multiplies, column by
        column, what is left of a triangle with one vector, `s^3 / 6` entries in all.
        """
        cached = self.sketched or entry * self.size**2 <= CACHE
        return 0 if cached else self.groups * self.size**3 * entry // 6

    def vectors(self, entry: int) -> int:
        """Bytes of all eigenvectors."""
        return self.groups * self.size * entry * (self.sketched or self.size)

    def solving_bytes(self, entry: int, rank: int) -> int:
        """Bytes that a first task takes beside the second moments to find the directions and keep `rank` of them.

        In matrices `[s, s]` of float32, `r = k / s`: all eigenvectors and two of workspace; or eigenvectors, `r` of
        basis and `4 r + 3 r^2` where it is made orthonormal (from float64 `4 r^2`). Later tasks solve in coordinates of
        what is free; these and the second moment in them make it five at most.
        """
        if self.sketched:
            return 9 * FLOAT * self.groups * self.sketched * self.size
        g, r, wide = self.groups, rank / max(1, self.size), entry // FLOAT
        solved = wide * (3 if g == 1 else 2 * g + 2.25)
        polished = (wide + r) * g + r * (g > 1) + (4 * r + 3 * r**2 if wide == 1 else 4 * r**2)
        return round(FLOAT * self.size**2 * max(solved, polished))


@dataclass(frozen=True)
class Weight:
    """One trainable parameter that meets rows.

    `matrix` is `(g, m, d)`, with one more input where a bias is protected with it (`joint`); `sides` maps each side to
    the number of its second moment in `Survey.moments`; `lookup` is True where rows of the weight are looked up (an
    embedding); `kind` is that of its layout (see `layout`).
    """

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, int, int]
    itemsize: int
    sides: Mapping[MatrixSide, int]
    lookup: bool = False
    kind: Kind = "matrix"
    joint: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the parameter, and of a bias protected with it."""
        g, m, d = self.matrix
        return g * m * d * self.itemsize

    @property
    def padded(self) -> bool:
        """True where a shard of the first dimension is no block of the stack: its anchors are as large as the whole."""
        return self.kind == "grouped" or (self.kind == "transposed" and self.matrix[0] > 1)

    def crosses(self, side: MatrixSide) -> bool:
        """Return whether coordinates of `side` are sums over the shards of the first dimension (see `shards`)."""
        if self.padded and self.kind == "transposed":
            return True
        return side == {"matrix": "left", "grouped": "left", "transposed": "right"}.get(self.kind)


@dataclass(frozen=True)
class Frozen:
    """A trainable parameter that is read in a way that cannot be protected, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class Survey:
    """Reads of one training step of a model: a batch of `batch` samples forward, then backward.

    `forward_flops` and `step_flops` are counted products; `buffers` are the bytes of buffers that the forward pass
    reads, which are kept as well.
    """

    model: str
    batch: int
    parameters: int
    weights: tuple[Weight, ...]
    moments: tuple[Moment, ...]
    frozen: tuple[Frozen, ...]
    free: tuple[str, ...]
    buffers: int
    forward_flops: int
    step_flops: int


def _svd(rows: int, size: int) -> int:
    """Return the FLOPs of a thin singular value decomposition `[rows, size]` (Golub and Van Loan, figure 8.6.1)."""
    less, more = sorted((rows, size))
    return 6 * more * less**2 + 20 * less**3
