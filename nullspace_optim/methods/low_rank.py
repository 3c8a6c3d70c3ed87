"""Low-rank additions to chosen rows of a weight: a LoRA of keys and values alone (MG-CLIP), or of a few heads (LoRSU).

`W' = W + c B A` on the rows `rows` of a weight `[m, d]`, with `A` `[r, d]` drawn (Xavier) and `B` `[len(rows), r]` zero
at first, so `W' = W`. The packed projection of torch's attention, `in_proj_weight` `[3 h e, d]`, holds the queries of
all `h` heads, then their keys, then their values, `e` rows a head.

`summed_gradients`, `leading_entries` and `leading_heads` are the selection of LoRSU (arXiv 2502.04098): what trains is
what the summed, signed gradient of a new task is largest for. The released code draws the factor on the side of the
outputs and begins the other with zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from .parametrized import Parametrization, merge, plain_weight, register


class LowRank(Parametrization):
    """The parametrization of one weight `[m, d]`: `down` is `A` `[r, d]`, `up` is `B` `[n, r]`, for `n` rows."""

    rows: Tensor
    unfinished = "merge_low_rank(model)"  # before `consolidate`

    def __init__(self, weight: Tensor, rows: Tensor, rank: int, factor: float) -> None:
        super().__init__(weight)
        self.factor = factor
        self.register_buffer("rows", rows.to(weight.device))
        self.down = nn.Parameter(weight.new_zeros(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(len(rows), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the addition."""
        return weight.index_add(0, self.rows, (self.factor * self.up @ self.down).to(weight.dtype))


@torch.no_grad()
def begin_low_rank(
    model: nn.Module,
    rows: Mapping[str, Tensor],
    rank: int,
    *,
    factor: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Add `factor B A` to the given rows `[n]` of each weight from now on; return what trains, `A` and `B` of each.

    `rows` has row numbers by the weight's name. The weights themselves no longer train until `merge_low_rank`. Where
    one has an addition already, that is written into the weight and begins anew on the new rows, as many as before:
    the parameters stay the same ones, for the same optimizer.

    Raises:
        OptionError: a name is unknown, or its weight is tied or has another parametrization; the rank is below 1.
        ShapeError: a weight is not `[m, d]`, rows are none of its own or named twice, or another number than before.
    """
    if type(rank) is not int or rank < 1:
        raise OptionError(f"begin_low_rank(rank={rank!r}): expected a whole number of at least 1")
    found = {name: _addition(model, name, chosen, rank, factor) for name, chosen in rows.items()}
    for name, (addition, original) in found.items():
        if original is None:
            register(model, name, addition)
        else:
            original.copy_(addition(original))
            addition.rows.copy_(rows[name])
        bound = (6 / sum(addition.down.shape)) ** 0.5
        drawn = torch.empty(addition.down.shape).uniform_(-bound, bound, generator=generator)
        addition.down.copy_(drawn)
        addition.up.zero_()
    return [part for addition, _ in found.values() for part in (addition.down, addition.up)]


def merge_low_rank(model: nn.Module) -> list[str]:
    """Write every weight with its addition as a plain one that may train again; return their names."""
    return merge(model, LowRank)


def _addition(model: nn.Module, name: str, rows: Tensor, rank: int, factor: float) -> tuple[LowRank, Tensor | None]:
    """Return the addition of one weight and, where it has one already, the weight below it; nothing is changed."""
    path, _, leaf = name.rpartition(".")
    chain = getattr(model.get_submodule(path), "parametrizations", {})
    there = chain[leaf] if leaf in chain else None
    known: LowRank | None = None
    if there is not None and len(there) == 1 and isinstance(there[0], LowRank):
        known, weight = there[0], there.original
    else:
        weight = plain_weight(model, name, "begin_low_rank")
    rows = torch.as_tensor(rows)
    if weight.ndim != 2 or rows.ndim != 1 or rows.is_floating_point():
        raise ShapeError(f"begin_low_rank: rows {tuple(rows.shape)} of '{name}' {tuple(weight.shape)}: expected [m, d]")
    named = rows.tolist()
    if not named or len(set(named)) < len(named) or min(named) < 0 or max(named) >= len(weight):
        raise ShapeError(f"begin_low_rank: rows of '{name}' are numbers of its {len(weight)} rows, each once")
    if known is None:
        return LowRank(weight, rows, rank, factor), None
    if (len(rows), rank, factor) != (*known.up.shape, known.factor):
        raise ShapeError(
            f"begin_low_rank: '{name}' began with {len(known.up)} rows, rank {known.up.shape[1]} and "
            f"factor {known.factor}; keep them or merge_low_rank first"
        )
    return known, weight


def summed_gradients(weights: Sequence[Tensor], loader: Iterable[Any], loss: Callable[[Any], Tensor]) -> list[Tensor]:
    """Return the sum over `loader` of the gradient of `loss(batch)` by each of `weights`, in float64.

    Weights that do not train count as well; they and their gradients are left as they were.
    """
    flags = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in loader:
            for total, part in zip(sums, torch.autograd.grad(loss(batch), weights, allow_unused=True), strict=True):
                total.add_(part) if part is not None else None
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return sums


def leading_entries(gradient: Tensor, share: float) -> Tensor:
    """Return true for the `share` of the entries that are largest in size, booleans of the shape of `gradient`."""
    chosen = gradient.abs().flatten().topk(round(share * gradient.numel())).indices
    return (
        torch.zeros(gradient.numel(), dtype=torch.bool, device=gradient.device)
        .index_fill(0, chosen, True)
        .view_as(gradient)
    )


def leading_heads(gradient: Tensor, heads: int, count: int) -> Tensor:
    """Return the rows of queries, keys and values of the `count` heads with the largest squared gradient `[3 h e, d]`.

    `count * 3 e` row numbers, ascending.

    Raises:
        ShapeError: the rows cannot be shared by `3 heads`, or there are fewer than `count`.
    """
    if gradient.ndim != 2 or len(gradient) % (3 * heads) or not 1 <= count <= heads:
        raise ShapeError(f"leading_heads: {count} of {heads} heads of {tuple(gradient.shape)}: expected [3 h e, d]")
    numbers = torch.arange(len(gradient), device=gradient.device).view(3, heads, -1)
    scores = gradient.double().square().sum(dim=1).view(numbers.shape).sum(dim=(0, 2))
    return numbers[:, scores.topk(count).indices].flatten().sort().values
