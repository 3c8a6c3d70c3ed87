"""Tables of which rows are frozen, and what is kept of their columns beside those rows.

A table `W` `[m, d]` that is looked up keeps the rows `W[i]` that were read. Where it is multiplied from the left as
well (`probabilities @ W`, a codebook, the two-sided policies) it keeps `U^H W` too. Corrections of the two do not
commute, and one after the other holds neither; so `U` loses what lies in the frozen rows, which are kept anyway.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..distributed.communicator import Communicator
from ..errors import ConsolidationError
from .basis import Subspace
from .shards import ShardView

LEAST = 1e-6  # a direction of which less lies outside the frozen rows is one of them up to rounding


def freeze_rows(matrix: Tensor, part: ShardView, counts: Tensor, chosen: Tensor, old: Subspace | None) -> Subspace:
    """Return the rows `chosen` (a mask `[m]`) of `matrix` `[1, m, d]` as a side; `counts` `[m]` tells how often each
    was read. Rows that were kept before keep the anchor they had.
    """
    index = chosen.nonzero().reshape(-1)
    anchors = part.anchor(matrix, index, "rows")
    if old is not None:
        anchors[torch.isin(index[part.holds(index)], old.basis)] = old.anchor.to(anchors)
    return Subspace(
        side="rows",
        basis=index,
        anchor=anchors,
        ranks=(len(index),),
        size=len(counts),
        spectrum=matrix.new_zeros(1, 0, dtype=torch.float32),
        energy=float(counts[chosen].sum() / counts.sum()) if counts.any() else 1.0,
    )


def overlap(left: Subspace, rows: Subspace) -> float:
    """Return the largest entry of a left side in the frozen rows: 0 where both can be held."""
    inside = left.basis[:, rows.basis].abs()
    return float(inside.max()) if inside.numel() else 0.0


def clear_of_rows(
    matrix: Tensor, part: ShardView, left: Subspace, rows: Subspace, name: str, ranks: Communicator
) -> Subspace:
    """Return the left side of the table `name` without the frozen rows: eigenvectors and eigenvalues of `P C P`.

    `C = U diag(s) U^H` is what `left` keeps (`s = 1` where it is not soft) and `P` takes the rows out. With the rows
    it keeps all that `left` kept. All `ranks` take the eigenvectors of the first.

    Raises:
        ConsolidationError: the policy tells apart which directions span which task's subspace, which are mixed here.
    """
    if not overlap(left, rows):
        return left
    if left.members is not None:
        raise ConsolidationError(
            f"'{name}' is looked up and multiplied from the left, where this policy cannot tell its tasks apart: use "
            "one that does not ask which task took which direction (Energy(), SGP())"
        )
    wide = left.basis.to(torch.complex128 if left.basis.is_complex() else torch.float64)
    if left.scale is not None:
        wide = wide * left.scale.to(wide).sqrt().unsqueeze(1)
    wide = wide.index_fill(1, rows.basis, 0.0)
    vectors, values, _ = torch.linalg.svd(wide, full_matrices=False)
    outside = values[0] > LEAST
    basis = vectors[:, :, outside].to(left.basis).index_fill(1, rows.basis, 0.0).contiguous()
    scale = None if left.scale is None else values[:, outside].square().to(left.scale)
    if scale is not None:
        scale[scale > 1 - LEAST] = 1.0
    basis, scale = ranks.broadcast_object(0, (basis, scale))
    return replace(left, basis=basis, anchor=part.anchor(matrix, basis, "left"), ranks=(basis.shape[2],), scale=scale)
