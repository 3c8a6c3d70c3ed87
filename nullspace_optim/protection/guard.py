"""One parameter under protection: its basis and the corrections that keep it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed.collectives import all_reduce_sum_
from ..distributed.group import local_tensor
from ..errors import OptionError
from ..settings import Precision
from ..subspace.basis import Basis, Subspace
from ..subspace.growth import leading_block
from ..subspace.layout import Side
from ..subspace.linalg import complement
from ..subspace.matrix import matrix_of, relative
from ..subspace.projection import (
    anchor,
    anchor_drift,
    project_difference_,
    project_difference_complement_,
    project_gradient_,
    project_gradient_complement_,
    restore_anchor_,
    restore_rows_,
    shift_anchor_,
    subtract_coordinates_,
    yield_anchor_,
)
from ..subspace.shards import ShardView, crossing_sides, local_basis, shard_view

ROUNDING = 4.0  # units in the last place of the largest entry of a row or column


class Workspace:
    """One buffer a device and type, as large as the largest tensor that was asked for.

    What `take` returns is valid until the next call: corrections run one after another.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of `shape` with the type and device of `like`."""
        key, size = (like.device, like.dtype), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # training uses it after an evaluation
                buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(tuple(shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


@dataclass
class Guard:
    """One parameter, its basis, and what its correction needs: a workspace that guards may share.

    Of a sharded parameter `basis` is this rank's view of what is `stored`, and `across` are the sides whose coordinates
    are sums over ranks; `correct_across` serves them, and is owed to a weight that is `behind`. `members` are the
    tensors that move together: the parameter and a bias folded into it. `norms` are those of the last gradient and of
    its part in free directions, until the share was `measured`.
    """

    parameter: Tensor
    basis: Basis
    bias: Tensor | None = None
    workspace: Workspace = field(default_factory=Workspace)
    stored: Basis = field(init=False)
    part: ShardView = field(init=False)
    across: list[Subspace] = field(init=False)
    members: list[Tensor] = field(init=False)
    sharded: bool = field(init=False)
    complements: dict[Side, Tensor] = field(default_factory=dict)
    previous: list[Tensor] = field(default_factory=list)
    seen: tuple[object, ...] | None = None
    pending: bool = False
    behind: bool = False
    norms: tuple[Tensor, Tensor] | None = None
    measured: bool = False
    allowed: float = 0.0

    def __post_init__(self) -> None:
        self.members = [self.parameter] if self.bias is None else [self.parameter, self.bias]
        self.sharded = any(hasattr(member, "to_local") for member in self.members)
        self.stored = self.basis
        self.part = shard_view(self.parameter, self.basis.layout, joint=self.bias is not None)
        self.across = [] if self.basis.kept is not None else crossing_sides(self.basis, self.part)
        self.basis = local_basis(self.basis, self.part)

    @property
    def frozen(self) -> bool:
        """True if the value is kept, of a parameter that has grown that of its leading block."""
        return self.basis.kept is not None

    @property
    def grown(self) -> bool:
        """True if the parameter is larger than its basis: its leading block is protected, what is new is free."""
        return self.parameter.shape != self.stored.shape

    @property
    def immovable(self) -> bool:
        """True if the whole parameter keeps its value."""
        return self.basis.kept is not None and not self.grown

    def blocks(self, weights: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the basis is about of `weights` (of `members` unless given): leading blocks if they have grown.

        Args:
            weights: other tensors in the place of `members`.
        """
        weight, *bias = self.members if weights is None else weights
        shape = self.stored.shape
        if weight.shape == shape or len(weight.shape) != len(shape):
            return weight, bias[0] if bias else None
        groups, rows, _ = self.stored.layout.matrix_shape(shape)
        return leading_block(weight, shape), leading_block(bias[0], (groups * rows,)) if bias else None

    def mark(self) -> None:
        """Remember storage and version of every member as we left it."""
        self.seen = self._marks()

    def _marks(self) -> tuple[object, ...]:
        """Return address and version of every member; a DTensor and its block count their writes separately."""
        if self.sharded:
            return tuple(_mark(member) for member in self.members)
        if self.bias is None:
            return self.parameter.data_ptr(), self.parameter._version
        return self.parameter.data_ptr(), self.parameter._version, self.bias.data_ptr(), self.bias._version

    @property
    def edited(self) -> bool:
        """True if somebody other than the base step may have written to the parameter (or its joint bias)."""
        return self.seen is not None and self.seen != self._marks()

    def wants_difference(self, precision: Precision) -> bool:
        """True where the difference form runs: more than half of the directions kept, or low-precision products.

        Soft sides take the anchor form at any rank: their complement is no projection.
        """
        if self.across or self.part.padded:
            return False
        dense = [s for s in self.basis.subspaces.values() if s.side != "rows"]
        if self.soft and len(self.basis.subspaces) > 1:
            return False
        return bool(dense) and (precision == "fast" or any(2 * s.rank > s.dimension and s.scale is None for s in dense))

    @property
    def soft(self) -> bool:
        """True if a side lets a share of each movement through."""
        return any(subspace.scale is not None for subspace in self.basis.subspaces.values())

    def remember(self) -> None:
        """Copy the parameter (and a bias folded in) before the base moves it."""
        blocks = [local_tensor(p) for p in self.members]
        if [copy.shape for copy in self.previous] != [block.shape for block in blocks]:
            self.previous = [torch.empty_like(p, memory_format=torch.preserve_format) for p in blocks]
        for copy, block in zip(self.previous, blocks):
            copy.copy_(block)

    @property
    def unmoved(self) -> bool:
        """True if everything still is, bit for bit, what `remember` copied (waits for the device)."""
        return all(torch.equal(copy, local_tensor(p)) for copy, p in zip(self.previous, self.members))

    def correct(self, weights: Sequence[Tensor] | None = None) -> None:
        """Give the weight every kept value: anchor form on every side, `W <- W - (W U - A) U^H`, or all of it.

        `weights` are other tensors in the place of `members`: weights that the base keeps beside them.
        """
        weight, bias = self.blocks(weights)
        if self.basis.kept is not None:
            local_tensor(weight).copy_(self.basis.kept)
            return
        with matrix_of(weight, self.basis.layout, bias) as matrix:
            for subspace in self.basis.subspaces.values():
                if subspace.rank:
                    space = None if subspace.side == "rows" else self.workspace.take(subspace.anchor.shape, matrix)
                    restore_anchor_(matrix, subspace.basis, subspace.anchor, subspace.side, space)

    def restore_rows(self, weights: Sequence[Tensor]) -> None:
        """Give frozen rows of a table their values, bit for bit."""
        rows = self.basis.subspaces.get("rows")
        if rows is not None:
            weight, bias = self.blocks(weights)
            with matrix_of(weight, self.basis.layout, bias) as matrix:
                restore_rows_(matrix, rows.basis, rows.anchor)

    def yield_softly(self) -> None:
        """Anchor form of soft sides: what a step may change, anchors follow; everything else is put back.

        Anchors of all sides follow at once, at the end: until then `correct` undoes what was begun.
        """
        rows = self.basis.subspaces.get("rows")
        sides = [s for s in self.basis.subspaces.values() if s is not rows and s.rank]
        done: list[tuple[Subspace, Tensor]] = []
        weight, bias = self.blocks()
        with matrix_of(weight, self.basis.layout, bias) as matrix:
            if rows is not None:
                restore_rows_(matrix, rows.basis, rows.anchor)
            for subspace in sides:
                done.append((subspace, self._yield(matrix, subspace, done)))
            if rows is not None:  # once more, for the rounding of the others
                restore_rows_(matrix, rows.basis, rows.anchor)
        if done:
            torch._foreach_copy_([subspace.anchor for subspace, _ in done], [kept for _, kept in done])

    def _yield(self, matrix: Tensor, subspace: Subspace, done: list[tuple[Subspace, Tensor]]) -> Tensor:
        """Correct one side and return its new anchor; what it takes out of the weight is no movement of the sides that
        are `done`.
        """
        assert subspace.side != "rows"
        scale = subspace.basis.new_ones(len(subspace.ranks), subspace.basis.shape[2]).real
        scale = scale if subspace.scale is None else subspace.scale
        kept = subspace.anchor.clone()
        removed = yield_anchor_(matrix, subspace.basis, kept, scale, subspace.side)
        for other, follows in done:
            assert other.side != "rows"
            shift_anchor_(follows, other.basis, removed, subspace.basis, other.side)
        return kept

    def correct_difference(self, low_precision: torch.dtype | None) -> None:
        """Difference form on every side: only what the base just added is projected."""
        with matrix_of(self.blocks()[0], self.basis.layout) as matrix:
            before = self.basis.layout.to_matrix(self.blocks(self.previous)[0]).to(matrix.dtype)
            for subspace in self.basis.subspaces.values():
                if subspace.side == "rows":
                    restore_rows_(matrix, subspace.basis, subspace.anchor)
                elif 2 * subspace.rank > subspace.dimension and subspace.scale is None:
                    free = self._complement(subspace)
                    project_difference_complement_(matrix, before, free, subspace.side, low_precision=low_precision)
                elif subspace.rank:
                    soft = {} if subspace.scale is None else {"scale": subspace.scale, "kept": subspace.anchor}
                    project_difference_(
                        matrix, before, subspace.basis, subspace.side, low_precision=low_precision, **soft
                    )

    def _complement(self, subspace: Subspace) -> Tensor:
        if subspace.side not in self.complements:
            parts = [complement(u[:, :k]) for u, k in zip(subspace.basis, subspace.ranks)]
            free = subspace.basis.new_zeros(len(parts), subspace.size, max(p.shape[1] for p in parts))
            for group, part in enumerate(parts):
                free[group, :, : part.shape[1]] = part
            self.complements[subspace.side] = free
        return self.complements[subspace.side]

    def project_gradient(self, gradient: Tensor, *, softly: bool = True, rounding: bool = True) -> None:
        """Remove the kept directions from `gradient` (and from the gradient of a bias folded in) in place.

        ``softly=False`` leaves directions alone that are kept by part, where the update will be scaled.
        ``rounding=False`` makes zeros of entries that are rounding: adaptive optimizers would take them for a gradient.
        """
        if gradient.layout != torch.strided:
            raise OptionError(
                f"'{self.basis.name}' has a sparse gradient, which cannot be projected: "
                'use project="update" or a dense embedding'
            )
        bias = None if self.bias is None else self.bias.grad
        if self.bias is not None and bias is None:
            return
        block, bias = self.blocks([gradient] if bias is None else [gradient, bias])
        if self.frozen:
            block.zero_()
            return
        with matrix_of(block, self.basis.layout, bias) as matrix:
            sides = [*self.basis.subspaces, *(subspace.side for subspace in self.across)]
            limit = None if rounding or not matrix.numel() else rounding_of(matrix, sides)
            for subspace in self.basis.subspaces.values():
                if subspace.side == "rows":
                    matrix[0].index_fill_(0, subspace.basis, 0.0)
                elif 2 * subspace.rank > subspace.dimension and subspace.scale is None:
                    project_gradient_complement_(matrix, self._complement(subspace), subspace.side)
                elif subspace.rank:
                    scale = subspace.scale if softly or subspace.scale is None else subspace.scale.floor()
                    project_gradient_(matrix, subspace.basis, subspace.side, scale)
            for subspace in self.across:
                assert subspace.side != "rows" and self.part.shard is not None
                inside = anchor(matrix, subspace.basis, subspace.side)
                all_reduce_sum_([inside], group=self.part.shard.group)
                if subspace.scale is not None:
                    scale = subspace.scale if softly else subspace.scale.floor()
                    inside = inside * scale.to(inside.dtype).unsqueeze(-2 if subspace.side == "right" else -1)
                subtract_coordinates_(matrix, inside, subspace.basis, subspace.side)
            if limit is not None:
                mask_rounding_(matrix, limit)

    def drift(self) -> float:
        """Return the largest relative change of a kept quantity since it was anchored (0 where nothing is kept;
        NaN where one is not a number), of a sharded parameter within this rank's block.
        """
        weight, bias = self.blocks()
        if self.basis.kept is not None:
            return relative(local_tensor(weight), self.basis.kept)
        drifts = [0.0]
        with matrix_of(weight, self.basis.layout, bias, write=False) as matrix:
            for subspace in self.basis.subspaces.values():
                if subspace.rank:
                    drifts.append(float(anchor_drift(matrix, subspace.basis, subspace.anchor, subspace.side)))
        return max(drifts, key=lambda drift: (math.isnan(drift), drift))


