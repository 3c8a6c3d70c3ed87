"""Edits from outside: weights that something other than the wrapped optimizer changed are refused by name."""

from __future__ import annotations

from math import isnan

import torch

from ..errors import StaleAnchorError
from ..settings import Settings
from ..subspace.growth import check_shapes
from .growth_notes import GrowthNotes, refuse_growth
from .guard import Guard
from .sharded import drifts

STALE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-8}

FUSED = (
    "It was the original of a parametrization; if that was removed, the original is gone and the fused weight is a "
    "new weight. "
)


def accept_edit(
    guard: Guard, options: Settings, growth: GrowthNotes, *, original: bool = False, drift: float | None = None
) -> None:
    """Take a guard that was written to for our own work if it holds its anchors, and note that it has grown.

    Weights that projected gradients leave to drift are not compared. Arguments and errors are those of `refuse_edit`.
    """
    check_shapes({guard.basis.name: guard.stored}, {guard.basis.name: guard.parameter})
    compared = options.project != "gradient" or guard.frozen
    if compared:
        refuse_edit(guard, drift, original=original, fast=options.precision == "fast")
    growth.note(guard)
    if compared:
        guard.mark()


def refuse_edit(guard: Guard, drift: float | None = None, *, original: bool = False, fast: bool = False) -> None:
    """Refuse a guard that does not hold its anchors.

    `drift` is measured if it is not known; `original` is true for the original of a parametrization, `fast` where
    products are in bfloat16, whose rounding a pending correction has not removed yet.

    Raises:
        ShapeError: the parameter has shrunk, or has grown and does not begin with what is kept.
        StaleAnchorError: a kept quantity moved farther than rounding (and corrections still owed) explain.
    """
    limit = STALE.get(guard.parameter.dtype, 1e-3)
    if guard.pending:
        limit = max(limit, 1.1 * guard.allowed, STALE[torch.bfloat16] if fast else 0.0)
    if drift is None:
        drift = drifts({"": guard})[""] if guard.across else guard.drift()
    if isnan(drift):
        raise StaleAnchorError(
            f"'{guard.basis.name}' holds values that are not finite, its kept directions are lost: training "
            "diverged or it was edited; go back to an earlier checkpoint"
        )
    if not drift <= limit and guard.grown:
        refuse_growth(guard, drift)
    if not drift <= limit:
        raise StaleAnchorError(
            f"'{guard.basis.name}' was changed outside the optimizer: its kept directions moved by {drift:.1e} "
            f"(limit {limit:.0e}). {FUSED if original else ''}If the new weights are meant (load_state_dict, EMA "
            "swap, merge), call opt.reanchor() to keep them; otherwise opt.restore() puts back what was kept"
        )
