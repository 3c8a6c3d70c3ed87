"""Output streams of the command line."""

from __future__ import annotations

import sys


def escape_what_the_terminal_cannot_show() -> None:
    """Write escapes for characters that the encoding of a stream lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
