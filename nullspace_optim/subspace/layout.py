"""Layout of a weight tensor as a stack of matrices.

Shape convention of the whole library: a weight is a stack of matrices `[g, m, d]`: `g` groups (mostly one), `m`
outputs, `d` inputs. A row that met the weight is a vector of length `d` (side "right") or, for parameters used as `x
@ P`, of length `m` (side "left").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["matrix", "grouped", "transposed", "batched"]
MatrixSide = Literal["right", "left"]
Side = Literal["right", "left", "rows"]
"""What a basis acts on: the inputs of a matrix, its outputs, or rows of a table that is looked up."""


@dataclass(frozen=True)
class Layout:
    """The matrix view of one weight.

    * ``"matrix"``: `[1, shape[0], rest]` (linear, ungrouped convolution, embedding, `x @ P`);
    * ``"grouped"``: `[groups, shape[0] / groups, rest]` (grouped and depthwise convolution);
    * ``"transposed"``: a transposed convolution's `[in, out / g, *k]` becomes `[g, out / g, in / g * prod(k)]`;
    * ``"batched"``: a three-dimensional weight `[g, m, d]` as it is (`bmm` with one matrix a batch entry).
    """

    kind: Kind = "matrix"
    groups: int = 1

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return `(g, m, d)` for a weight of `shape`."""
        rest = math.prod(shape[1:])
        if self.kind == "batched":
            return shape[0], shape[1], shape[2]
        if self.kind == "transposed":
            return self.groups, shape[1], shape[0] // self.groups * math.prod(shape[2:])
        return self.groups, shape[0] // self.groups, rest

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return `weight` as `[g, m, d]`: a view where strides allow it, otherwise a copy."""
        shape = self.matrix_shape(weight.shape)
        if self.kind != "transposed":
            return weight.reshape(shape)
        per_group = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return per_group.transpose(1, 2).reshape(shape)

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the stack `matrix` `[g, m, d]` as a weight of `shape` (inverse of `to_matrix`)."""
        if self.kind != "transposed":
            return matrix.reshape(tuple(shape))
        per_group = matrix.reshape(self.groups, shape[1], shape[0] // self.groups, -1)
        return per_group.transpose(1, 2).reshape(tuple(shape))
