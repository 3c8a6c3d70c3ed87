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
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from .parametrized import Parametrization, merge, place_of, plain_weight, register


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

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight with the addition."""
        return weight.index_add(0, self.rows, self.factor * self.up.to(weight.dtype) @ self.down.to(weight.dtype))


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
    if isinstance(factor, bool) or not (isinstance(factor, (int, float)) and isfinite(factor) and factor):
        raise OptionError(f"begin_low_rank(factor={factor!r}): expected a finite number that is not 0")
    found = {name: _addition(model, name, chosen, rank, factor) for name, chosen in rows.items()}
    drawn = [_drawn(addition.down, generator) for addition, _, _ in found.values()]
    for (name, (addition, original, chosen)), down in zip(found.items(), drawn, strict=True):
        if original is None:
            register(model, name, addition, "begin_low_rank")
        else:
            original.copy_(addition(original))
            addition.rows.copy_(chosen)
        addition.down.copy_(down)
        addition.up.zero_()
        addition.down.grad = addition.up.grad = None  # of the task before
    return [part for addition, _, _ in found.values() for part in (addition.down, addition.up)]


def merge_low_rank(model: nn.Module) -> list[str]:
    """Write every weight with its addition as a plain one that may train again; return their names."""
    return merge(model, LowRank)


def _drawn(down: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return values for `down` `[r, d]` (Xavier), drawn where `generator` is."""
    bound, device = (6 / sum(down.shape)) ** 0.5, None if generator is None else generator.device
    return torch.empty(down.shape, device=device).uniform_(-bound, bound, generator=generator)


def _addition(
    model: nn.Module, name: str, rows: Tensor, rank: int, factor: float
) -> tuple[LowRank, Tensor | None, Tensor]:
    """Return the addition of one weight, the weight below it where it has one already, and its new rows; nothing is
    changed.
    """
    module, leaf = place_of(model, name, "begin_low_rank")
    there: Any = getattr(module, "parametrizations", {})
    there = there[leaf] if leaf in there else ()
    known = there[0] if len(there) == 1 and isinstance(there[0], LowRank) else None
    weight: Tensor = plain_weight(model, name, "begin_low_rank") if known is None else there.original
    rows = torch.as_tensor(rows)
    if rows.numel() and (rows.dtype is torch.bool or rows.is_floating_point()):
        raise ShapeError(
            f"begin_low_rank: rows of '{name}' are {rows.dtype}: expected row numbers; of a mask nonzero()"
        )
    rows = rows.long()
    if weight.ndim != 2 or rows.ndim != 1:
        raise ShapeError(f"begin_low_rank: rows {tuple(rows.shape)} of '{name}' {tuple(weight.shape)}: expected [m, d]")
    named = rows.tolist()
    if not named or len(set(named)) < len(named) or min(named) < 0 or max(named) >= len(weight):
        raise ShapeError(f"begin_low_rank: rows of '{name}' are numbers of its {len(weight)} rows, each once")
    if known is None:
        return LowRank(weight, rows, rank, factor), None, rows
    if (len(rows), rank, factor) != (*known.up.shape, known.factor):
        raise ShapeError(
            f"begin_low_rank: '{name}' began with {len(known.up)} rows, rank {known.up.shape[1]} and "
            f"factor {known.factor}; keep them or merge_low_rank first"
        )
    return known, weight, rows


def summed_gradients(weights: Sequence[Tensor], loader: Iterable[Any], loss: Callable[[Any], Tensor]) -> list[Tensor]:
    """Return the sum over `loader` of the gradient of `loss(batch)` by each of `weights`, in float64.

    Weights that do not train count as well; they and their gradients are left as they were. Of a weight with an
    addition give `module.parametrizations["weight"].original`.

    Raises:
        OptionError: one of `weights` is no parameter but computed from others, or `loader` has no batches.
    """
    for number, weight in enumerate(weights):
        if not weight.is_leaf:
            raise OptionError(
                f"summed_gradients: weights[{number}] {tuple(weight.shape)} is computed from parameters (a "
                "parametrization), so that no loss would reach it; give parametrizations[...].original"
            )
    flags = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    seen = False
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in loader:
            seen = True
            for total, part in zip(sums, torch.autograd.grad(loss(batch), weights, allow_unused=True), strict=True):
                total.add_(part) if part is not None else None
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    if not seen:
        raise OptionError("summed_gradients: the loader has no batches (a generator that was read before?)")
    return sums


def leading_entries(gradient: Tensor, share: float) -> Tensor:
    """Return true for the `share` of the entries that are largest in size, booleans of the shape of `gradient`.

    Raises:
        OptionError: `share` is outside 0..1, or the gradient is not finite.
    """
    _check_finite("leading_entries", gradient)
    if not 0 <= share <= 1:
        raise OptionError(f"leading_entries(share={share!r}): expected a number in [0, 1]")
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
        OptionError: the gradient is not finite.
    """
    _check_finite("leading_heads", gradient)
    if heads < 1 or gradient.ndim != 2 or len(gradient) % (3 * heads) or not 1 <= count <= heads:
        raise ShapeError(f"leading_heads: {count} of {heads} heads of {tuple(gradient.shape)}: expected [3 h e, d]")
    numbers = torch.arange(len(gradient), device=gradient.device).view(3, heads, -1)
    scores = gradient.double().square().sum(dim=1).view(numbers.shape).sum(dim=(0, 2))
    return numbers[:, scores.topk(count).indices].flatten().sort().values


def _check_finite(verb: str, gradient: Tensor) -> None:
    """Refuse a gradient of which no part can be called the largest."""
    if not bool(gradient.isfinite().all()):
        raise OptionError(f"{verb}: the gradient {tuple(gradient.shape)} holds values that are not finite")
