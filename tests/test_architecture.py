"""Rules that no single test of behaviour can see: who imports whom, how long things are, what must never appear."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nullspace_optim"
MODULES = sorted(PACKAGE.rglob("*.py"))
REFERENCE = sorted((ROOT / "reference").rglob("*.py"))
MOST_STATEMENTS = 50
MOST_LINES = 400

# From the bottom up: a room (a folder, or a module of the first level) imports only rooms of lower floors.
FLOORS: list[list[str]] = [
    ["errors", "formatting"],
    ["options", "distributed"],
    ["model", "subspace"],
    ["clip", "covariance", "files", "plots", "policies", "protection", "report"],
    ["capture"],
    ["verification"],
    ["consolidation"],
    ["optimizer"],
    ["igsp", "integrations", "methods"],
    ["planning"],
    ["cli"],
    ["__init__", "__main__"],
]
FLOOR = {room: height for height, floor in enumerate(FLOORS) for room in floor}
MOST_FILES = 9  # in one room, beside its `__init__`


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """Return the first name below the package: `policies` for each file of that folder."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def dotted(path: Path) -> str:
    """Return the name under which `path` is imported, without `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(path: Path, nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the dotted names of the package that `nodes` of `path` import."""
    folder = path.relative_to(ROOT).parent.parts
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*folder[: len(folder) + 1 - node.level], *filter(None, [node.module])] if node.level else [node.module]
            )
            names = [".".join([*map(str, base), alias.name]) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "nullspace_optim")


def imported(path: Path) -> Iterator[str]:
    """Yield the rooms that `path` imports."""
    for parts in (name.split(".") for name in imported_names(path, ast.walk(tree_of(path)))):
        yield parts[1] if len(parts) > 1 and _is_module(parts[1]) else "__init__"


def imported_files(path: Path) -> Iterator[str]:
    """Yield the modules that `path` imports when it is loaded."""
    modules = {dotted(p) for p in MODULES}
    for name in imported_names(path, tree_of(path).body):
        found = name if name in modules else name.rpartition(".")[0]
        if found != dotted(path):
            yield found


def _is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_run_strictly_downward(path: Path) -> None:
    room = module_of(path)
    assert room in FLOOR, f"give '{room}' a place in FLOORS"
    for other in imported(path):
        assert FLOOR[other] < FLOOR[room] or other == room, f"{label(path)} must not import {other}"


def test_no_module_imports_itself_through_others() -> None:
    edges = {dotted(path): set(imported_files(path)) for path in MODULES}
    while free := [module for module, others in edges.items() if not others]:
        edges = {module: others - set(free) for module, others in edges.items() if module not in free}
    assert not edges, f"a cycle runs through {sorted(edges)}"


def test_rooms_are_small() -> None:
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) <= 26
    for room in {path.parent for path in MODULES} - {PACKAGE, PACKAGE / "policies"}:
        files = [p.name for p in room.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{label(room)} holds {sorted(files)}"


@pytest.mark.parametrize("path", REFERENCE, ids=label)
def test_the_reference_uses_only_public_names(path: Path) -> None:
    public = set(ast.literal_eval(_assigned(tree_of(PACKAGE / "__init__.py"), "__all__")))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("nullspace_optim.") for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nullspace_optim":
            room = (node.module or "").partition(".")[2]
            assert room in ("", "policies", "methods", "clip", "igsp", "errors"), ast.unparse(node)
            assert room or {alias.name for alias in node.names} <= public | {"__version__"}, ast.unparse(node)
            assert not any(alias.name.startswith("_") and alias.name != "__version__" for alias in node.names)


def _assigned(tree: ast.Module, name: str) -> ast.expr:
    return next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)


UNSAFE = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "os.system", "torch.hub.load"}
UNSAFE_CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_CALLS |= {"torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle", "runpy.run_path"}


@pytest.mark.parametrize("path", MODULES + REFERENCE, ids=label)
def test_nothing_is_unpickled_or_executed(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in UNSAFE_CALLS, ast.unparse(node)
            shells = [k for k in node.keywords if k.arg == "shell"]
            assert all(ast.unparse(k.value) == "False" for k in shells), ast.unparse(node)
            weak = [k for k in node.keywords if k.arg in ("weights_only", "trust_remote_code")]
            assert all(ast.unparse(k.value) == str(k.arg == "weights_only") for k in weak), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            assert not {alias.name for alias in node.names} & {"load", "hub", "package"}, ast.unparse(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert not names & UNSAFE, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert safe.get("weights_only") == "True", ast.unparse(node)
        elif isinstance(node, ast.Call) and any(k.arg == "allow_pickle" for k in node.keywords):
            assert "allow_pickle=False" in ast.unparse(node), ast.unparse(node)


@pytest.mark.parametrize("path", MODULES + REFERENCE, ids=label)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{label(path)} has {lines} lines; split it"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            count = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            assert count <= MOST_STATEMENTS, f"{label(path)}: {node.name} has {count} statements"


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_everything_public_is_documented(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{label(path)} has no docstring"
    setters = (".setter", ".deleter", "overload")
    for name, node in _public(tree.body):
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if not any(ast.unparse(decorator).endswith(setters) for decorator in node.decorator_list):
            assert ast.get_docstring(node), f"{label(path)}: {name} has no docstring"


# Written in pieces, so that this file is not found by its own test.
FOREIGN = re.compile(
    "|".join(
        [
            r"(?<![\w.])/wo" + "rk/",
            r"(?<![\w.])/op" + "t/",
            r"(?<![\w.])/ho" + r"me/\w",
            r"(?<![\w.])/ro" + "ot/",
            r"(?<![\w.])/Us" + r"ers/\w",
            "fi" + "le:///",
            "py" + r"pi\.org",
            "python" + r"hosted\.org",
            "download" + r"\.pytorch\.org",
            "--(extra-)?index" + "-url",
        ]
    )
)
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".ipynb", ".json", ".txt", ".cfg", ".sh", ""}


def _tracked() -> list[Path]:
    try:
        found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / os.fsdecode(name) for name in found.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file()]


def test_no_path_or_package_index_of_one_machine() -> None:
    hits = []
    for path in _tracked():
        if path.suffix in TEXT:
            text = path.read_text(encoding="utf-8", errors="replace")
            hits += [f"{label(path)}: {found.group()}" for found in FOREIGN.finditer(text)]
    assert not hits


def test_the_top_level_is_fixed() -> None:
    allowed = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    allowed |= {"nullspace_optim", "reference", "tests", "notebooks", "docs", "mkdocs.yml"}
    found = {path.relative_to(ROOT).parts[0] for path in _tracked()}
    assert {name for name in found if not name.startswith(".")} <= allowed


def test_the_test_command_stands_in_the_readme_alone() -> None:
    commands = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "-m pytest" in line]
    assert len(commands) == 1 and 'pip install -e ".[reference,dev]"' in commands[0]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script and "pytest -" not in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_one_room_talks_to_torch_distributed(path: Path) -> None:
    if module_of(path) != "distributed" and label(path) != "nullspace_optim/optimizer/dcp.py":
        assert "torch.distributed" not in {
            ".".join(name.split(".")[:2])
            for node in ast.walk(tree_of(path))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        }
