"""How the command line writes names, sizes and numbers: one line, no control characters, units."""

from __future__ import annotations

import sys


def escape_what_the_terminal_cannot_show() -> None:
    """Let both streams write escapes for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
