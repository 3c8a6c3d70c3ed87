"""Edits from outside: weights that something else than the wrapped optimizer changed are refused by name, and weights
that have grown are announced once.
"""

from __future__ import annotations

import warnings
from math import isnan
from typing import NoReturn

import torch

from ..errors import NullSpaceWarning, ShapeError, StaleAnchorError
from ..settings import Settings
from ..subspace.growth import check_shapes
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


class GrowthNotes:
    """One line for each parameter and shape; `waiting` are those that were not said yet."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self._said: set[tuple[str, tuple[int, ...]]] = set()

    def note(self, guard: Guard) -> None:
        """Take down that the parameter of `guard` was changed and has grown, the old values in front."""
        key = guard.basis.name, tuple(guard.parameter.shape)
        if guard.grown and guard.edited and key not in self._said:
            self._said.add(key)
            self.waiting.append(_describe(guard))

    def announce(self) -> None:
        """Warn of everything noted since the last time."""
        if not self.waiting:
            return
        found, self.waiting = self.waiting, []
        more = f"; {len(found) - 3} more parameters likewise" if len(found) > 3 else ""
        text = f"{'; '.join(found[:3])}{more}. What is new is free until the next consolidation"
        warnings.warn(text, NullSpaceWarning, stacklevel=5)


def _describe(guard: Guard) -> str:
    """Return what stays kept of a parameter that has grown."""
    basis, old, new = guard.stored, guard.stored.shape, tuple(guard.parameter.shape)
    if old[1:] == new[1:]:
        return f"'{basis.name}' has grown from {old[0]} to {new[0]} rows: its first {old[0]} rows stay kept"
    text = f"'{basis.name}' has grown from {old} to {new}: its leading block {old} stays kept"
    inputs = {"right": 2, "left": 1}
    before, after = basis.layout.matrix_shape(old), basis.layout.matrix_shape(new)
    wider = any(before[inputs[side]] < after[inputs[side]] for side in basis.subspaces if side in inputs)
    return f"{text}, and old outputs where the new inputs are zero" if wider else text


def refuse_growth(guard: Guard, drift: float) -> NoReturn:
    """Refuse a parameter that has grown and does not begin with what is kept.

    Raises:
        ShapeError: always.
    """
    name = guard.basis.name
    raise ShapeError(
        f"shapes changed: '{name}' is {tuple(guard.parameter.shape)}, its basis was made for {guard.stored.shape}, and "
        f"it does not begin with what is kept (which differs by {drift:.1e}): copy the old values to the front of the "
        f"new weight; or release('{name}') to give them up"
    )
