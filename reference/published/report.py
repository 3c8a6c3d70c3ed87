"""A table of finished runs beside the published figures, as Markdown."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reference.errors import ExperimentError
from reference.evaluation.tables import markdown_table, spread
from reference.published.methods import METHODS
from reference.published.protocols import PROTOCOLS
from reference.published.published import FIGURES, Published, verdict

HEAD = ("method", "seeds", "ACC", "BWT", "loss of first / last task", "seconds", "published ACC (BWT)", "difference")


def read_runs(folder: Path, table: str) -> list[dict[str, Any]]:
    """The finished runs of one table in a folder, by method and seed.

    Raises:
        ExperimentError: there are none, or a file is not one of ours.
    """
    runs = []
    for path in sorted(folder.glob("*-seed*.json")):
        try:
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            runs[-1]["method"], runs[-1]["seed"], runs[-1]["ACC"]
        except (ValueError, KeyError) as error:
            raise ExperimentError(f"{path} is not a results file of this program ({error!r}); remove it") from error
    runs = [run for run in runs if run["table"] == table]
    if not runs:
        raise ExperimentError(f"--output {folder} holds no finished run of {table}")
    return runs


def report(runs: Iterable[dict[str, Any]], table: str) -> str:
    """One line a method: seeds, ACC and BWT as mean ± deviation over seeds, the published figure, the verdict."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["method"]].append(run)
    order = [name for name in METHODS if name in groups] + sorted(set(groups) - set(METHODS))
    return markdown_table([HEAD, *(_row(name, groups[name], table) for name in order)])


def as_published(run: dict[str, Any]) -> bool:
    """True if a run kept the table's protocol (methods may have their own rate) and was scored on the test part."""
    wanted = json.loads(json.dumps(PROTOCOLS[run["table"]].settings()))
    own = {"rate", "base", "project", "policy"}  # of the method
    same = {key: value for key, value in run["settings"].items() if key not in own}
    del wanted["rate"]
    return same == wanted and run["evaluated_on"] == "test"


def comparable(run: dict[str, Any]) -> bool:
    """True if a run is as published but perhaps for its arithmetic, which its line then names."""
    return as_published({**run, "settings": {k: v for k, v in run["settings"].items() if k != "precision"}})


def _one_setting(name: str, runs: list[dict[str, Any]]) -> None:
    for run in runs[1:]:
        if (run["settings"], run["evaluated_on"]) != (runs[0]["settings"], runs[0]["evaluated_on"]):
            raise ExperimentError(
                f"the runs of {name} with seeds {runs[0]['seed']} and {run['seed']} have different settings; "
                "keep them in different --output folders"
            )


def _row(name: str, runs: list[dict[str, Any]], table: str) -> list[str]:
    _one_setting(name, runs)
    arithmetic = runs[0]["settings"].get("precision")
    accuracy = [run["ACC"] for run in runs]
    published = FIGURES.get(table, {}).get(name)
    deviation = statistics.stdev(accuracy) if len(accuracy) > 1 else None
    losses = [statistics.mean(run["losses"][task][-1] for run in runs) for task in (0, -1)]
    judged = verdict(statistics.mean(accuracy), deviation, published)
    title = METHODS[name].title if name in METHODS else name
    return [
        f"{title} (`{name}`)" + (f", in {arithmetic}" if arithmetic else ""),
        ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"])),
        spread(accuracy, 2),
        spread([run["BWT"] for run in runs], 2),
        f"{losses[0]:.3f} / {losses[1]:.3f}",
        f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        _published(published),
        judged if all(map(comparable, runs)) else "not the published settings",
    ]


def _published(published: Published | None) -> str:
    if published is None:
        return "-"
    deviation = "" if published.deviation is None else f" ± {published.deviation:.2f}"
    backward = "" if published.backward is None else f" ({published.backward:g})"
    return f"{published.accuracy:.2f}{deviation}{backward}, {published.source}"
