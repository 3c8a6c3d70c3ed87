"""Several parameters on one memory: they are one weight, and what one of them met, all of them met.

A tied autoencoder sets `dec.weight.data = enc.weight.data.t()`: two parameters, each with its own gradient and its own
steps, move the same numbers. Every name gets the statistics in its own shape, so each is protected (or frozen) alone,
whichever of them is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..covariance.accumulator import Moment, ParameterStatistics, WeightSide
from ..distributed.group import local_tensor
from ..model.storage import storage_pointer
from ..subspace.layout import Layout

_OTHER: dict[WeightSide, WeightSide] = {"right": "left", "left": "right"}


def shared_statistics(group: Mapping[str, tuple[ParameterStatistics, Tensor]]) -> dict[str, ParameterStatistics]:
    """Return what is known of each parameter of a `group` that overlaps in memory; frozen where shapes do not agree."""
    met = [name for name, (seen, _) in group.items() if seen.met]
    if not met:
        return {}
    first, weight = group[met[0]]
    if len(met) == 1 and not first.reasons:
        found = {name: seen_as(first, weight, other) for name, (_, other) in group.items()}
        if all(found.values()):
            return {name: seen for name, seen in found.items() if seen is not None}
    reasons = {}
    for name, (seen, _) in group.items():
        others = ", ".join(f"'{other}'" for other in group if other != name)
        reasons[name] = replace(seen, met=True, reasons=(*seen.reasons, f"shares its memory with {others}"))
    return reasons


def seen_as(seen: ParameterStatistics, weight: Tensor, other: Tensor) -> ParameterStatistics | None:
    """Return what was `seen` of `weight` in the shape of `other`; `None` if they are not the same matrices."""
    layout = seen.layout or Layout()
    matrix = layout.to_matrix(local_tensor(weight).detach())
    for choice in dict.fromkeys((layout, Layout(), Layout("batched"))):
        try:
            stack = choice.to_matrix(local_tensor(other).detach())
        except (RuntimeError, IndexError):
            continue
        if _same_elements(stack, matrix):
            return replace(seen, layout=choice)
        if _same_elements(stack.mT, matrix) and seen.row_index is None and not matrix.is_complex():
            sides: dict[WeightSide, Moment] = {_OTHER[side]: moment for side, moment in seen.sides.items()}
            return replace(seen, layout=choice, sides=sides)
    return None


def _same_elements(one: Tensor, other: Tensor) -> bool:
    """Return whether two views of one storage hold the same elements in the same order."""
    places = [(storage_pointer(t), t.storage_offset(), t.dtype, t.shape) for t in (one, other)]
    steps = [[step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (one, other)]
    return places[0] == places[1] and steps[0] == steps[1]
