"""Everything that is too long for each change, in fresh environments at both ends of the supported versions.

python .ci/nightly.py                 oldest and newest: all tests, nightly ones, 1,000 examples a property
python .ci/nightly.py --end oldest    one end only
python .ci/nightly.py --here          in the environment at hand, without installing anything

Oldest: every dependency of `pyproject.toml` at its lower bound, torch 2.6 among them; these versions exist for Python
3.10 and 3.11. Exit status 0 if all passed. Environments are made in a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENDS = ("oldest", "newest")
# The one that belongs to torch 2.6, and the last of the test tools that run with it.
OLDEST_COMPANIONS = ("torchvision==0.21.0", "torchao==0.10.0", "peft==0.18.1", "transformers==4.51.0")
# Trainers whose tests skip where they are absent; too heavy for each change. axolotl pins an older torch.
NIGHTLY_COMPANIONS = ("avalanche-lib",)
PYTEST = ("-m", "pytest", "-q", "--timeout", "7200", "-p", "no:cacheprovider")
RUNS = {
    "short tests": (),
    "nightly tests": ("-m", "nightly"),
    "properties": (
        "--hypothesis-profile",
        "nightly",
        "tests/faults/test_invariants.py",
        "tests/subspace/test_projection.py",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python .ci/nightly.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--end", choices=ENDS, help="one end only")
    parser.add_argument("--here", action="store_true", help="use this environment; install nothing")
    options = parser.parse_args(arguments)
    if options.here:
        return report({"here": tests(sys.executable)})
    ends = [options.end] if options.end else ENDS
    return report({f"{end} versions": in_fresh_environment(*requirements(end)) for end in ends})


def requirements(end: str) -> tuple[str, ...]:
    """Return what pip is to install of the project's own dependencies, at either end of their range."""
    if end == "newest":
        return ("torch", "torchvision", *NIGHTLY_COMPANIONS)
    listed = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    bounds = re.findall(r'"([\w.-]+)>=([\d.]+)"', listed[1]) if listed else []
    return (*(f"{name}=={version}" for name, version in bounds), *OLDEST_COMPANIONS)


def in_fresh_environment(*packages: str) -> dict[str, int]:
    """Install the project with `packages` into a new virtual environment, test it, and remove it."""
    with tempfile.TemporaryDirectory(prefix="nullspace-nightly-") as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python")
        pip = [python, "-m", "pip", "install", "-q"]
        for what in (["--upgrade", "pip"], [*packages, "-e", f"{ROOT}[reference,dev]"]):  # an old pip searches for ever
            if code := subprocess.run([*pip, *what], cwd=ROOT).returncode:
                return {"installation": code}
        return tests(python)


def tests(python: str) -> dict[str, int]:
    """Run all tests with `python` and return the exit status of each run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return {
        name: subprocess.run([python, *PYTEST, *options], cwd=ROOT, env=environment).returncode
        for name, options in RUNS.items()
    }


def report(found: dict[str, dict[str, int]]) -> int:
    """Print one line a run; returns 1 if any failed."""
    for end, runs in found.items():
        for name, code in runs.items():
            print(f"{end}: {name}: {'passed' if code == 0 else f'FAILED ({code})'}")
    return int(any(code for runs in found.values() for code in runs.values()))


if __name__ == "__main__":
    sys.exit(main())
