"""The script of the reference stays small and runs without studies, published tables and benchmarks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ("data", "training", "methods", "evaluation")
BESIDE = ("studies", "published", "benchmarks")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports from the reference, modules and their names alike."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reference"):
            found |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("reference")}
    return found


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / "reference" / folder).rglob("*.py"))]


def loaded_by(module: str) -> set[Path]:
    """Files that importing `module` loads, packages on the way included."""
    found: set[Path] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        place = ROOT / name.replace(".", "/")
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if path.is_file() and path not in found:
            found.add(path)
            todo += [*imported(path), name.rpartition(".")[0]]
    return found


def lines(paths: set[Path]) -> int:
    """Lines of the files that are not empty."""
    return sum(bool(line.strip()) for path in paths for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    "path",
    [*modules(*SCRIPT), *sorted((ROOT / "reference").glob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_script_never_imports_what_stands_beside_it(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[1:2] and name.split(".")[1] in BESIDE}


def test_the_script_stays_below_4000_lines_and_all_of_it_below_8000() -> None:
    script, whole = loaded_by("reference.run"), set(modules("."))
    assert ROOT / "reference" / "methods" / "igsp.py" in script and script < whole
    assert lines(script) <= 4000 and lines(whole) <= 8000
