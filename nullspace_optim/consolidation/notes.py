"""What a consolidation says beside its table: warnings that should be acted on, notes that limit the promise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..covariance.accumulator import ParameterStatistics
from ..covariance.sketch import FrequentDirections
from ..report import ParameterReport
from ..subspace.basis import Fate

NEARLY_FULL = 0.9
ENOUGH = 10


def warnings_about(model: nn.Module, forward: Any, rows: Sequence[ParameterReport]) -> Iterator[str]:
    """Yield what a user should act on: nothing protected, one tower only, parameters that are full or nearly so."""
    free = [row for row in rows if row.fate is Fate.FREE]
    silent = [row.name for row in free if row.reason.startswith("not read")]
    if len(silent) == len(rows):
        yield (
            "nothing is protected: the forward pass read none of the trained parameters "
            "(another copy of the model, or weights that were copied before?)"
        )
    clip_towers = hasattr(model, "encode_image") and hasattr(model, "encode_text")
    if silent and clip_towers and forward is None:
        yield (
            f"only one tower was run: {len(silent)} parameters are free and old image-text logits are not protected; "
            "pass forward=clip_forward(model, tokens)"
        )
    if any("uncovered" in row.reason for row in free):
        yield 'parameters that are used but cannot be protected are trained (uncovered="train"): old outputs may move'
    for row in rows:
        if row.fate is Fate.FULL:
            yield f"'{row.name}' has no free direction left and is frozen from now on"
        elif row.dimension and row.dimension - row.free >= NEARLY_FULL * row.dimension:
            yield f"'{row.name}' is nearly full: {row.rank} of {row.dimension} directions are protected"


def untrained_note(names: Sequence[str]) -> str | None:
    """Say that parameters were read that have no basis, because nothing trains them so far."""
    if not names:
        return None
    return (
        f"{len(names)} parameters were read but are not trained, so they have no basis ('{names[0]}', ...): "
        "make them trainable before this consolidation if a later task shall train them"
    )


def few_rows_note(captured: Mapping[str, ParameterStatistics], rows: Sequence[ParameterReport]) -> str | None:
    """Say that a task gave fewer than ten rows for each direction it keeps."""
    seen = {name: [int(moment.rows.sum()) for moment in found.sides.values()] for name, found in captured.items()}
    few = [(row, min(seen[row.name])) for row in rows if seen.get(row.name)]
    few = [(row, count) for row, count in few if count < ENOUGH * row.rank]
    if not few:
        return None
    row, count = few[0]
    return (
        f"{len(few)} parameters met fewer than {ENOUGH} rows for each kept direction ('{row.name}': {count} rows, "
        f"rank {row.rank}, ...): other inputs of this task may lie outside; consolidate more of its data"
    )


def sketch_note(captured: Mapping[str, ParameterStatistics]) -> str | None:
    """Say how far the second moments of wide weights may be off, by the bound of their sketches."""
    bounds = [
        (float(moment.bound.max()), name, moment.kept)
        for name, found in captured.items()
        for moment in found.sides.values()
        if isinstance(moment, FrequentDirections)
    ]
    if not bounds:
        return None
    bound, name, kept = max(bounds)
    return (
        f"{len(bounds)} wide weights were measured by sketches of {kept} rows: the second moment of no direction is "
        f"off by more than {bound:.2e} of its weight's energy ('{name}'; Frequent Directions, Ghashami et al. 2016, "
        "Theorem 1.1), and the energies kept are lower bounds"
    )


def half_precision_note(parameters: Mapping[str, Tensor]) -> str | None:
    """Say what rounding of half-precision parameters does to kept directions, and the way out."""
    coarse = [name for name, p in parameters.items() if p.dtype in (torch.bfloat16, torch.float16)]
    if not coarse:
        return None
    return (
        f"{len(coarse)} parameters are in half precision ('{coarse[0]}', ...): kept directions hold up to its "
        "rounding (relative drift 0.4 % in bfloat16, 0.05 % in float16); float32 parameters under autocast hold 1e-5"
    )


def outside_note(model: nn.Module, count: int) -> str | None:
    """Say how many tensors the optimizer trains that the model does not hold."""
    return (
        f"{count} tensors of the optimizer are not in {type(model).__name__}: they are not protected" if count else None
    )
