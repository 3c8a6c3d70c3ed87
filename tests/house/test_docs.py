"""The pages: their code runs, commands parse, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nullspace_optim
from nullspace_optim import NullSpaceWarning
from nullspace_optim.cli import _parser

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# pages of one program each; others have tests of their own
EXECUTED = ["index", "exactness", "files", "migration", "policies"]


def blocks(page: Path, language: str) -> Iterator[str]:
    for found in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        yield found.group(1)


@pytest.mark.parametrize("name", EXECUTED)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": name}
    found = list(blocks(DOCS / f"{name}.md", "python"))
    assert found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullSpaceWarning)
        for number, block in enumerate(found, 1):
            exec(compile(block, f"{name}.md, block {number}", "exec"), scope)


@pytest.mark.parametrize("page", sorted((DOCS / "stacks").glob("*.md")), ids=lambda page: page.stem)
def test_the_one_example_of_a_stack_is_run_by_a_test(page: Path) -> None:
    tests = [path.read_text(encoding="utf-8") for path in (DOCS.parent / "tests" / "integrations").glob("test_*.py")]
    assert len(list(blocks(page, "python"))) == 1
    assert any(f'"{page.name}"' in text and "exec(compile(example(" in text for text in tests)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_commands_on_a_page_parse(page: Path) -> None:
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            if line.startswith("python -m nullspace_optim "):
                _parser().parse_args(shlex.split(line, comments=True)[3:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_api_page_lists_public_names_once() -> None:
    listed = re.findall(r"^::: nullspace_optim\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    named = [name for name in listed if name != "plan"]  # a module; names without a section are appended by hooks.py
    assert len(named) == len(set(named)) and set(named) <= set(nullspace_optim.__all__)


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pages need mkdocs: pip install 'nullspace-optim[docs]'")
    pytest.importorskip("material", reason="pages need mkdocs-material: pip install 'nullspace-optim[docs]'")
    pytest.importorskip("mkdocstrings", reason="pages need mkdocstrings: pip install 'nullspace-optim[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert all(f'id="nullspace_optim.{name}"' in api for name in nullspace_optim.__all__)
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in PAGES}
    assert pages <= {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
