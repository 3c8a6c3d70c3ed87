"""Streaming second moments of the rows that met a weight.

Rows come as `[g, n, s]`: `g` groups, `n` rows, `s` features (the input side `d` of a weight for side "right",
the output side `m` for side "left"). A `SecondMoment` keeps `sum_i x_i x_i^T`, the uncentred covariance of GPM
(Saha et al., 2021, eq. 6), GNSP (2507.19839, eq. 3) and Adam-NSCL (Wang et al., 2021, eq. 8); it can be merged
across batches and across ranks. On the CPU only the block columns of the lower triangle are multiplied, 9/16 of the
work of a product; elsewhere it is one batched product. BLAS `syrk` would be half the work, but torch has none, and
scipy's comes with a thread pool of its own that fights with torch's inside a forward pass.

As long as rows are fewer than half the features they are kept as they are: their directions follow from products among
the rows, `[n, n]`, which is less work than a sum `[s, s]` and its eigenvectors, and less memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..subspace.linalg import add_lower_product_
from ..subspace.projection import exact_products

_SMALL_GROUP = 64
_BLOCK = 256
_WIDE = 128  # features from which on it pays to keep few rows as they are
_SMALL, _LARGE = 1e-12, 1e15  # float32 can sum the squares of rows between them
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def wide_dtype(rows: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which the squares of `rows` neither overflow nor vanish: `dtype`, or its double."""
    if rows.is_meta or not rows.numel() or dtype not in _DOUBLE:
        return dtype
    largest = float(torch.linalg.vector_norm(rows, torch.inf)) if rows.is_complex() else _largest(rows)
    return _DOUBLE[dtype] if largest > _LARGE or 0 < largest < _SMALL else dtype


def _largest(rows: Tensor) -> float:
    """Return the largest absolute value; NaN where there is one."""
    low, high = rows.aminmax()
    return max(-float(low), float(high))


