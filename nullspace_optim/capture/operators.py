"""The operators in which rows meet a weight, and the rows they meet it with.

An operator of the table becomes a `ContractionRule`: a weight seen as a strided array `[B, K, N]` (batch, contracted,
kept), rows `[B, n, K]`, and the rule that reduces the gradient of the output to one flag a row. `locate_block` then
says which side of which `Layout` these rows belong to: the side whose index the contraction runs along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..covariance.rows import WeightBlock
from ..subspace.layout import Layout
from .aliases import Geometry


class ContractionRule(NamedTuple):
    """One product of a weight and rows.

    `weight`, `rows` and `bias` are positions of operator arguments; `dims` are the weight's dimensions (batch,
    contracted, kept), `None` where it has none; `view` brings the other operand to `[B, n, K]`; `kept` the
    output's gradient to `[B, n, N]`.
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


def _matrices(first: int, bias: int | None) -> tuple[ContractionRule, ...]:
    return (
        ContractionRule(first + 1, first, (None, 0, 1), _row_matrix, _row_matrix, bias),
        ContractionRule(first, first + 1, (None, 1, 0), _columns, _columns, None),
    )


def _batches(first: int, bias: int | None) -> tuple[ContractionRule, ...]:
    return (
        ContractionRule(first + 1, first, (0, 1, 2), _same, _same, bias),
        ContractionRule(first, first + 1, (0, 2, 1), _columns, _columns, None),
    )


def _vectors(first: int) -> tuple[ContractionRule, ...]:
    return (
        ContractionRule(first, first + 1, (None, 1, 0), _single, _single, None),
        ContractionRule(first + 1, first, (None, 0, None), _row_matrix, _vector, None),
    )


PRODUCTS: dict[str, tuple[ContractionRule, ...]] = {
    "mm": _matrices(0, None),
    "addmm": _matrices(1, 0),
    "bmm": _batches(0, None),
    "_sparse_addmm": _matrices(1, 0),
    "baddbmm": _batches(1, 0),
    "mv": _vectors(0),
    "addmv": _vectors(1),
    "dot": (
        ContractionRule(0, 1, (None, 0, None), _single, _vector),
        ContractionRule(1, 0, (None, 0, None), _single, _vector),
    ),
    "linear": (ContractionRule(1, 0, (None, 1, 0), _row_matrix, _row_matrix, 2),),
}
CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable")
EMBEDDINGS = ("embedding", "_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
COPIES = ("clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "detach_copy", "alias_copy")
OVERWRITES = ("copy_", "fill_", "zero_")
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


def locate_block(
    geometry: Geometry, dims: tuple[int | None, int, int | None], shape: Sequence[int]
) -> WeightBlock | None:
    """Find the side of the parameter of `shape` that the contraction of `geometry` runs along, or `None` if there is
    none.
    """
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
        return WeightBlock(Layout(), "right", j, max(s_k, 1), None, (i, n if s_batch == 0 else -1))
    if s_k % rest == 0 and j + s_batch * (batch - 1) + s_n * (n - 1) < rest:
        return WeightBlock(Layout(), "left", i, max(s_k // rest, 1), None, (j, n))
    return _place_batched(offset, (batch, k, n), (s_batch, s_k, s_n), shape) if len(shape) == 3 else None


def _place_batched(
    offset: int, sizes: tuple[int, int, int], strides: tuple[int, int, int], shape: Sequence[int]
) -> WeightBlock | None:
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
        return WeightBlock(layout, "right", j, max(s_k, 1), groups, (i, n))
    if s_k % shape[2] == 0 and i + s_k // shape[2] * (k - 1) < shape[1] and j + s_n * (n - 1) < shape[2]:
        return WeightBlock(layout, "left", i, max(s_k // shape[2], 1), groups, (j, n))
    return None


@dataclass(frozen=True)
class Operator:
    """What the schema of one operator says.

    `moves_shards`: it is one of those by which FSDP2 fills its parameters; `native`: it is PyTorch's own;
    `overwrites`: the positions of arguments that are written and not read (``out=``, the target of a copy).
    """

    name: str
    label: str
    is_view: bool
    writes: tuple[tuple[int, str], ...]
    composite: bool
    defaults: tuple[Any, ...]
    arguments: tuple[str, ...]
    moves_shards: bool = False
    native: bool = True
    overwrites: frozenset[int] = frozenset()

    @classmethod
    def of(cls, func: Any) -> Operator:
        """Read the schema of `func`."""
        schema = func._schema
        space, name = schema.name.split("::")
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        returned = [r.alias_info for r in schema.returns if r.alias_info is not None]
        return cls(
            name=name if space == "aten" else f"{space}.{name}",
            label=f"{space}.{name}",
            is_view=(bool(returned) and not any(info.is_write for info in returned)) or name == "_unsafe_view",
            writes=tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write),
            composite=composite and name not in PRODUCTS and name not in EMBEDDINGS and name not in CONVOLUTIONS,
            defaults=tuple(a.default_value for a in schema.arguments),
            arguments=tuple(a.name for a in schema.arguments),
            moves_shards=space == "fsdp",
            native=space == "aten",
            overwrites=frozenset(
                i
                for i, a in enumerate(schema.arguments)
                if a.alias_info and a.alias_info.is_write and (a.kwarg_only or name in OVERWRITES)
            ),
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return all arguments in the order of the schema."""
        bound = [*args, *self.defaults[len(args) :]]
        for key, value in kwargs.items():
            bound[self.arguments.index(key)] = value
        return bound

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors that the operator writes to."""
        values = [args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes]
        return tensors_among(values)


def tensors_among(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among `values`, lists and tuples opened."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_among(value))
    return found
