"""The operators in which rows meet a weight, and the rows they meet it with.

An operator of the table becomes a `Meeting`: a weight seen as a strided array `[B, K, N]` (batch, contracted, kept), rows
`[B, n, K]`, and the rule that reduces the gradient of the output to one flag a row. `place` then says which side of which
`Layout` these rows belong to: the side whose index the contraction runs along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .layout import Layout
from .recognise import Geometry, tensor_key

CHUNK_BYTES = 64 * 2**20


class Meeting(NamedTuple):
    """One product of a weight and rows.

    `weight`, `rows` and `bias` are positions of operator arguments; `dims` are the weight's dimensions (batch, contracted,
    kept), `None` where it has none; `view` brings the other operand to `[B, n, K]`; `kept` the output's gradient to `[B, n, N]`.
    """

    weight: int
    rows: int
    dims: tuple[int | None, int, int | None]
    view: Callable[[Tensor], Tensor]
    kept: Callable[[Tensor], Tensor]
    bias: int | None = None


def _row_matrix(x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[-1]) if x.ndim != 2 else x[None]


def _columns(x: Tensor) -> Tensor:
    return x.mT[None] if x.ndim == 2 else x.mT


def _same(x: Tensor) -> Tensor:
    return x


def _single(x: Tensor) -> Tensor:
    return x.reshape(1, 1, -1)


def _vector(x: Tensor) -> Tensor:
    return x.reshape(1, -1, 1)


def _matrices(first: int, bias: int | None) -> tuple[Meeting, ...]:
    return (
        Meeting(first + 1, first, (None, 0, 1), _row_matrix, _row_matrix, bias),
        Meeting(first, first + 1, (None, 1, 0), _columns, _columns, None),
    )


def _batches(first: int, bias: int | None) -> tuple[Meeting, ...]:
    return (
        Meeting(first + 1, first, (0, 1, 2), _same, _same, bias),
        Meeting(first, first + 1, (0, 2, 1), _columns, _columns, None),
    )


def _vectors(first: int) -> tuple[Meeting, ...]:
    return (
        Meeting(first, first + 1, (None, 1, 0), _single, _single, None),
        Meeting(first + 1, first, (None, 0, None), _row_matrix, _vector, None),
    )


PRODUCTS: dict[str, tuple[Meeting, ...]] = {
    "mm": _matrices(0, None),
    "addmm": _matrices(1, 0),
    "bmm": _batches(0, None),
    "baddbmm": _batches(1, 0),
    "mv": _vectors(0),
    "addmv": _vectors(1),
    "dot": (Meeting(0, 1, (None, 0, None), _single, _vector), Meeting(1, 0, (None, 0, None), _single, _vector)),
    "linear": (Meeting(1, 0, (None, 1, 0), _row_matrix, _row_matrix, 2),),
}
CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable")
EMBEDDINGS = ("embedding", "_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
COPIES = ("clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "detach_copy", "alias_copy")
VIEWS_OF_COPIES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
WITHOUT_READING = (
    *(
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_empty",
        "new_zeros",
        "new_ones",
    ),
    *("new_full", "new_empty_strided", "is_same_size", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
)


class Place(NamedTuple):
    """Where rows of length `K` belong: a side of a layout, positions `start + step * k`, and the groups they touch."""

    layout: Layout
    side: Literal["right", "left"]
    start: int
    step: int
    groups: tuple[int, ...] | None
    outputs: tuple[int, int]


def place(geometry: Geometry, dims: tuple[int | None, int, int | None], shape: Sequence[int]) -> Place | None:
    """Find the side of the parameter of `shape` that the contraction of `geometry` runs along, or `None` if there is none."""
    offset = geometry.offset
    (batch, s_batch), (k, s_k), (n, s_n) = (
        (1, 0) if dim is None or geometry.size[dim] == 1 else (geometry.size[dim], geometry.stride[dim]) for dim in dims
    )
    if (k > 1 and s_k <= 0) or min(s_batch, s_n) < 0:
        return None
    if len(shape) == 3 and s_batch:
        found = _place_batched(offset, (batch, k, n), (s_batch, s_k, s_n), shape)
        if found is not None:
            return found
    rest = math.prod(shape[1:])
    i, j = divmod(offset, rest)
    if s_batch % rest == 0 and s_n % rest == 0 and j + s_k * (k - 1) < rest:
        return Place(Layout(), "right", j, max(s_k, 1), None, (i, n if s_batch == 0 else -1))
    if s_k % rest == 0 and j + s_batch * (batch - 1) + s_n * (n - 1) < rest:
        return Place(Layout(), "left", i, max(s_k // rest, 1), None, (j, n))
    return _place_batched(offset, (batch, k, n), (s_batch, s_k, s_n), shape) if len(shape) == 3 else None


def _place_batched(
    offset: int, sizes: tuple[int, int, int], strides: tuple[int, int, int], shape: Sequence[int]
) -> Place | None:
    """The same for a three-dimensional weight that is a stack of matrices."""
    (batch, k, n), (s_batch, s_k, s_n) = sizes, strides
    group, inside = divmod(offset, shape[1] * shape[2])
    i, j = divmod(inside, shape[2])
    if s_batch % (shape[1] * shape[2]):
        return None
    step = s_batch // (shape[1] * shape[2])
    groups = tuple(group + step * b for b in range(batch)) if step else (group,)
    layout = Layout("batched")
    if s_n % shape[2] == 0 and i * shape[2] + s_n * (n - 1) < shape[1] * shape[2] and j + s_k * (k - 1) < shape[2]:
        return Place(layout, "right", j, max(s_k, 1), groups, (i, n))
    if s_k % shape[2] == 0 and i + s_k // shape[2] * (k - 1) < shape[1] and j + s_n * (n - 1) < shape[2]:
        return Place(layout, "left", i, max(s_k // shape[2], 1), groups, (j, n))
    return None


@dataclass(eq=False)
class Rows:
    """The rows of one product: `source` and how they become blocks `[g, n, size]` of one side of a weight."""

    source: Tensor
    place: Place
    size: int
    append_one: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal exactly for products with the same rows."""
        where = self.place
        return tensor_key(self.source), where[1:5], where.layout, self.size, self.append_one

    def clone_source(self) -> None:
        """Make the rows independent of a tensor that is about to be written."""
        self.source = self.source.clone()

    def blocks(self, mask: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the rows `[g, n, size]` whose flag in `mask` `[B, n]` is set, and their number a group where it differs."""
        rows, groups = self.source, self.place.groups
        if groups is None or len(groups) == 1 or rows.shape[0] != len(groups):
            rows = rows.reshape(1, -1, rows.shape[-1])
            if mask is not None:
                rows, mask = rows[:, mask.reshape(-1)], None
        rows = rows.to(dtype)
        count = None if mask is None else mask.sum(1)
        rows = rows if mask is None else rows * mask[..., None]
        if rows.is_complex() and self.place.side == "left":
            rows = rows.conj()
        yield self._finish(rows, mask), count

    def _finish(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Embed rows of a column block into full length and append the constant input of a bias."""
        where = self.place
        size = self.size - self.append_one
        if rows.shape[-1] != size:
            full = rows.new_zeros(*rows.shape[:-1], size)
            full[..., where.start : where.start + where.step * rows.shape[-1] : where.step] = rows
            rows = full
        if self.append_one:
            ones = rows.new_ones(*rows.shape[:-1], 1) if mask is None else mask[..., None].to(rows.dtype)
            rows = torch.cat([rows, ones], dim=-1)
        return rows


@dataclass(frozen=True)
class Kernel:
    """The arguments of one convolution, spatial dimensions only."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, weight: Sequence[int], arguments: Sequence[Any]) -> Kernel:
        """Read the arguments that follow `bias` in `aten.convolution`."""
        n = len(weight) - 2
        stride, padding, dilation, transposed, output_padding, groups = arguments
        stride, padding, dilation, output_padding = (
            tuple(v) * (n if len(v) == 1 else 1) for v in (stride, padding, dilation, output_padding)
        )
        return cls(tuple(weight[2:]), stride, padding, dilation, transposed, output_padding or (0,) * n, groups)

    @property
    def layout(self) -> Layout:
        """How a weight of this convolution is read as matrices."""
        if self.transposed:
            return Layout("transposed", self.groups)
        return Layout("grouped", self.groups) if self.groups > 1 else Layout()

    def padded(self, x: Tensor) -> Tensor:
        """Return `x` `[N, C, *S]` padded so that windows at every stride (1 if transposed) are the inputs of the outputs."""
        margins: list[int] = []
        if self.transposed:
            x = _spread(x, self.stride)
            for size, padding, dilation, extra in zip(
                self.size, self.padding, self.dilation, self.output_padding, strict=True
            ):
                margin = dilation * (size - 1) - padding
                margins = [margin, margin + extra, *margins]
        else:
            for padding in self.padding:
                margins = [padding, padding, *margins]
        return functional.pad(x, margins) if any(margins) else x

    def windows(self, x: Tensor) -> Tensor:
        """Return all windows `[N, C, *O, *k]` of a padded input, a view."""
        for dim, (size, stride, dilation) in enumerate(zip(self.size, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + dim, dilation * (size - 1) + 1, 1 if self.transposed else stride)
            x = x[..., ::dilation]
        return x.flip(tuple(range(-len(self.size), 0))) if self.transposed else x


@dataclass(eq=False)
class Patches:
    """The rows of a convolution: one patch an output position, `[g, N * positions, in / g * prod(k)]`."""

    source: Tensor
    kernel: Kernel
    size: int
    append_one: bool = False

    @property
    def place(self) -> Place:
        """Convolutions contract the right side."""
        return Place(self.kernel.layout, "right", 0, 1, None, (0, -1))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal exactly for convolutions with the same patches."""
        return tensor_key(self.source), self.kernel, self.size, self.append_one

    def clone_source(self) -> None:
        """Make the rows independent of a tensor that is about to be written."""
        self.source = self.source.clone()

    def blocks(self, mask: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the patches of a few output lines at a time, so that memory stays bounded; `mask` is `[N, *O]`."""
        spatial = len(self.kernel.size)
        x = self.kernel.padded(self.source if self.source.ndim == 2 + spatial else self.source[None])
        for sample in range(0, x.shape[0], self._samples(x, dtype)):
            samples = slice(sample, sample + self._samples(x, dtype))
            windows = self.kernel.windows(x[samples])
            flags = None if mask is None else mask.reshape(x.shape[0], -1)[samples].reshape(-1)
            yield self._matrix(windows, flags, dtype), None

    def _samples(self, x: Tensor, dtype: torch.dtype) -> int:
        """Return how many samples' patches fit `CHUNK_BYTES` (at least one)."""
        positions = 1
        for extent, size, stride, dilation in zip(
            x.shape[2:], self.kernel.size, self.kernel.stride, self.kernel.dilation, strict=True
        ):
            positions *= (extent - dilation * (size - 1) - 1) // (1 if self.kernel.transposed else stride) + 1
        bytes_each = positions * x.shape[1] * math.prod(self.kernel.size) * dtype.itemsize
        return max(1, CHUNK_BYTES // max(1, bytes_each))

    def _matrix(self, windows: Tensor, flags: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Turn windows `[N, C, *O, *k]` into rows `[g, n, d]`."""
        k = len(self.kernel.size)
        groups = self.kernel.groups
        windows = windows.unflatten(1, (groups, -1))
        order = (1, 0, *range(3, 3 + k), 2, *range(3 + k, 3 + 2 * k))
        rows = windows.permute(order).reshape(groups, -1, self.size - self.append_one)
        rows = (rows if flags is None else rows[:, flags]).to(dtype)
        if self.append_one:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
        return rows


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Insert `stride - 1` zeros between neighbours of `x` `[N, C, *S]`."""
    if all(step == 1 for step in stride):
        return x
    sizes = [(extent - 1) * step + 1 for extent, step in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    out[(..., *(slice(None, None, step) for step in stride))] = x
    return out


def convolution_kept(gradient: Tensor, spatial: int) -> Tensor:
    """Return which output positions `[N, *O]` have a gradient in any channel; `gradient` is `[N, C, *O]` or `[C, *O]`."""
    gradient = gradient if gradient.ndim == 2 + spatial else gradient[None]
    return gradient.ne(0).any(1)
