"""The rows of one product, cut into blocks `[g, n, s]` for one side of a weight.

`Rows` come from matrix products, `Patches` from convolutions: one patch an output position, in the order of the
layout's `d` axis, so that `conv(x, W) = patches @ W^T` for every group. Patches are unfolded a few samples at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..model.storage import tensor_key
from ..subspace.layout import Layout

CHUNK_BYTES = 64 * 2**20


class WeightBlock(NamedTuple):
    """Place of rows of length `K`: a side of a layout, positions `start + step * k`, and the groups they touch."""

    layout: Layout
    side: Literal["right", "left"]
    start: int
    step: int
    groups: tuple[int, ...] | None
    outputs: tuple[int, int]


@dataclass(eq=False)
class Rows:
    """The rows of one product: `source` and how they become blocks `[g, n, size]` of one side of a weight."""

    source: Tensor
    place: WeightBlock
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
        """Yield the rows `[g, n, size]` with a flag in `mask` `[B, n]`, and their number a group where it differs."""
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
        """Layout of the weight as matrices."""
        if self.transposed:
            return Layout("transposed", self.groups)
        return Layout("grouped", self.groups) if self.groups > 1 else Layout()

    def padded(self, x: Tensor) -> Tensor:
        """Return `x` `[N, C, *S]` padded so that every output has its window (of stride 1 if transposed)."""
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
    def place(self) -> WeightBlock:
        """Convolutions contract the right side."""
        return WeightBlock(self.kernel.layout, "right", 0, 1, None, (0, -1))

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
        windows = windows.reshape(windows.shape[0], groups, -1, *windows.shape[2:])
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
    every = tuple(slice(None, None, step) for step in (1, 1, *stride))
    out[every] = x
    return out


def convolution_kept(gradient: Tensor, spatial: int) -> Tensor:
    """Return which output positions `[N, *O]` have a gradient `[N, C, *O]` or `[C, *O]` in any channel."""
    gradient = gradient if gradient.ndim == 2 + spatial else gradient[None]
    return gradient.ne(0).any(1)
