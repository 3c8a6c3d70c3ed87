"""Texts and paths: no machine's folders, a fixed top level, one test command."""

from __future__ import annotations

import os
import re

from sources import ROOT, label, tracked

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


def test_no_path_or_package_index_of_one_machine() -> None:
    hits = []
    for path in tracked():
        if path.suffix in TEXT:
            text = path.read_text(encoding="utf-8", errors="replace")
            hits += [f"{label(path)}: {found.group()}" for found in FOREIGN.finditer(text)]
    assert not hits


def test_the_top_level_is_fixed() -> None:
    allowed = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    allowed |= {"nullspace_optim", "reference", "tests", "notebooks", "docs", "mkdocs.yml"}
    found = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in found if not name.startswith(".")} <= allowed


def test_the_test_command_stands_in_the_readme_alone() -> None:
    commands = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "-m pytest" in line]
    assert len(commands) == 1 and 'pip install -e ".[reference,dev]"' in commands[0]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script and "pytest -" not in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
