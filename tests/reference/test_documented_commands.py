"""Commands of the reference that README and pages name: options exist, settings are known, methods are methods."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from reference.config import load_config, parse_overrides
from reference.methods import chosen_methods, refuse_unknown
from reference.published.methods import chosen_methods as of_a_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARSED = ("run", "evaluation.report", "data.__main__", "data.drawn", "published.__main__")
PARSED += ("studies.run", "studies.language", "studies.text")
PARSED += tuple(f"benchmarks.{name}" for name in ("consolidate", "counting", "drift", "fused", "gpu", "peers", "step"))
LEFT_OUT = {"studies.run": "--output o"}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of every command of the reference, in fences (by line) and between backticks."""
    fenced = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) for line in joined(block)]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    named = [" ".join(part.split()) for part in re.findall(r"`(python -m reference\.[^`]+)`", prose)]
    found = []
    for command in [*fenced, *named]:
        for match in re.finditer(r"python -m reference\.([a-z_.]+)(.*)", command.split("&&")[-1]):
            words = shlex.split(match[2], comments=True)
            left_out = LEFT_OUT.get(match[1], "").split()
            found.append((match[1], [w for word in words for w in (left_out if word == "..." else [word])]))
    return found


def joined(block: str) -> list[str]:
    """Lines of a block; those that end in a backslash or within quotes go on in the next one."""
    lines = [""]
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        if lines[-1].count("'") % 2:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return lines


NAMED = [(page, *command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


def test_both_kinds_of_commands_are_found() -> None:
    fence = "```bash\npython -m reference.run --tasks a \\\n    --set 'b\n  c'  # no\n```\n"
    text = f"`python -m reference.run --seeds\n1`\n\n{fence}"
    assert commands(text) == [("run", ["--tasks", "a", "--set", "b c"]), ("run", ["--seeds", "1"])]
    assert len(NAMED) > 40


@pytest.mark.parametrize(
    "page, module, words", NAMED, ids=[f"{page.stem}-{n}-{module}" for n, (page, module, _) in enumerate(NAMED)]
)
def test_a_named_command_parses(page: Path, module: str, words: list[str]) -> None:
    name = next(known for known in (*PARSED, "evaluation.headline") if known.removesuffix(".__main__") == module)
    program = importlib.import_module(f"reference.{name}")
    if not words:
        return
    numbers = r"(?:^|(?<=,))[A-Z](?=,|$)"  # a letter stands for a number of the reader's choice
    options = program.parse([re.sub(numbers, "1", word) if module == "published" else word for word in words])
    pairs = [pair for pair in getattr(options, "set", []) if not re.search(r"\b[A-Z]\b|\.\.\.", pair)]
    preset = getattr(options, "preset", "demo")
    config = load_config(preset, {**parse_overrides(pairs), "output": "o", "data_root": "d", "model": "m"})
    refuse_unknown(config.of_method)
    methods = getattr(options, "methods", None)
    if methods and module in ("run", "published") and not re.search(r"\b[A-Z]\b", methods):
        assert chosen_methods(tuple(methods.split(","))) if module == "run" else of_a_table(methods)