def rounding_of(gradient: Tensor, sides: Iterable[Side]) -> Tensor:
    """Return what may be rounding in each entry of a gradient `[g, m, d]` once it is projected; 0 after an overflow.

    A product on the right rounds by the entries of its row, on the left by those of its column.
    """
    largest = gradient.new_zeros(()).real
    for side in {"right", "left"} & set(sides):
        largest = largest + gradient.abs().amax(2 if side == "right" else 1, keepdim=True)
    return ROUNDING * torch.finfo(torch.float32).eps * largest.nan_to_num(0.0, 0.0, 0.0)  # bases are in float32


def mask_rounding_(gradient: Tensor, limit: Tensor) -> None:
    """Make zeros of the entries of a projected gradient that are not above `limit` (see `rounding_of`)."""
    gradient.masked_fill_(gradient.abs() <= limit, 0)


def _mark(parameter: Tensor) -> tuple[int, ...]:
    if not hasattr(parameter, "to_local"):
        return parameter.data_ptr(), parameter._version
    held = local_tensor(parameter)
    return held.data_ptr(), held._version, parameter._version


def size_of(gradient: Tensor) -> Tensor:
    """Return the norm of this rank's block of `gradient`, in at least float32."""
    block = local_tensor(gradient)
    norm: Tensor = torch.linalg.vector_norm(block.float() if block.dtype in (torch.float16, torch.bfloat16) else block)
    return norm


def gradient_hook(guard: Guard) -> Callable[[Tensor], None]:
    """Return a hook for the gradient that accumulates in the parameter of `guard`; it does not keep the guard alive.

    A sparse gradient stays as it is: what it moves is corrected after the step.
    """
    reference = weakref.ref(guard)

    def project(parameter: Tensor) -> None:
        found = reference()
        if found is not None and parameter.grad is not None and parameter.grad.layout == torch.strided:
            with torch.no_grad():
                whole = None if found.measured else size_of(parameter.grad)
                free = parameter.grad.clone() if whole is not None and found.soft else parameter.grad
                found.project_gradient(parameter.grad, softly=False, rounding=False)
                if whole is not None:
                    if found.soft:  # the correction of the step takes the rest
                        found.project_gradient(free)
                    found.norms = whole, size_of(free)

    return project


def guard_low_precision(guard: Guard) -> torch.dtype:
    """Return the dtype of the fast products: bfloat16 (float32 for double-precision or complex weights)."""
    wide = guard.parameter.is_complex() or guard.parameter.dtype == torch.float64
    return torch.float32 if wide else torch.bfloat16
