"""``diff``: what two basis files have in common, parameter by parameter."""

from __future__ import annotations

import argparse
from math import degrees, isnan
from pathlib import Path

import torch

from ..errors import OptionError
from ..files.basis_file import load
from ..files.compare import Comparison, SideComparison, compare_stores
from ..files.rename import rename_store
from ..formatting import plain, scientific, table
from ..subspace.basis import BasisStore
from .command import add, add_names, expression, renamer

EXAMPLES = """
python -m nullspace_optim diff after-task-1.safetensors after-task-2.safetensors
python -m nullspace_optim diff mine.safetensors theirs.safetensors --tolerance 1e-3
"""
HEADER = ["parameter", "fate", "side", "rank", "angle", "shared", "anchors", "difference"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add(
        commands,
        "diff",
        run,
        summary="compare two basis files: ranks, principal angles, anchors",
        description="Compare two basis files parameter by parameter: ranks, the largest principal angle between the\n"
        "spans in degrees, how many directions both keep, the relative difference of the anchors on those, and what\n"
        "only one of the files has.",
        examples=EXAMPLES,
        found="the files differ in a parameter, a task or a buffer",
    )
    parser.add_argument("first", metavar="FIRST", type=Path, help="a file written by opt.save()")
    parser.add_argument("second", metavar="SECOND", type=Path, help="another one")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="SIZE",
        help="angle in radians and relative difference that count as none (default 1e-4)",
    )
    add_names(parser, "the first file")


def run(options: argparse.Namespace) -> int:
    """Print the comparison; 1 if anything differs."""
    if not options.tolerance >= 0:
        raise OptionError(f"--tolerance {options.tolerance}: expected a number in [0, inf)")
    first, second = (load(path) for path in (options.first, options.second))
    rename, only = renamer(options.rename), expression(options.only or "", "--only")
    first = rename_store(first, rename)
    found = [one for one in compare_stores(first, second, options.tolerance) if only.search(one.name)]
    if options.only and not found:
        raise OptionError(f"nothing to compare: no parameter matches --only {options.only!a}")
    rows = [row for one in found for row in _rows(one)]
    if rows:
        print(table(HEADER, rows) + "\n")
    apart = [*_tasks(first, second), *_buffers(first, second)]
    print("\n".join(apart) + "\n" if apart else "", end="")
    differing = sum(bool(one.notes) for one in found)
    print(f"{len(found) - differing} parameters agree, {differing} differ")
    return 1 if differing or apart else 0


def _rows(one: Comparison) -> list[list[str]]:
    """Return one line a side, or one for a parameter without sides."""
    fates = [fate or "-" for fate in one.fates]
    fate = fates[0] if fates[0] == fates[1] else " -> ".join(fates)
    note = "; ".join(one.notes)
    if not one.sides:
        return [[plain(one.name), fate, "", "", "", "", scientific(one.kept), note]]
    lines = [[plain(one.name), fate, *_side(side), ""] for side in one.sides]
    lines[0][-1] = note
    return lines


def _side(side: SideComparison) -> list[str]:
    ranks = str(side.ranks[0]) if side.ranks[0] == side.ranks[1] else f"{side.ranks[0]} -> {side.ranks[1]}"
    angle = "" if isnan(side.angle) else f"{degrees(side.angle):.2g}°"
    return [side.side, ranks, angle, str(side.shared), scientific(side.anchors)]


def _tasks(first: BasisStore, second: BasisStore) -> list[str]:
    mine, theirs = ([str(task.get("name")) for task in store.tasks] for store in (first, second))
    return [
        *(f"task {plain(name)} is only in the first file" for name in mine if name not in theirs),
        *(f"task {plain(name)} is only in the second file" for name in theirs if name not in mine),
    ]


def _buffers(first: BasisStore, second: BasisStore) -> list[str]:
    lines = []
    for name in dict.fromkeys([*first.buffers, *second.buffers]):
        one, other = first.buffers.get(name), second.buffers.get(name)
        if one is None or other is None:
            lines.append(f"buffer {plain(name)} is only in the {'second' if one is None else 'first'} file")
        elif one.shape != other.shape or not torch.equal(one, other.to(one.dtype)):
            lines.append(f"buffer {plain(name)} differs")
    return lines
