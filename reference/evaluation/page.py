"""Finished runs as one self-contained HTML page and as Markdown tables."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference.errors import ExperimentError
from reference.evaluation import figures, metrics
from reference.evaluation.bootstrap import compare
from reference.methods import METHODS

Results = dict[str, Any]


def whole(run: Results, figure: str) -> float | None:
    """A figure of `metrics.summary`, None where cells are missing: joint training has the last row alone."""
    found = metrics.summary(np.array(run["accuracy"], dtype=float), run["pretrained"])[figure]
    return found.value if found.measured == found.cells else None


ACCURACY: dict[str, Callable[[Results], float | None]] = {
    "Transfer": lambda run: whole(run, "transfer"),
    "Transfer, known tasks": lambda run: run.get("transfer_known"),
    "Average": lambda run: whole(run, "average"),
    "Last": lambda run: whole(run, "last"),
    "Preserve": lambda run: whole(run, "preserve"),
    "forgetting": lambda run: whole(run, "forgetting"),
    "learned": lambda run: whole(run, "diagonal_gain"),
}
REST: dict[str, Callable[[Results], float | None]] = {
    "image → text @1": lambda run: run.get("pool", {}).get("after", {}).get("image_to_text_at_1"),
    "text → image @1": lambda run: run.get("pool", {}).get("after", {}).get("text_to_image_at_1"),
    "modality gap": lambda run: run.get("pool", {}).get("after", {}).get("modality_gap"),
    "trained parameters [M]": lambda run: (
        max(run["trained_parameters"]) / 1e6 if run.get("trained_parameters") else None
    ),
    "seconds": lambda run: run["seconds"],
    "memory [MiB]": lambda run: run["peak_memory"]["gpu_mib"] or run["peak_memory"]["process_mib"],
}
OF_THE_POOL = {"reference_root", "reference_images"}
NOT_A_METHODS_OWN = {"methods", "seeds", "note", "device"}
DIGITS = dict.fromkeys(REST, 1) | {"modality gap": 3, "seconds": 0, "memory [MiB]": 0}
READING = (
    "Accuracy in percent. Transfer: tasks not yet trained (mean of column means above the diagonal); known tasks: only "
    "those whose accuracy before training was at least three times chance. Average: all cells. Last: all tasks at the "
    "end. Preserve: trained tasks later on. Forgetting: best minus last. Learned: mean of the diagonal minus "
    "pretrained. A dash: cells of the matrix are missing. Retrieval and modality gap on the reference pool after the "
    "last task: methods with losses on it train on these very pairs. Mean ± standard "
    "deviation over seeds; differences with a 95 % interval from a paired bootstrap over test images and seeds."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 5px 10px; line-height: 20px; text-align: right; white-space: nowrap; }
td { border-bottom: 1px solid #d8dee4; }
th { border-bottom: 2px solid #8c959f; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr:hover td { background: #f6f8fa; } .note { color: #57606a; max-width: 60rem; }
.wide + .wide { margin-top: 1.6rem; } img { max-width: 100%; height: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
details { margin: 1rem 0; } pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""


def files_below(places: Sequence[str]) -> list[Path]:
    """The results files below `places`, files or folders, each once, in order of name."""
    files = [
        file
        for place in places
        for file in (sorted(Path(place).rglob("results.json")) if Path(place).is_dir() else [Path(place)])
    ]
    return list(dict.fromkeys(files))


def load_runs(places: Sequence[str]) -> list[Results]:
    """The results below `places`, files or folders, in order of name.

    Raises:
        ExperimentError: nothing is there, a file is not a result, or the runs are over different tasks.
    """
    runs = []
    for file in files_below(places):
        try:
            runs.append(json.loads(file.read_text(encoding="utf-8")))
            if not {"method", "seed", "tasks", "accuracy", "pretrained"} <= set(runs[-1]):
                raise ValueError("it has no accuracy matrix")
        except (OSError, ValueError) as error:
            raise ExperimentError(f"{file} is not a results file ({error}); give folders of finished runs") from error
    if not runs:
        raise ExperimentError(f"no results.json below {', '.join(places)}; give folders of finished runs")
    if len({tuple(run["tasks"]) for run in runs}) > 1:
        raise ExperimentError("the runs have different tasks or orders; report each order by itself")
    return runs


def refuse_mixed(runs: Sequence[Results]) -> None:
    """Refuse a table that would take runs of other settings for further seeds.

    Raises:
        ExperimentError: two runs of one method and seed, runs of both splits, or a method with two settings.
    """
    if len({run["config"].get("split") for run in runs}) > 1:
        raise ExperimentError("some runs are on validation and some on test images; report each split by itself")
    first: dict[str, Results] = {}
    seen: set[tuple[str, int]] = set()
    for run in runs:
        method, seed = run["method"], run["seed"]
        if (method, seed) in seen:
            raise ExperimentError(f"two runs of {method} with seed {seed}; report one folder of runs at a time")
        seen.add((method, seed))
        other = first.setdefault(method, run)
        pooled = method not in METHODS or METHODS[method].needs_reference or run["config"].get("pool_losses")
        own = run["config"].keys() & other["config"].keys() - NOT_A_METHODS_OWN - (set() if pooled else OF_THE_POOL)
        for key in sorted(own):
            if run["config"][key] != other["config"][key]:
                raise ExperimentError(
                    f"{method} has {key}={other['config'][key]!r} with seed {other['seed']} and "
                    f"{run['config'][key]!r} with seed {seed}; report runs of the same settings"
                )


def by_method(runs: Sequence[Results]) -> dict[str, list[Results]]:
    """Runs grouped by method, in the harness's order; methods it does not know last, in order of appearance."""
    found = dict.fromkeys(run["method"] for run in runs)
    names = [name for name in METHODS if name in found] + [name for name in found if name not in METHODS]
    return {name: [run for run in runs if run["method"] == name] for name in names}


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """`mean ± deviation` with `digits` decimals; `-` where nothing was measured."""
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    if not known:
        return "-"
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"


