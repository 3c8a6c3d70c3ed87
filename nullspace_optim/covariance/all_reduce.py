"""Statistics of all ranks joined, and second moments summed over ranks, once a consolidation.

A sum travels to one rank only, its owner, which will diagonalise it; owners share the cubic work evenly. Weights that
shared a second moment on every rank go on sharing one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed import collectives, group
from ..subspace.layout import Layout
from .accumulator import Moment, StatisticsAccumulator, WeightSide
from .second_moment import SecondMoment
from .sketch import FrequentDirections

Key = tuple[str, WeightSide]
Shape = tuple[int, int, int, torch.dtype]  # groups, size, rows of the sketch (0: none), dtype


@dataclass
class Summary:
    """Statistics of one rank without the sums: `moments` numbers the one that each weight's side has met."""

    order: list[str]
    reasons: dict[str, list[str]]
    layouts: dict[str, Layout]
    partners: dict[str, dict[str | None, str]]
    looked_up: dict[str, Tensor]
    moments: dict[Key, int]
    declared: set[str] = field(default_factory=set)
    shapes: list[Shape] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


def reduce_statistics(tally: StatisticsAccumulator, device: torch.device) -> None:
    """Join the statistics of all ranks in `tally`; sums are complete on their owners."""
    if group.world_size() == 1:
        return
    mine, local = _summarised(tally)
    told = collectives.all_gather_object(mine)
    whole = _united(told)
    classes = _classes(told)
    owners = _owners([_shape(told, numbers)[1] for numbers in classes])
    moments: dict[Key, Moment] = {}
    sums: dict[int, list[Moment]] = {}
    for (numbers, keys), owner in zip(classes.items(), owners, strict=True):
        index = numbers[group.rank()]
        moment = _empty(_shape(told, numbers), device) if index is None else local[index]
        if index is not None and sum(other[group.rank()] == index for other in classes) > 1:
            moment = moment.clone()
        moment.widen(_shape(told, numbers)[3])
        moment.rows = torch.stack([told[r].rows[i] for r, i in enumerate(numbers) if i is not None]).sum(0)
        moment.owner = owner
        sums.setdefault(owner, []).append(moment)
        moments.update(dict.fromkeys(keys, moment))
    for owner, owned in sums.items():
        _send(owned, owner)
    tally.replace(
        order=whole.order,
        reasons={name: dict.fromkeys(texts) for name, texts in whole.reasons.items()},
        layouts=whole.layouts,
        partners=whole.partners,
        looked_up={name: counts.to(device) for name, counts in whole.looked_up.items()},
        moments=moments,
        declared=whole.declared,
    )


def _send(moments: Sequence[Moment], owner: int) -> None:
    """Add the sums of all ranks up on `owner`; the others let go of theirs."""
    whole = [moment for moment in moments if isinstance(moment, SecondMoment)]
    collectives.all_reduce_sum_([part for moment in whole for part in moment.parts()], owner)
    for sketch in (moment for moment in moments if isinstance(moment, FrequentDirections)):
        for number, factor in enumerate(collectives.gather(sketch.factor, owner)):
            if number != owner:
                sketch.join(factor, torch.zeros_like(sketch.squares), torch.zeros_like(sketch.lost))
        collectives.all_reduce_sum_([sketch.squares, sketch.lost])
    if group.rank() != owner:
        for moment in moments:
            moment.discard()


def _summarised(tally: StatisticsAccumulator) -> tuple[Summary, list[Moment]]:
    """Return the summary of `tally` and its distinct second moments, in the order of their numbers."""
    state = tally.state()
    local = list({id(moment): moment for moment in state["moments"].values()}.values())
    numbers = {id(moment): number for number, moment in enumerate(local)}
    summary = Summary(
        order=list(state["order"]),
        reasons={name: list(texts) for name, texts in state["reasons"].items()},
        layouts=dict(state["layouts"]),
        partners=dict(state["partners"]),
        looked_up={name: counts.cpu() for name, counts in state["looked_up"].items()},
        moments={key: numbers[id(moment)] for key, moment in state["moments"].items()},
        declared=set(state["declared"]),
        shapes=[_shape_of(moment) for moment in local],
        rows=[moment.rows for moment in local],
    )
    return summary, local


def _united(told: Sequence[Summary]) -> Summary:
    """Join summaries in the order of the ranks."""
    whole = Summary([], {}, {}, {}, {}, {})
    order: dict[str, None] = {}
    for summary in told:
        order.update(dict.fromkeys(summary.order))
        whole.declared |= summary.declared
        for name, texts in summary.reasons.items():
            whole.reasons.setdefault(name, []).extend(texts)
        for name, layout in summary.layouts.items():
            known = whole.layouts.setdefault(name, layout)
            if known != layout:
                text = f"used with two layouts ({known.kind} and {layout.kind})"
                whole.reasons.setdefault(name, []).append(text)
        for name, partners in summary.partners.items():
            whole.partners.setdefault(name, {}).update(partners)
        for name, counts in summary.looked_up.items():
            whole.looked_up[name] = whole.looked_up[name] + counts if name in whole.looked_up else counts
    whole.order = list(order)
    return whole


def _classes(told: Sequence[Summary]) -> dict[tuple[int | None, ...], list[Key]]:
    """Group the sides of weights by the second moments they have met on each rank (`None`: not met there)."""
    keys: dict[Key, None] = {}
    for summary in told:
        keys.update(dict.fromkeys(summary.moments))
    classes: dict[tuple[int | None, ...], list[Key]] = {}
    for key in keys:
        classes.setdefault(tuple(summary.moments.get(key) for summary in told), []).append(key)
    return {numbers: keys for numbers, keys in classes.items() if _alike(told, numbers)}


def _alike(told: Sequence[Summary], numbers: Sequence[int | None]) -> bool:
    """Return whether all ranks saw the same shape; where not, the layouts differ and the weight is refused anyway."""
    return len({told[r].shapes[i][:3] for r, i in enumerate(numbers) if i is not None}) == 1


def _shape(told: Sequence[Summary], numbers: Sequence[int | None]) -> Shape:
    """Return the shape of a second moment from the first rank that has it, with the widest type of all ranks."""
    shapes = [told[r].shapes[i] for r, i in enumerate(numbers) if i is not None]
    return *shapes[0][:3], functools.reduce(torch.promote_types, (shape[3] for shape in shapes))


def _shape_of(moment: Moment) -> Shape:
    return moment.groups, moment.size, moment.kept if isinstance(moment, FrequentDirections) else 0, moment.dtype


def _empty(shape: Shape, device: torch.device) -> Moment:
    groups, size, kept, dtype = shape
    if kept:
        return FrequentDirections(groups, size, kept, dtype=dtype, device=device)
    return SecondMoment(groups, size, dtype=dtype, device=device)


def _owners(sizes: Sequence[int]) -> list[int]:
    """Assign every second moment to a rank, largest first, so that the cubic work is spread evenly."""
    loads = [0] * group.world_size()
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index] ** 3 + 1
    return owners


def union_over_ranks(names: set[str]) -> set[str]:
    """Return all names that are in the set of any rank."""
    return set().union(*collectives.all_gather_object(names))
