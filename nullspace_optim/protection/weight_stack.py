"""Many small weights of one shape, corrected in one product a side.

A small correction costs the calls around it, not its arithmetic. Weights of one shape, dtype and device whose ranks
are close are copied into one stack `[n g, m, d]`, corrected together and copied back. Bases and anchors are stacked
once, padded with zero columns, which protect nothing. Large weights gain nothing and stay alone. In a stack the anchor
form is cheap at any rank, so its weights owe nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..subspace.basis import Subspace
from ..subspace.projection import MatrixSide, restore_anchor_
from .guard import Guard
from .workspace import Workspace

FEWEST = 4  # fewer weights of a shape gain little
LARGEST = 64 * 64  # entries of a weight; above, copies cost more than calls (measured on one core)


class WeightStack:
    """Guards of one kind with their bases and anchors, stacked."""

    def __init__(self, guards: list[Guard], workspace: Workspace) -> None:
        first = guards[0]
        self.guards, self.workspace = guards, workspace
        self.shape = first.basis.layout.matrix_shape(first.parameter.shape)
        sides = [_dense(guard) for guard in guards]
        self.sides = [_stacked([one[number] for one in sides]) for number in range(len(sides[0]))]

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked bases and anchors."""
        return sum(tensor.nbytes for _, *tensors in self.sides for tensor in tensors)

    def correct(self, moved: Collection[int]) -> None:
        """Anchor form on every side of the guards that `moved` (by identity): `W <- W - (W U - A) U^H`; others stay
        bitwise.
        """
        chosen = [guard for guard in self.guards if id(guard) in moved]
        if not chosen:
            return
        _, outputs, inputs = self.shape
        weights = torch.stack([guard.parameter.detach() for guard in self.guards])
        matrix = weights.reshape(-1, outputs, inputs)
        matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        biases = [guard.bias.detach() for guard in self.guards if guard.bias is not None]
        if biases:
            column = torch.stack(biases).to(matrix.dtype).reshape(-1, outputs, 1)
            matrix = torch.cat([matrix, column], dim=2)
        for side, basis, anchor in self.sides:
            restore_anchor_(matrix, basis, anchor, side, self.workspace.take(anchor.shape, matrix))
        new = matrix[:, :, :inputs].reshape(weights.shape).unbind()
        pairs = [(guard.parameter.detach(), one) for guard, one in zip(self.guards, new) if id(guard) in moved]
        if biases:
            new = matrix[:, :, -1].reshape(len(biases), *biases[0].shape).unbind()
            pairs += [(old, one) for guard, old, one in zip(self.guards, biases, new) if id(guard) in moved]
        torch._foreach_copy_([old for old, _ in pairs], [one for _, one in pairs])
        for guard in chosen:
            guard.pending = False


def stack_alike(guards: Iterable[Guard], workspace: Workspace) -> list[WeightStack]:
    """Return stacks of the guards that can be corrected together, `FEWEST` or more at a time."""
    kinds: dict[Hashable, list[Guard]] = {}
    for guard in guards:
        if _can_be_stacked(guard):
            kinds.setdefault(_kind(guard), []).append(guard)
    return [WeightStack(members, workspace) for members in kinds.values() if len(members) >= FEWEST]


def _dense(guard: Guard) -> list[Subspace]:
    return [subspace for subspace in guard.basis.subspaces.values() if subspace.rank]


def _can_be_stacked(guard: Guard) -> bool:
    """Return True for a small whole weight with strict sides."""
    if guard.frozen or guard.grown or guard.sharded or guard.basis.layout.kind == "transposed":
        return False
    sides = _dense(guard)
    strict = bool(sides) and all(side.side != "rows" and side.scale is None for side in sides)
    return strict and guard.parameter.numel() <= LARGEST


def _kind(guard: Guard) -> Hashable:
    """Return what weights of one stack have in common; ranks up to the same power of two."""
    weight = guard.parameter
    sides = tuple((side.side, _bucket(side.basis.shape[-1])) for side in _dense(guard))
    bias = None if guard.bias is None else (guard.bias.dtype, guard.bias.shape)
    return weight.shape, guard.basis.layout, weight.dtype, weight.device, bias, sides


def _bucket(rank: int) -> int:
    """Return the power of two, 8 or more, up to which ranks share a stack."""
    return max(8, 1 << (rank - 1).bit_length())


def _stacked(sides: list[Subspace]) -> tuple[MatrixSide, Tensor, Tensor]:
    """Return the side, the bases `[n g, s, k]` and the anchors of several weights, padded to the largest rank."""
    side, dtype = sides[0].side, sides[0].anchor.dtype
    assert side != "rows"
    widest = max(s.basis.shape[-1] for s in sides)
    with torch.inference_mode(False), torch.no_grad():
        missing = [widest - s.basis.shape[-1] for s in sides]
        bases = [pad(s.basis.to(dtype), (0, n)) for s, n in zip(sides, missing)]
        edges = [(0, n) if side == "right" else (0, 0, 0, n) for n in missing]
        return side, torch.cat(bases), torch.cat([pad(s.anchor, edge) for s, edge in zip(sides, edges)])
