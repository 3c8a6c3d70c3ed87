"""Command line: ``python -m nullspace_optim inspect FILE``.

Exit codes: 0 done, 1 a file or a library is missing or bad (one line on standard error), 2 wrong usage. Names from
files are printed escaped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from .basis import Basis, BasisStore
from .errors import NullSpaceError, OptionError
from .persistence import load
from .report import table
from .schema import tensors_of

EXAMPLES = """\
examples:
  python -m nullspace_optim inspect bases.safetensors
  python -m nullspace_optim inspect bases.safetensors --plot bases.png
  python -m nullspace_optim inspect bases.safetensors | less
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` defaults to those of the process."""
    options = _parser().parse_args(arguments)
    _escape_what_the_terminal_cannot_show()
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NullSpaceError, OSError, ImportError) as error:
        print(f"nullspace_optim: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m nullspace_optim",
        description="Look into the basis files that opt.save() writes.",
        epilog=EXAMPLES,
        formatter_class=layout,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="print tasks, ranks and sizes of a basis file",
        description="Check a basis file completely and print its tasks, one line a parameter, and totals.",
        epilog=EXAMPLES,
        formatter_class=layout,
    )
    inspect.add_argument("file", metavar="FILE", type=Path, help="a file written by opt.save()")
    inspect.add_argument("--plot", metavar="IMAGE", type=Path, help="also draw capacity and spectra (png, pdf or svg)")
    inspect.set_defaults(run=_inspect)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    store = load(options.file)
    sections = [_heading(store, options.file), _tasks(store), _parameters(store), _totals(store)]
    print("\n\n".join(filter(None, sections)))
    if options.plot is not None:
        from .plots import overview

        try:
            overview(store).savefig(options.plot)
        except ValueError as error:
            raise OptionError(f"--plot {_text(options.plot)}: {error}") from error
    return 0


def _heading(store: BasisStore, path: Path) -> str:
    counts = f"{len(store)} parameters, {len(store.tasks)} tasks, {_bytes(path.stat().st_size)}"
    return f"{_text(path)}: {counts}, all digests match"


def _tasks(store: BasisStore) -> str:
    lines = []
    for place, task in enumerate(store.tasks, start=1):
        notes = [f", {_text(key)} {_text(value)}" for key, value in task.items() if key != "name" and _plain(value)]
        lines.append(f"task {place}: {_text(task.get('name', 'unnamed'))}" + "".join(notes))
    return "\n".join(lines)


def _parameters(store: BasisStore) -> str:
    places = {str(task.get("name")): str(place) for place, task in enumerate(store.tasks, start=1)}
    rows = [row for basis in store.values() for row in _rows(basis, places)]
    return table(["parameter", "fate", "side", "rank", "energy", "tasks or reason"], rows) if rows else ""


def _rows(basis: Basis, places: Mapping[str, str]) -> list[list[str]]:
    """Return one line a side, or one with the reason for a parameter that has none."""
    name, fate = _text(basis.name), basis.fate.value
    if not basis.subspaces:
        return [[name, fate, "", "", "", _text(basis.reason)]]
    tasks = ",".join(places.get(task, _text(task)) for task in basis.tasks)
    return [
        [name, fate, side, f"{subspace.rank}/{subspace.dimension}", f"{subspace.energy:.4%}", tasks]
        for side, subspace in basis.subspaces.items()
    ]


def _totals(store: BasisStore) -> str:
    fates = Counter(basis.fate.value for basis in store.values())
    used = [subspace for basis in store.values() for subspace in basis.subspaces.values()]
    rank, dimension = sum(s.rank for s in used), sum(s.dimension for s in used)
    lines = [f"parameters: {', '.join(f'{count} {fate}' for fate, count in fates.items()) or 'none'}"]
    if dimension:
        lines.append(f"directions: {rank} of {dimension} used ({rank / dimension:.1%})")
    kinds: Counter[str] = Counter()
    for key, tensor in tensors_of(store):
        kinds[key.split("/")[0] if key.startswith(("buffer/", "probe/")) else key.split("/")[-1]] += tensor.nbytes
    lines.append("tensors: " + (", ".join(f"{kind} {_bytes(size)}" for kind, size in kinds.most_common()) or "none"))
    return "\n".join(lines)


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _text(value: object) -> str:
    """Return `value` on one line, control characters escaped."""
    text = str(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


def _escape_what_the_terminal_cannot_show() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