def tables(runs: Sequence[Results], against: str) -> tuple[list[list[str]], list[list[str]]]:
    """Accuracy with differences to the method `against`, and what else was measured: heading, one row per method."""
    groups = by_method(runs)
    compared = [f for f in ("transfer", "average", "last") if against in groups and len(groups) > 1]
    accuracy = [["method", "seeds", *ACCURACY, *(f"Δ {f.capitalize()} to {against}" for f in compared)]]
    rest = [["method", *REST]]
    for name, group in groups.items():
        found = [compare(group, groups[against], f) if name != against else None for f in compared]
        cells = [spread([read(run) for run in group]) for read in ACCURACY.values()]
        accuracy.append([name, str(len(group)), *cells, *("-" if d is None else str(d) for d in found)])
        rest.append([name, *(spread([read(run) for run in group], DIGITS[column]) for column, read in REST.items())])
    return accuracy, rest


def markdown(runs: Sequence[Results], against: str) -> str:
    """The tables as Markdown with their notes."""
    lines: list[str] = []
    for rows in tables(runs, against):
        head, *body = ("| " + " | ".join(row) + " |" for row in rows)
        lines += [head, "|" + "---|" * len(rows[0]), *body, ""]
    return "\n".join([*lines, *notes(runs)]) + "\n"


def notes(runs: Sequence[Results]) -> list[str]:
    """What a reader must know beside the table."""
    found = [f"Pretrained, before any training: {np.nanmean([run['pretrained'] for run in runs]):.1f} on average."]
    unknown = list(dict.fromkeys(task for run in runs for task in run.get("unknown_tasks", [])))
    if unknown:
        found.append(f"Not known before training (below three times chance): {', '.join(unknown)}.")
    before = [run["pool"]["before"] for run in runs if run.get("pool", {}).get("before")]
    if before:
        first = before[0]
        found.append(
            f"Before training: image → text @1 {first['image_to_text_at_1']:.1f}, text → image @1 "
            f"{first['text_to_image_at_1']:.1f}, modality gap {first['modality_gap']:.3f}."
        )
    found += list(dict.fromkeys(note for run in runs if (note := run["config"].get("note"))))
    return [*found, READING]


def page(runs: Sequence[Results], against: str) -> str:
    """The whole report as HTML; figures are inside."""
    measured = "".join(_table(rows) for rows in tables(runs, against))
    said = "".join(f"<p class=note>{html.escape(text)}</p>" for text in notes(runs))
    ordered = [run for group in by_method(runs).values() for run in group]
    curves = _image(
        lambda stream: figures.forgetting_curves(ordered, stream), "accuracy of each task along the sequence"
    )
    maps = "".join(
        _image(lambda stream, group=group: figures.heatmap(_mean(group), stream), f"accuracy matrix of {name}")  # type: ignore[misc]
        for name, group in by_method(runs).items()
    )
    settings = {run["method"]: run["config"] for run in runs}
    machines = list(dict.fromkeys(json.dumps({**run["machine"], "torch": run["torch"]}) for run in runs))
    details = html.escape("\n".join([*machines, json.dumps(settings, indent=1)]))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Continual fine-tuning of CLIP</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>Continual fine-tuning of CLIP: {len(by_method(runs))} methods, {len(runs)} runs, "
        f"{len(runs[0]['tasks'])} tasks</h1>{measured}{said}<h2>Accuracy along the sequence</h2>{curves}"
        f"<h2>Accuracy matrices (mean over seeds)</h2><div class=grid>{maps}</div>"
        f"<details><summary>Machines and settings</summary><pre>{details}</pre></details></html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _mean(group: Sequence[Results]) -> Results:
    matrices = {
        key: np.mean([np.array(run[key], dtype=float) for run in group], axis=0) for key in ("accuracy", "pretrained")
    }
    seeds = ", ".join(str(run["seed"]) for run in group)
    return {**group[0], "seed": seeds, **{key: value.tolist() for key, value in matrices.items()}}


def _image(draw: Callable[[io.BytesIO], None], text: str) -> str:
    stream = io.BytesIO()
    draw(stream)
    return f"<img alt='{html.escape(text)}' src='data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}'>"
