"""Command line: ``python -m nullspace_optim inspect | verify | diff | export | plan``, one module a command.

Exit codes: 0 all is well, 1 a drift or a difference was found, 2 wrong usage or a file that cannot be read or does not
fit (one line on standard error, never a traceback). Names from files are printed escaped; no file is ever unpickled.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import NullSpaceError
from . import diff, export, inspect, plan, verify
from .command import CODES, LAYOUT
from .streams import escape_what_the_terminal_cannot_show

EXAMPLES = """\
examples:
  python -m nullspace_optim inspect bases.safetensors
  python -m nullspace_optim verify bases.safetensors model.safetensors
  python -m nullspace_optim diff before.safetensors after.safetensors
  python -m nullspace_optim export vision.safetensors bases.safetensors --only '^visual[.]'
  python -m nullspace_optim plan --model ViT-bigG-14 --devices 8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` defaults to those of the process."""
    options = _parser().parse_args(arguments)
    escape_what_the_terminal_cannot_show()
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NullSpaceError, OSError, ImportError) as error:
        print(f"nullspace_optim: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m nullspace_optim",
        description="Look into the basis files that opt.save() writes, check weights against them, and plan.",
        epilog=f"{EXAMPLES}\n{CODES.format(found='a drift or a difference was found (verify, diff)')}",
        formatter_class=LAYOUT,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (inspect, verify, diff, export, plan):
        module.register(commands)
    return parser
