"""Docstrings and names: everything public is documented, the name of a test fits on a line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import MODULES, TESTS, label, tree_of

LONGEST_NAME = 72  # of a test: one line of a report


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


def test_the_name_of_a_test_fits_on_a_line() -> None:
    names = [
        node.name
        for path in TESTS
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 900
    assert not [name for name in names if len(name) > LONGEST_NAME]
