"""``export``: basis files merged, renamed, cut down or cast into a new one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import BasisFileError, OptionError
from ..files.basis_file import load, save
from ..files.merge import cast, merged, renamed, restricted
from ..formatting import plain, size
from ..subspace.basis import Basis, BasisStore
from .command import add, add_names, expression, renamer
from .verify import measure
from .weights import Weights

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
EXAMPLES = """
python -m nullspace_optim export merged.safetensors vision.safetensors text.safetensors
python -m nullspace_optim export merged.safetensors task-a.safetensors task-b.safetensors --weights model.safetensors
python -m nullspace_optim export renamed.safetensors bases.safetensors --rename '^visual[.]' vision_tower.
python -m nullspace_optim export vision.safetensors bases.safetensors --only '^visual[.]'
python -m nullspace_optim export double.safetensors bases.safetensors --dtype float64
"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add(
        commands,
        "export",
        run,
        summary="merge, rename, cut down or cast basis files into a new one",
        description="Write a basis file that keeps whatever the given files keep. Files that keep different values of\n"
        "the same directions come from different weights and are refused. Directions that are kept by a share (SGP,\n"
        "CODE-CL, OWM) are merged so that none is kept less. Experts of iGSP can be renamed, not merged. A cast to\n"
        "bfloat16 or float16 is refused: rounded bases no longer keep what they were made to keep.",
        examples=EXAMPLES,
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write; it must not be one of the others")
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="files written by opt.save()")
    parser.add_argument(
        "--weights",
        metavar="WEIGHTS",
        type=Path,
        help="the weights that all files were made with (safetensors): merged anchors are taken from them",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="cast anchors and kept values; half precision is refused, with the reason",
    )
    add_names(parser, "the files' parameters")


def run(options: argparse.Namespace) -> int:
    """Write the new file and say what is in it."""
    if any(_same(options.target, file) for file in options.files):
        raise OptionError(f"{str(options.target)!a} is one of the files to read; write to another name")
    rename, only = renamer(options.rename), expression(options.only or "", "--only")
    stores = [restricted(renamed(load(file), rename), _matches(only)) for file in options.files]
    weights = Weights(options.weights) if options.weights is not None else None
    for file, store in zip(options.files, stores):
        moved = [line for line in measure(_kept(store), weights) if not line.holds] if weights else []
        if moved:
            raise BasisFileError(
                f"{str(file)!a} was not made with these weights: {moved[0].basis.name!a} has moved by "
                f"{moved[0].drift:.1e}; run 'verify' for all"
            )
    store = stores[0]
    for file, other in zip(options.files[1:], stores[1:]):
        store = merged(store, other, file.stem, weights.__getitem__ if weights else None)
    if not store and store.extension is None:
        raise BasisFileError(f"nothing to export: no parameter matches --only {options.only!a}")
    if options.dtype is not None:
        store = cast(store, DTYPES[options.dtype])
    save(store, options.target)
    tasks = ", ".join(plain(task.get("name", "unnamed")) for task in store.tasks) or "none"
    parts = (part for one in stores for basis in one.values() for part in basis.subspaces.values())
    if len(stores) > 1 and any(part.members is not None for part in parts):
        print("note: which directions belong to which task (TRGP) is not kept by a merge, where tasks share directions")
    print(f"{plain(options.target)}: {len(store)} parameters, {size(options.target.stat().st_size)}; tasks: {tasks}")
    return 0


def _matches(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda name: pattern.search(name) is not None


def _kept(store: BasisStore) -> list[Basis]:
    return [basis for basis in store.values() if basis.kept is not None or basis.subspaces]


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