class SecondMoment:
    """The sum of `x x^T` over rows, `[g, s, s]`, and how many rows each group has seen.

    With `batch_frobenius` each batch's Gram matrix is divided by its Frobenius norm before it is added (GNSP,
    2507.19839, eq. 3); rows of one batch may then come in several updates, and `end_batch` closes the batch. `owner` is
    the rank that holds the common sum after a reduction; elsewhere the sum is a meta tensor.
    """

    def __init__(
        self,
        groups: int,
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_frobenius: bool = False,
    ) -> None:
        """Start an empty sum for `groups` groups of `size` features."""
        self.batch_frobenius = batch_frobenius
        self.owner = 0
        self.rows = torch.zeros(groups, dtype=torch.int64)
        self._few: list[Tensor] | None = None
        if size >= _WIDE and not batch_frobenius:
            self._few = [torch.zeros(groups, 0, size, dtype=dtype, device=device)]
            self._sum = self._few[0].new_empty(0)
        else:
            self._sum = torch.zeros(groups, size, size, dtype=dtype, device=device)
        self._batch: Tensor | None = None
        self._half = False

    @classmethod
    def of(cls, matrix: Tensor, rows: int) -> SecondMoment:
        """Return the sum `matrix` `[g, s, s]` of `rows` rows a group."""
        moment = cls(matrix.shape[0], matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        moment._few, moment._sum = None, matrix.clone()
        moment.rows.fill_(rows)
        return moment

    @property
    def groups(self) -> int:
        """Number of groups `g`."""
        return self._held.shape[0]

    @property
    def size(self) -> int:
        """Number of features `s`."""
        return self._held.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Accumulation type: float32 or float64 (complex alike); rows that float32 cannot square make it double."""
        return self._held.dtype

    @property
    def device(self) -> torch.device:
        """Device of the sum."""
        return self._held.device

    @property
    def _held(self) -> Tensor:
        """The sum `[g, s, s]`, or the first of few rows `[g, n, s]`."""
        return self._sum if self._few is None else self._few[0]

    @property
    def factor(self) -> Tensor | None:
        """All rows `[g, n, s]` in the order they came, as long as they are few; `None` once they are summed up."""
        return None if self._few is None else torch.cat(self._few, dim=1)

    @property
    def matrix(self) -> Tensor:
        """The sum so far, `[g, s, s]`, symmetric. It is the live tensor, not a copy; an open batch is closed first."""
        self.end_batch()
        self._sum_up()
        if self._half:
            _mirror(self._sum)
            self._half = False
        return self._sum

    def diagonal(self) -> Tensor:
        """The sum of squares per feature, `[g, s]`, without completing the symmetric half."""
        if self._few is not None:
            return torch.stack([(rows * rows.conj()).sum(1) for rows in self._few]).sum(0)
        diagonal = self._sum.diagonal(dim1=-2, dim2=-1)
        if self._batch is not None:
            diagonal = diagonal + self._batch.diagonal(dim1=-2, dim2=-1)
        return diagonal

    def trace(self) -> Tensor:
        """Total energy of the rows per group, `[g]`."""
        self.end_batch()
        return self.diagonal().sum(-1)

    def update(self, rows: Tensor, groups: Sequence[int] | None = None, count: Tensor | None = None) -> None:
        """Add the rows `[g, n, s]`; `groups` names the groups they belong to (all by default).

        `count` `[g]` is the number of rows that count where some of them were replaced by zeros.
        """
        index = list(range(self.groups)) if groups is None else list(groups)
        number = torch.full((len(index),), rows.shape[1]) if count is None else count.to("cpu", torch.int64)
        self.rows.index_add_(0, torch.tensor(index, dtype=torch.int64), number)
        if rows.shape[1] == 0 or not index:
            return
        if self.batch_frobenius and self._batch is None:
            self._batch = torch.zeros_like(self._sum)
        rows = rows.detach().to(self.device)
        self.widen(wide_dtype(rows, self.dtype))
        rows = rows.to(self.dtype)
        if self._few is not None and index == list(range(self.groups)) and self._has_room(rows.shape[1]):
            self._few.append(rows.clone())
            return
        self._sum_up()
        self._add(rows, index)

    def _has_room(self, number: int) -> bool:
        """Return whether `number` rows more are still few beside the features."""
        return self._few is not None and 2 * (sum(rows.shape[1] for rows in self._few) + number) <= self.size

    def _sum_up(self) -> None:
        """Go on with the sum in the place of few rows."""
        if self._few is not None:
            rows = torch.cat(self._few, dim=1)
            self._sum = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
            self._few = None
            self._add(rows, list(range(len(rows))))

    def _add(self, rows: Tensor, index: Sequence[int]) -> None:
        """Add the products of `rows` `[g, n, s]` to the groups `index`."""
        target = self._sum if self._batch is None else self._batch
        self._half = True  # only the lower triangle is kept up to date, or exactly symmetric to the upper one
        with torch.no_grad(), exact_products(self.device):
            if self._one_by_one(len(index)):
                for i, block in zip(index, rows, strict=True):
                    add_lower_product_(target[i], block)
                return
            gram = rows.mT @ rows.conj()
            target.index_add_(0, torch.tensor(index, device=self.device), gram)

    def widen(self, dtype: torch.dtype) -> None:
        """Go on in `dtype`, which holds all that the present type holds."""
        self._sum = self._sum.to(dtype)
        self._few = None if self._few is None else [rows.to(dtype) for rows in self._few]
        self._batch = None if self._batch is None else self._batch.to(dtype)

    def end_batch(self) -> None:
        """Close the batch: with `batch_frobenius`, normalise its Gram matrix and add it; otherwise do nothing."""
        if self._batch is None:
            return
        if self._half:
            _mirror(self._batch)
            _mirror(self._sum)
            self._half = False
        norm = torch.linalg.matrix_norm(self._batch).clamp_min(torch.finfo(self.dtype).tiny)
        self._sum += self._batch / norm[:, None, None]
        self._batch = None

    def parts(self) -> list[Tensor]:
        """Return views that hold each entry of the lower triangle: added up over ranks, they make the common sum.

        Blocks of rows up to the diagonal, so about half of the matrix; read `matrix` afterwards, not before.
        """
        self.end_batch()
        self._sum_up()
        self._half = True
        return [self._sum[:, top : top + _BLOCK, : top + _BLOCK] for top in range(0, self.size, _BLOCK)]

    def discard(self) -> None:
        """Drop the sum (another rank holds it); shape and row counts stay."""
        self._sum_up()
        self._sum, self._half = self._sum.to("meta"), False

    def merge(self, other: SecondMoment) -> None:
        """Add another sum of the same shape (another rank, another part of the data)."""
        self.matrix.add_(other.matrix.to(self.device, self.dtype))
        self.rows += other.rows

    def clone(self) -> SecondMoment:
        """Return an independent copy."""
        twin = SecondMoment.__new__(SecondMoment)
        twin.batch_frobenius, twin.owner = self.batch_frobenius, self.owner
        twin.rows = self.rows.clone()
        twin._sum = self._sum.clone()
        twin._few = None if self._few is None else list(self._few)
        twin._batch = None if self._batch is None else self._batch.clone()
        twin._half = self._half
        return twin

    def leading(self, size: int) -> SecondMoment:
        """Return a copy restricted to the first `size` features."""
        twin = SecondMoment.__new__(SecondMoment)
        twin.batch_frobenius, twin.owner = self.batch_frobenius, self.owner
        twin.rows = self.rows.clone()
        twin._few = None if self._few is None else [rows[..., :size].contiguous() for rows in self._few]
        twin._sum = self.matrix[:, :size, :size].clone() if self._few is None else self._sum
        twin._batch, twin._half = None, False
        return twin

    def _one_by_one(self, groups: int) -> bool:
        """Return whether half products, group by group, pay: on the CPU, unless groups are many and small."""
        return self.device.type == "cpu" and not self.dtype.is_complex and (groups == 1 or self.size >= _SMALL_GROUP)


def _mirror(matrix: Tensor) -> None:
    """Copy the lower triangle of `matrix` `[g, s, s]` to the upper one, block by block, in place."""
    for start in range(0, matrix.shape[1], _BLOCK):
        end = start + _BLOCK
        corner = matrix[:, start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mH)
        matrix[:, start:end, end:] = matrix[:, end:, start:end].mH
