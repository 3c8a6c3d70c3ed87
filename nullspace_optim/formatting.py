"""Text: aligned tables, bytes, FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import isnan


def plain(value: object) -> str:
    """Return `value` on one line, control characters escaped."""
    text = str(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(count: float, digits: int = 4, byte: str = "bytes") -> str:
    """Return a number of bytes with its unit (powers of 1000); single ones are written out as `byte`."""
    for unit in (byte, "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{digits}g} {unit}"
        count /= 1000
    return f"{count:.{digits}g} TB"


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


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return `rows` under `header` as aligned text, first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return `rows` under `header` as an HTML table."""
    lines = [("th", header), *(("td", row) for row in rows)]
    body = "".join("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>" for tag, row in lines)
    return f"<table>{body}</table>"


def name_some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, quoted, with dots where there are more."""
    return ", ".join(f"'{name}'" for name in names[:most]) + (", ..." if len(names) > most else "")
