"""Parameters that have grown since they were anchored: said once each, or refused where old values are gone."""

from __future__ import annotations

import warnings
from typing import NoReturn

from ..errors import NullSpaceWarning, ShapeError
from .guard import Guard


class GrowthNotes:
    """One line for each parameter and shape, until it was said."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._said: set[tuple[str, tuple[int, ...]]] = set()

    def note(self, guard: Guard) -> None:
        """Take down that the parameter of `guard` was changed and has grown, the old values in front."""
        key = guard.basis.name, tuple(guard.parameter.shape)
        if guard.grown and guard.edited and key not in self._said:
            self._said.add(key)
            self._waiting.append(_describe(guard))

    def announce(self) -> None:
        """Warn of everything noted since the last time."""
        if not self._waiting:
            return
        found, self._waiting = self._waiting, []
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
