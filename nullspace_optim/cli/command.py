"""Parts that all commands share: a subparser, and the options for names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from ..errors import OptionError

Run = Callable[[argparse.Namespace], int]

LAYOUT = argparse.RawDescriptionHelpFormatter
CODES = "exit codes:\n  0 all is well\n  1 {found}\n  2 wrong usage, or a file that cannot be read or does not fit"


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Run,
    *,
    summary: str,
    description: str,
    examples: str,
    found: str = "",
) -> argparse.ArgumentParser:
    """Add a command and return its parser; `found` is the meaning of exit code 1 (empty: it never happens)."""
    codes = CODES.format(found=found) if found else CODES.replace("\n  1 {found}", "")
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{lines}\n\n{codes}",
        formatter_class=LAYOUT,
    )
    parser.set_defaults(run=run)
    return parser


def add_names(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--rename`` and ``--only``, which change and choose the names of `what`."""
    parser.add_argument(
        "--rename",
        nargs=2,
        action="append",
        default=[],
        metavar=("PATTERN", "REPLACEMENT"),
        help=f"replace a regular expression in the names of {what}, as re.sub does; may be given several times",
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="take only parameters whose (renamed) name contains this regular expression"
    )


def renamer(pairs: list[list[str]]) -> Callable[[str], str]:
    """Return the function that applies all ``--rename`` pairs to a name, in order."""
    compiled = [(expression(pattern, "--rename"), replacement) for pattern, replacement in pairs]

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            try:
                name = pattern.sub(replacement, name)
            except (re.error, IndexError) as error:
                raise OptionError(f"--rename {pattern.pattern!a} {replacement!a}: bad replacement ({error})") from error
        return name

    return rename


def expression(pattern: str, option: str) -> re.Pattern[str]:
    """Return the compiled regular expression of an option."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{option} {pattern!a} is not a regular expression ({error})") from error
