"""What a run leaves behind: a JSON-lines log, JSON files written in one move, and facts about the machine."""

from __future__ import annotations

import json
import math
import os
import platform
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
    return (
        f"cannot write {path} ({str(error).splitlines()[0]}); free space or choose another --output; what was "
        "saved before is intact, go on with --resume"
    )


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
    with writing(path) as draft:
        draft.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Where the run took place."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Name of the processor, as exactly as the system tells."""
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
    return {"process_mib": _peak_of_process(), "gpu_mib": gpu}


def _peak_of_process() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        peaks = [
            line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")
        ]
        if peaks:
            return round(int(peaks[0]) / 2**10, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


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
