"""``verify``: whether weights still keep what a basis file protects."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BasisFileError, OptionError, ShapeError
from ..files.basis_file import load
from ..formatting import plain, scientific, table
from ..protection.edits import ROUNDED
from ..protection.guard import Guard
from ..subspace.basis import Basis, BasisStore
from ..subspace.growth import contains
from ..verification.verify import moved_buffers
from .command import add, add_names, expression, renamer
from .weights import Weights

EXACT = 1e-5
EXAMPLES = """
python -m nullspace_optim verify bases.safetensors model.safetensors
python -m nullspace_optim verify bases.safetensors checkpoints/step-4000 --tolerance 1e-3
python -m nullspace_optim verify bases.safetensors model.safetensors --rename '^visual[.]' vision.
python -m nullspace_optim verify bases.safetensors vision.safetensors --only '^visual[.]'
"""


@dataclass(frozen=True)
class Line:
    """One parameter: its relative drift and what rounding of its dtype explains."""

    basis: Basis
    drift: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """True if the drift is within the tolerance (NaN is not)."""
        return self.drift <= self.tolerance


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add(
        commands,
        "verify",
        run,
        summary="compare weights with the anchors of a basis file",
        description="Compare every kept direction, frozen value and buffer of a basis file with weights: the relative\n"
        "drift ||W U - A|| / ||A|| of each parameter, largest first.",
        examples=EXAMPLES,
        found="a parameter or a buffer has moved by more than the tolerance",
    )
    parser.add_argument("file", metavar="BASES", type=Path, help="a file written by opt.save()")
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        type=Path,
        help="a safetensors file, or a folder with some (open_clip, transformers)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="largest relative drift that counts as kept (1e-5, or what rounds in bfloat16: 2^-8, in float16: 2^-11)",
    )
    add_names(parser, "the weights")


def run(options: argparse.Namespace) -> int:
    """Print the drift of every parameter; 1 if one is beyond the tolerance."""
    if options.tolerance is not None and not options.tolerance >= 0:
        raise OptionError(f"--tolerance {options.tolerance}: expected a number in [0, inf)")
    store = load(options.file)
    weights = Weights(options.weights, renamer(options.rename))
    lines = measure(_chosen(store, options.only), weights, options.tolerance)
    known = BasisStore()
    known.buffers = {name: buffer for name, buffer in store.buffers.items() if name in weights}
    moved = moved_buffers(known, {name: weights[name] for name in known.buffers})
    rows = [
        [plain(line.basis.name), line.basis.fate.value, scientific(line.drift), "" if line.holds else "MOVED"]
        for line in sorted(lines, key=lambda line: (isnan(line.drift), line.drift), reverse=True)
    ]
    print(table(["parameter", "fate", "drift", ""], rows))
    for name in moved:
        print(f"buffer {plain(name)} MOVED")
    broken = sum(not line.holds for line in lines) + len(moved)
    absent = len(store.buffers) - len(known.buffers)
    note = f" ({absent} buffers are not in the weights)" if absent else ""
    print(f"\n{len(lines) + len(known.buffers) - broken} kept, {broken} moved{note}")
    return 1 if broken else 0


def _chosen(store: BasisStore, only: str | None) -> list[Basis]:
    """Return the bases that keep something and match ``--only``."""
    pattern = expression(only or "", "--only")
    kept = [basis for basis in store.values() if basis.kept is not None or basis.subspaces]
    found = [basis for basis in kept if pattern.search(basis.name)]
    if not found:
        raise BasisFileError(f"nothing to verify: {len(kept)} parameters are kept, none matches --only {only!a}")
    return found


@torch.no_grad()
def measure(bases: list[Basis], weights: Mapping[str, Tensor], tolerance: float | None = None) -> list[Line]:
    """Return the drift of every basis in `weights`; `tolerance` is that of the weight's dtype if not given.

    Raises:
        BasisFileError: weights of some bases are missing.
        ShapeError: a weight has another shape than its basis and does not begin with what is kept.
    """
    wanted = [name for basis in bases for name in (basis.name, basis.bias) if name is not None]
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise BasisFileError(
            f"the weights lack {len(missing)} of {len(wanted)} parameters that the bases keep ({missing[0]!a}, ...); "
            f"they hold {', '.join(map(ascii, list(weights)[:3])) or 'nothing'}, ...: match the names with --rename, "
            "or check a part with --only"
        )
    return [_line(basis, weights, tolerance) for basis in bases]


def _line(basis: Basis, weights: Mapping[str, Tensor], tolerance: float | None) -> Line:
    weight = weights[basis.name]
    guard = Guard(weight, basis, weights[basis.bias] if basis.bias else None)
    limit = ROUNDED.get(weight.dtype, EXACT) if tolerance is None else tolerance
    fits = contains(weight.shape, basis.shape)
    drift = guard.drift() if fits else nan
    if not fits or (guard.grown and not drift <= limit):
        raise ShapeError(
            f"{basis.name!a} is {tuple(weight.shape)} in the weights, its basis was made for {basis.shape}; "
            "give the weights of the model that the bases were made with"
        )
    return Line(basis, drift, limit)
