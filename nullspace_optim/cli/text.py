"""How the command line writes names, sizes and numbers: one line, no control characters, units."""

from __future__ import annotations

import sys
from math import isnan


def plain(value: object) -> str:
    """Return `value` on one line, control characters escaped."""
    text = str(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(count: float) -> str:
    """Return a number of bytes with its unit (powers of 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def operations(count: float) -> str:
    """Return a number of FLOPs with its unit (powers of 1000)."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} PFLOP"


def scientific(value: float) -> str:
    """Return a small number as ``1.2e-07``, an empty string for none (NaN)."""
    return "" if isnan(value) else f"{value:.1e}"


def escape_what_the_terminal_cannot_show() -> None:
    """Let both streams write escapes for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
