"""Outcome of a benchmark: tables, with the machine and the command that made them, as Markdown and JSON."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from reference.training import tracking
from reference.training.tracking import write_json, write_text


@dataclass(frozen=True)
class Table:
    """One table: a title, column heads, rows of printable cells, and a sentence on how to read it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table under a heading, its note below it."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.header, ["---"] * len(self.header), *self.rows)]
        return "\n\n".join(filter(None, [f"### {self.title}", "\n".join(lines), self.note]))


@dataclass(frozen=True)
class Outcome:
    """All tables of one benchmark run and what they were measured on."""

    benchmark: str
    command: str
    machine: str
    date: str
    seconds: float
    tables: tuple[Table, ...]

    def markdown(self) -> str:
        """The whole run as one Markdown section."""
        about = f"`{self.command}`\n\n{self.machine}; {self.date}; {self.seconds:.0f} s in all"
        return "\n\n".join([f"## {self.benchmark}", about, *(table.markdown() for table in self.tables)])


def parser(benchmark: str, about: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark: its device, and the folder of its tables."""
    about = (about or "").split("\n")[0]
    found = argparse.ArgumentParser(prog=f"python -m reference.benchmarks.{benchmark}", description=about)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--device", type=torch.device, default=here, help="cpu or cuda; default: a GPU if there is one")
    found.add_argument("--output", default="", help=f"folder for {benchmark}.md and {benchmark}.json")
    return found


def finish(
    benchmark: str, arguments: Sequence[str], device: torch.device, started: float, tables: Sequence[Table], output: str
) -> Outcome:
    """Print the tables of a run that `started` then and, if `output` names a folder, write them there."""
    module = benchmark if "." in benchmark else f"reference.benchmarks.{benchmark}"
    command = shlex.join(["python", "-m", module, *arguments])
    date, seconds = datetime.date.today().isoformat(), time.perf_counter() - started
    outcome = Outcome(benchmark.rpartition(".")[2], command, machine(device), date, seconds, tuple(tables))
    print("\n" + outcome.markdown())
    if output:
        write_text(Path(output) / f"{outcome.benchmark}.md", outcome.markdown() + "\n")
        write_json(Path(output) / f"{outcome.benchmark}.json", asdict(outcome))
    return outcome


def machine(device: torch.device) -> str:
    """Processor, cores, threads in use and versions, in one line."""
    facts = tracking.machine()
    gpu = [facts["gpu"]] if device.type == "cuda" else []
    cores = f"{facts['processor']}, {facts['cpus']} cores, {facts['threads']} threads"
    return "; ".join([*gpu, cores, f"torch {torch.__version__}", f"Python {facts['python']}"])


def progress(text: str) -> None:
    """One line on what is being measured, to the error stream."""
    print(text, file=sys.stderr, flush=True)


def saved_bytes(save: Callable[[Path], object]) -> int:
    """Bytes of everything that `save` writes to a path."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "saved")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
