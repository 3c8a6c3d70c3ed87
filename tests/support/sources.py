"""Source files of the repository, and what the rules of the house read from them."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nullspace_optim"
MODULES = sorted(PACKAGE.rglob("*.py"))
REFERENCE = sorted((ROOT / "reference").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def tracked() -> list[Path]:
    try:
        found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / os.fsdecode(name) for name in found.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file()]
