"""The table of faults in `docs/lab/faults.md`: number, fault, behaviour, the tests that prove it.

python tests/faults/table.py            print the table
python tests/faults/table.py --write    write it to docs/lab/faults.md
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "lab" / "faults.md"
sys.path.insert(0, str(Path(__file__).parent))

from catalogue import EXCUSED, FAULTS, PARTS  # noqa: E402

HEAD = """\
# Faults

What can go wrong between an optimizer and its weights, what happens then, and the test that proves it. Made by
`python tests/faults/table.py --write`; a test fails where a number has neither a test nor a reason.
"""


def tests_by_fault() -> dict[int, list[str]]:
    """Return the tests marked with each number, as `file::function`, found by reading the source of all tests."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for number in dict.fromkeys(_numbers(node)):
                    found[number].append(f"{path.relative_to(TESTS).as_posix()}::{node.name}")
    return found


def _numbers(function: ast.FunctionDef) -> Iterator[int]:
    for decorator in function.decorator_list:
        for node in ast.walk(decorator):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                yield from (ast.literal_eval(argument) for argument in node.args)


def problems(found: dict[int, list[str]]) -> list[str]:
    """Return what is wrong with the marks: missing, unknown, or both tested and excused."""
    missing = [f"fault {n} has neither a test nor a reason" for n in FAULTS if n not in found and n not in EXCUSED]
    unknown = [f"{', '.join(found[n])}: fault {n} is not in the catalogue" for n in found if n not in FAULTS]
    both = [f"fault {n} has a test and a reason for having none" for n in EXCUSED if n in found]
    return missing + unknown + both


def page(found: dict[int, list[str]]) -> str:
    """Return the whole of docs/lab/faults.md."""
    lines = [HEAD]
    for part, faults in PARTS.items():
        lines += [f"## {part}\n", "| | fault | what happens | test |", "|---|---|---|---|"]
        for number, (what, behaviour) in faults.items():
            proof = "<br>".join(f"`{test}`" for test in found.get(number, ())) or f"none: {EXCUSED.get(number, '?')}"
            lines.append(f"| {number} | {what} | {behaviour} | {proof} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Print or write the table; exit status 1 if a number is missing."""
    found = tests_by_fault()
    wrong = problems(found)
    if "--write" in sys.argv:
        PAGE.write_text(page(found), encoding="utf-8")
    else:
        print(page(found))
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
