"""Checks of option values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import OptionError


def check_number(
    owner: object, option: str, value: float, low: float, high: float, *, closed: str = "", way_out: str = ""
) -> None:
    """Raise unless `low < value < high`; `closed` may hold "low" and "high" for bounds that are allowed themselves.

    Raises:
        OptionError: names the policy, the option, the value found and the allowed interval.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and (low < value < high or ("low" in closed and value == low) or ("high" in closed and value == high)):
        return
    interval = f"{'[' if 'low' in closed else '('}{low:g}, {high:g}{']' if 'high' in closed else ')'}"
    advice = f"; {way_out}" if way_out else ""
    raise OptionError(f"{type(owner).__name__}({option}={value!r}): expected a number in {interval}{advice}")


def check_choice(option: str, value: object, allowed: Sequence[object], *, owner: str = "") -> None:
    """Raise unless `value` is one of `allowed`; `owner` names the class whose option it is.

    Raises:
        OptionError: names the option, the value found and those allowed.
    """
    if value not in allowed:
        found = f"{owner}({option}={value!r})" if owner else f"{option}={value!r}"
        raise OptionError(f"{found}: expected one of {', '.join(map(repr, allowed))}")
