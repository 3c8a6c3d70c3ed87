"""``inspect``: tasks, ranks and sizes of a basis file."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import OptionError
from ..files.basis_file import load
from ..files.schema import tensors_of
from ..formatting import plain, size, table
from ..subspace.basis import Basis, BasisStore
from .command import add

EXAMPLES = """
python -m nullspace_optim inspect bases.safetensors
python -m nullspace_optim inspect bases.safetensors --plot bases.png
python -m nullspace_optim inspect bases.safetensors | less
"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add(
        commands,
        "inspect",
        run,
        summary="print tasks, ranks and sizes of a basis file",
        description="Check a basis file completely and print its tasks, one line a parameter, and totals.",
        examples=EXAMPLES,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a file written by opt.save()")
    parser.add_argument("--plot", metavar="IMAGE", type=Path, help="also draw capacity and spectra (png, pdf or svg)")


def run(options: argparse.Namespace) -> int:
    """Print what the file holds."""
    store = load(options.file)
    sections = [_heading(store, options.file), _tasks(store), _parameters(store), _totals(store)]
    print("\n\n".join(filter(None, sections)))
    if options.plot is not None:
        from ..plots import overview

        try:
            overview(store).savefig(options.plot)
        except ValueError as error:
            raise OptionError(f"--plot {plain(options.plot)}: {error}") from error
    return 0


def _heading(store: BasisStore, path: Path) -> str:
    counts = f"{len(store)} parameters, {len(store.tasks)} tasks, {size(path.stat().st_size)}"
    return f"{plain(path)}: {counts}, all digests match"


def _tasks(store: BasisStore) -> str:
    lines = []
    for place, task in enumerate(store.tasks, start=1):
        notes = [f", {plain(key)} {plain(value)}" for key, value in task.items() if key != "name" and _printable(value)]
        lines.append(f"task {place}: {plain(task.get('name', 'unnamed'))}" + "".join(notes))
    return "\n".join(lines)


def _parameters(store: BasisStore) -> str:
    places = {str(task.get("name")): str(place) for place, task in enumerate(store.tasks, start=1)}
    rows = [row for basis in store.values() for row in _rows(basis, places)]
    return table(["parameter", "fate", "side", "rank", "energy", "tasks or reason"], rows) if rows else ""


def _rows(basis: Basis, places: Mapping[str, str]) -> list[list[str]]:
    """Return one line a side, or one with the reason for a parameter that has none."""
    name, fate = plain(basis.name), basis.fate.value
    if not basis.subspaces:
        return [[name, fate, "", "", "", plain(basis.reason)]]
    tasks = ",".join(places.get(task, plain(task)) for task in basis.tasks)
    return [
        [name, fate, side, f"{subspace.rank}/{subspace.dimension}", f"{subspace.energy:.4%}", tasks]
        for side, subspace in basis.subspaces.items()
    ]


def _totals(store: BasisStore) -> str:
    fates = Counter(basis.fate.value for basis in store.values())
    sides = [subspace for basis in store.values() for subspace in basis.subspaces.values()]
    tables = [subspace for subspace in sides if subspace.side == "rows"]
    used = [subspace for subspace in sides if subspace.side != "rows"]
    rank, dimension = sum(s.rank for s in used), sum(s.dimension for s in used)
    lines = [f"parameters: {', '.join(f'{count} {fate}' for fate, count in fates.items()) or 'none'}"]
    if dimension:
        lines.append(f"directions: {rank} of {dimension} used ({rank / dimension:.1%})")
    if tables:
        lines.append(f"rows of tables: {sum(s.rank for s in tables)} of {sum(s.dimension for s in tables)} frozen")
    kinds: Counter[str] = Counter()
    for key, tensor in tensors_of(store):
        kinds[key.split("/")[0] if key.startswith(("buffer/", "probe/")) else key.split("/")[-1]] += tensor.nbytes
    lines.append("tensors: " + (", ".join(f"{kind} {size(count)}" for kind, count in kinds.most_common()) or "none"))
    return "\n".join(lines)


def _printable(value: object) -> bool:
    return isinstance(value, (str, int, float))
