"""Traces of a run: a JSON-lines log, JSON files written in one move, and facts about the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from reference.errors import ExperimentError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give the name under which to write `path`; afterwards the file is either the old one or the new one.

    Raises:
        ExperimentError: it cannot be written (disk full, no permission); what was there before is intact.
    """
    draft = path.with_suffix(".tmp")
    try:
        yield draft
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ExperimentError(_unwritable(path, error)) from error


def _unwritable(path: Path, error: Exception) -> str:
    told = str(error).splitlines()[0]
    way_out = "free space or choose another --output; what was saved before is intact, reference.run --resume goes on"
    return f"cannot write {path} ({told}); {way_out}"


class Log:
    """Appends one JSON object per event to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._append("")

    def __call__(self, event: str, **facts: Any) -> None:
        """Write the event with its time (seconds since 1970).

        Raises:
            ExperimentError: it cannot be written.
        """
        self._append(json.dumps({"time": round(time.time(), 3), "event": event, **_plain(facts)}) + "\n")

    def _append(self, line: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise ExperimentError(_unwritable(self.path, error)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that the file is either the old or the new one; NaN becomes null."""
    write_text(path, json.dumps(_plain(content), indent=1) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write `content` in the same way, into a folder that is made if it is missing."""
    with writing(path) as draft:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(content, encoding="utf-8")


def machine() -> dict[str, Any]:
    """Facts about the machine."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Name of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance() -> dict[str, str | None]:
    """Today's date, and the commit of this checkout (`+` where tracked files differ from it; None outside git).

    To be asked when a run begins: code is read then.
    """
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):
        how = ["describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
        asked = ["git", "-C", str(Path(__file__).parent), *how]
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit}


def peak_memory() -> dict[str, float | None]:
    """Peak memory in MiB of the process and of the GPU since the run started.

    Outside Linux the process is counted since it started, on Windows not at all.
    """
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"process_mib": None if sys.platform == "win32" else round(resident_peak() / 2**20, 1), "gpu_mib": gpu}


def resident_peak() -> int:
    """Bytes of this process's resident memory at its highest (a process that was spawned starts anew on Linux)."""
    import resource  # not on Windows

    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"), re.M) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Begin to count peak memory anew where the system can: of the GPU, and on Linux of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _plain(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON does not know, as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
