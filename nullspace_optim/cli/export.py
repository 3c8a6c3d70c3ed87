"""``export``: a basis file renamed or cut down into a new one."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import BasisFileError, OptionError
from ..files.basis_file import load, save
from ..files.rename import rename_store, restrict_store
from ..formatting import plain, size
from .command import add, add_names, expression, renamer

EXAMPLES = """
python -m nullspace_optim export renamed.safetensors bases.safetensors --rename '^visual[.]' vision_tower.
python -m nullspace_optim export vision.safetensors bases.safetensors --only '^visual[.]'
"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add(
        commands,
        "export",
        run,
        summary="rename or cut down a basis file into a new one",
        description="Write a basis file for a model whose parameters have other names, or for a part of the model.\n"
        "What is kept stays bit for bit.",
        examples=EXAMPLES,
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write; it must not be the other one")
    parser.add_argument("file", metavar="FILE", type=Path, help="a file written by opt.save()")
    add_names(parser, "the file's parameters")


def run(options: argparse.Namespace) -> int:
    """Write the new file and print its content in one line."""
    if options.target.exists() and options.file.exists() and options.target.samefile(options.file):
        raise OptionError(f"{str(options.target)!a} is the file to read; write to another name")
    rename, only = renamer(options.rename), expression(options.only or "", "--only")
    store = restrict_store(rename_store(load(options.file), rename), lambda name: only.search(name) is not None)
    if not store and store.extension is None:
        raise BasisFileError(f"nothing to export: no parameter matches --only {options.only!a}")
    save(store, options.target)
    tasks = ", ".join(plain(task.get("name", "unnamed")) for task in store.tasks) or "none"
    print(f"{plain(options.target)}: {len(store)} parameters, {size(options.target.stat().st_size)}; tasks: {tasks}")
    return 0
