"""Public names and signatures, frozen in `tests/public_names.txt`: a change of them is a line in the changelog.

`python tests/contract/test_public_names.py --write` writes the file anew.
"""

from __future__ import annotations

import difflib
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nullspace_optim
from nullspace_optim import Policy

ROOT = Path(__file__).resolve().parents[2]
FROZEN = ROOT / "tests" / "public_names.txt"
MODULES = [
    "nullspace_optim",
    *(f"nullspace_optim.{name}" for name in ("policies", "methods", "clip", "igsp", "errors", "plots", "integrations")),
]


def public(module: Any) -> list[str]:
    """Return the names that `module` lists, or without a list those that it defines."""
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__ and callable(value)
    ]
    return sorted(getattr(module, "__all__", defined))


def parameters(value: Any) -> str:
    """Return the parameters of a callable without their types."""
    signature = inspect.signature(value)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def members(kind: type) -> Iterator[str]:
    """Yield what a class has beside its constructor's arguments and the members of `Policy`, with their parameters."""
    owners = [owner for owner in reversed(kind.__mro__) if owner.__module__.startswith("nullspace_optim")]
    found = {name: value for owner in owners for name, value in vars(owner).items() if not name.startswith("_")}
    known = {*inspect.signature(kind).parameters, *(vars(Policy) if kind is not Policy else ())}
    for name, value in sorted(found.items()):
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if name not in known:
            yield f"{name}{parameters(value)}" if inspect.isfunction(value) else name


def described(name: str, value: Any) -> Iterator[str]:
    """Yield the lines of one public name."""
    if inspect.isclass(value) and issubclass(value, Exception):
        yield f"  {name}({', '.join(base.__name__ for base in value.__bases__)})"
    elif inspect.isclass(value) and issubclass(value, enum.Enum):
        yield f"  {name}: {', '.join(member.name for member in value)}"
    elif inspect.isclass(value):
        yield f"  {name}{parameters(value)}"
        yield from (f"    .{line}" for line in members(value))
    else:
        yield f"  {name}{parameters(value)}"


def listing() -> str:
    """Return all public names, module by module, one a line; what an earlier module has is named only."""
    lines, seen = [], set[int]()
    for module in MODULES:
        lines.append(f"{module}:")
        loaded = importlib.import_module(module)
        for name in public(loaded):
            value = getattr(loaded, name)
            lines += [f"  {name}"] if id(value) in seen else described(name, value)
            seen.add(id(value))
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_the_frozen_ones() -> None:
    frozen = FROZEN.read_text(encoding="utf-8")
    apart = list(difflib.unified_diff(frozen.splitlines(), listing().splitlines(), "frozen", "now", n=0, lineterm=""))
    assert not apart, "\n".join(
        ["the public names have changed: say it in CHANGELOG.md and run this file with --write", *apart]
    )


def test_about_twenty_names_stand_at_the_top() -> None:
    assert len(nullspace_optim.__all__) <= 24
    assert len(set(nullspace_optim.__all__)) == len(nullspace_optim.__all__)


LISTED = re.findall(r"^::: (nullspace_optim[.\w]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
FRAMEWORKS = {"avalanche", "axolotl", "lightning", "transformers"}


@pytest.mark.parametrize("path", LISTED)
def test_every_name_on_the_api_page_exists(path: str) -> None:
    if path.split(".")[1] == "integrations" and (package := path.split(".")[2]) in FRAMEWORKS:
        pytest.importorskip(package)
    module, _, name = path.rpartition(".")
    if not hasattr(importlib.import_module(module), name):
        importlib.import_module(path)


def test_every_public_name_stands_on_the_api_page() -> None:
    shown = {path.rpartition(".")[2] for path in LISTED}
    loaded = [importlib.import_module(f"nullspace_optim.{name}") for name in ("policies", "methods", "igsp", "errors")]
    assert {name for module in (nullspace_optim, *loaded) for name in public(module)} <= shown


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FROZEN.write_text(listing(), encoding="utf-8")
    print(listing(), end="")
