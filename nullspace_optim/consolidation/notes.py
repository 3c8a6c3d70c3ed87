"""Warnings of a consolidation, which ask for action, and notes, which limit what was promised. One line a kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..covariance.accumulator import ParameterStatistics
from ..covariance.second_moment import SecondMoment
from ..covariance.sketch import FrequentDirections
from ..formatting import name_some
from ..policies.base import Policy
from ..report import ParameterReport, still_share
from ..settings import Settings, is_sketchable
from ..subspace.basis import BasisStore, Fate

NEARLY_FULL = 0.9
ENOUGH = 10
MASSIVE = 0.99
WIDE = 4096
WAYS_OUT = "lower the policy's threshold, prune(), or release() a name"


def warnings_about(
    model: nn.Module, forward: Any, rows: Sequence[ParameterReport], task: str, store: BasisStore, policy: Policy
) -> Iterator[str]:
    """Yield what a user should act on: what was not read, what can no longer learn, what the threshold cuts off.

    `rows` are the lines of the report of `task`, `store` the bases after it.
    """
    unmet = [row.name for row in rows if not row.met]
    if len(unmet) == len(rows):
        yield (
            f"nothing of '{task}' is protected: the forward pass read none of the trained parameters (another copy of "
            "the model, merged adapters, or weights that were copied before?)"
        )
    clip_towers = hasattr(model, "encode_image") and hasattr(model, "encode_text")
    if unmet and clip_towers and forward is None:
        yield (
            f"only one tower was run: {len(unmet)} parameters were not read by '{task}', so its image-text logits are "
            "not protected; pass forward=clip_forward(model, tokens)"
        )
    if any("uncovered" in row.reason for row in rows if row.fate is Fate.FREE):
        yield 'parameters that are used but cannot be protected are trained (uncovered="train"): old outputs may move'
    if not policy.from_weights:
        yield from _about_inputs(rows)
    yield from _about_room(rows, task)
    gates = [row.name for row in rows if _is_closed_gate(row, store)]
    if gates:
        yield (
            f"{len(gates)} factors of activations are all zero and frozen ({name_some(gates)}): what they gate stays "
            'off for good; release() them, or use uncovered="train"'
        )


def _about_inputs(rows: Sequence[ParameterReport]) -> Iterator[str]:
    """Yield what the task's inputs leave unprotected."""
    weights = [row for row in rows if row.met and row.dimension]
    if weights and not any(row.rank for row in weights):
        yield f"no input row of any of the {len(weights)} weights counts: nothing of this task is protected"
    massive = [row for row in weights if row.leading >= MASSIVE and row.energy < 1 - 1e-9 and row.dimension > 1]
    if massive:
        row = massive[0]
        yield (
            f"one direction holds over {MASSIVE:.0%} of the energy of {len(massive)} weights ('{row.name}': "
            f"{row.leading:.2%}, rank {row.rank} of {row.dimension}): inputs of ordinary size are cut off by an energy "
            "threshold; use NumericalRank(), or scale the inputs"
        )


def _about_room(rows: Sequence[ParameterReport], task: str) -> Iterator[str]:
    """Yield what can learn no longer, or hardly."""
    share = still_share(rows)
    if share > 0.5:
        numbers: dict[str, int] = {}
        for row in rows:
            if row.still:
                reason = row.reason if row.fate in (Fate.FROZEN, Fate.FULL) else "rows of a table that are kept"
                numbers[reason] = numbers.get(reason, 0) + row.still
        reason = max(numbers, key=lambda name: numbers[name])
        yield f"{share:.0%} of the trained numbers are frozen from now on, most of them because: {reason}"
    full = [row.name for row in rows if row.fate is Fate.FULL and row.reason.endswith(f"after task '{task}'")]
    if full:
        names = name_some(full)
        yield f"{len(full)} weights have no free direction left and are frozen from now on ({names}): {WAYS_OUT}"
    close = [
        row for row in rows if row.fate is Fate.PROTECTED and row.added and _used(row) >= NEARLY_FULL * row.dimension
    ]
    if close:
        row = max(close, key=lambda row: _used(row) / row.dimension)
        names = name_some([row.name for row in close])
        yield (
            f"{len(close)} weights are nearly full ({names}; '{row.name}': {row.rank} of {row.dimension} directions "
            f"are protected): {WAYS_OUT}"
        )


def _used(row: ParameterReport) -> int:
    return row.dimension - row.free


def _is_closed_gate(row: ParameterReport, store: BasisStore) -> bool:
    """Return whether a parameter is a factor of activations, frozen while it is zero."""
    kept = store[row.name].kept if row.met and row.fate is Fate.FROZEN and "aten.mul" in row.reason else None
    return kept is not None and kept.numel() > 0 and not bool(kept.any())


def weights_note(policy: Policy) -> str:
    """Say that a policy that looks at weights promises nothing for outputs."""
    return (
        f"{type(policy).__name__} keeps directions of the weights and looks at no sample: old outputs may move; "
        "Energy() and its like keep them"
    )


def coverage_note(loader: Any, samples: int | None, dataset: int | None) -> str | None:
    """Say that samples of the data set were not seen: dropped, or drawn with replacement."""
    sampler = getattr(loader, "sampler", None)
    if getattr(sampler, "replacement", False):
        return (
            f"the loader draws {samples} of {dataset} samples with replacement: samples that were not drawn are not "
            "protected; consolidate with a loader that reads each sample once"
        )
    if samples is None or dataset is None or samples >= dataset:
        return None
    return (
        f"{samples} of the {dataset} samples of the data set were seen (drop_last, max_batches or a sampler): the "
        "others are not protected; consolidate with a loader that reads each sample once"
    )


def untrained_note(names: Sequence[str]) -> str | None:
    """Say that parameters were read that have no basis, because nothing trains them so far."""
    if not names:
        return None
    return (
        f"{len(names)} parameters were read but are not trained, so they have no basis ('{names[0]}', ...): "
        "make them trainable before this consolidation if a later task shall train them"
    )


def unrun_note(failed: Mapping[str, str]) -> str | None:
    """Say that the model cannot run samples of earlier tasks any more, with the error of one."""
    if not failed:
        return None
    task, error = next(iter(failed.items()))
    return (
        f"the drift of {name_some(list(failed))} was not measured: the model no longer runs its samples as they were "
        f"('{task}': {error[:120]}); verify(loader, forward=) compares them in a form that it runs"
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


def wide_note(captured: Mapping[str, ParameterStatistics], options: Settings) -> str | None:
    """Say that sketches would replace the largest decompositions, where the policy can be served by them."""
    wide = [
        (moment.size, name)
        for name, found in captured.items()
        for moment in found.sides.values()
        if isinstance(moment, SecondMoment) and moment.size > WIDE and moment.factor is None
    ]
    if not wide or not is_sketchable(options.policy):
        return None
    size, name = max(wide)
    return (
        f"{len(wide)} weights have more than {WIDE} inputs ('{name}': {size}), whose decompositions take most of the "
        f"time: covariance=SketchedCovariance(above={WIDE}) replaces them, with a bound of the error in this report"
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
