"""Tables about methods with small modules: accuracy with and without the task's name, parameters, fate of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference.evaluation import metrics
from reference.evaluation.bootstrap import compare
from reference.evaluation.figures import finish_panels, task_panels
from reference.evaluation.report import files_below, load_runs
from reference.evaluation.tables import Results, markdown_table, memory, reading, spread
from reference.methods.adapters import TASK_UNKNOWN
from reference.training.tracking import write_text

Rows = Mapping[str, list[Results]]
FIGURES, PHASES = ("transfer", "average", "last"), ("trainable_phase_1", "trainable_phase_2")
COUNTS = ("trainable_mean", "final_without_routers", "final_with_routers")
CLAIMS = {"trainable_mean": 42.7, "final_with_routers": 86.9}


def read_rows(places: Sequence[str]) -> dict[str, list[Results]]:
    """The runs below `places` by the name of their folder, without ``-seed<n>``, in order of appearance.

    A method that changes the model itself trains what its results say and stores nothing beside it.

    Raises:
        ExperimentError: nothing is there, a file is not a result, or the runs are over different tasks.
    """
    rows: dict[str, list[Results]] = {}
    for file, run in zip(files_below(places), load_runs(places)):
        whole = {**dict.fromkeys(COUNTS, 0.0), "trainable_mean": float(np.mean(run["trained_parameters"] or [0]))}
        run = {**run, "facts": {**whole, **run.get("facts", {})}}
        rows.setdefault(file.parent.name.rsplit("-seed", 1)[0], []).append(run)
    return rows


def report(rows: Rows) -> str:
    """All tables as Markdown."""
    parts = [markdown_table(accuracy_table(rows)), markdown_table(parameter_table(rows)), reading("experts")]
    ours = next((runs for runs in rows.values() if runs[0]["method"] == "igsp"), None)
    others = {label: runs for label, runs in rows.items() if runs[0]["method"] != "igsp"}
    if ours and others:
        parts += [markdown_table(claims_table(ours, others)), reading("claims")]
    if ours:
        parts += [f"Experts of `{next(iter(rows))}`, seed {ours[0]['seed']}:", markdown_table(expert_table(ours[0]))]
    return "\n\n".join(parts) + "\n"


def scored(run: Results, way: str) -> Results | None:
    """The run as scored in the way that begins with `way`; None where there is no such way."""
    for name, other in run["scored_otherwise"].items():
        if name.startswith(way):
            found = metrics.summary(np.array(other["accuracy"], dtype=float), run["pretrained"])
            return {**run, "right": other["right"], **{key: mean.value for key, mean in found.items()}}
    return None


def unnamed(run: Results) -> Results:
    """The run as scored without a task's name; as it is where the method makes no difference."""
    return scored(run, TASK_UNKNOWN) or run


def accuracy_table(rows: Rows) -> list[list[str]]:
    """Heading and one row each, also for other ways of scoring: accuracy with and without the name, time, memory."""
    heads = [f"{name.capitalize()}{where}" for where in ("", ", no name") for name in FIGURES]
    table = [["", "seeds", *heads, "learned", "seconds", "memory [MiB]"]]
    shown = dict(rows)
    for label, runs in rows.items():
        for way in runs[0]["scored_otherwise"]:
            if not way.startswith(TASK_UNKNOWN):
                shown[f"{label}, {way}"] = [scored(run, way) or run for run in runs]
    for label, runs in shown.items():
        cells = [spread([run[name] for run in runs]) for name in FIGURES]
        cells += [spread([unnamed(run)[name] for run in runs]) for name in FIGURES]
        cells += [spread([run["diagonal_gain"] for run in runs]), spread([run["seconds"] for run in runs], 0)]
        table.append([label, str(len(runs)), *cells, spread([memory(run) for run in runs], 0)])
    return table


def parameter_table(rows: Rows) -> list[list[str]]:
    """Heading and one row each: parameters in thousands, and what became of candidates."""
    fates = ["kept", "pruned", "reused", "settled"]
    table = [["", "trainable, phase 1", "phase 2", "mean", "final extra", "with routers", *fates]]
    for label, runs in rows.items():
        facts = [run["facts"] for run in runs]
        phases = [spread([np.mean(f[key]) / 1e3 if key in f else None for f in facts]) for key in PHASES]
        counts = [spread([f[key] / 1e3 for f in facts]) for key in COUNTS]
        ends = [
            spread([sum(t[key] for t in f["tasks"]) if "tasks" in f else None for f in facts], 0)
            for key in ("kept", "pruned", "reused")
        ]
        table.append([label, *phases, *counts, *ends, spread([settled(f) for f in facts], 0)])
    return table


def settled(facts: Mapping[str, Any]) -> float | None:
    """Mean step at which the routers converged, over the layers and tasks where they did."""
    steps = [layer["converged"] for task in facts.get("tasks", []) for layer in task["layers"]]
    known = [step for step in steps if step is not None]
    return float(np.mean(known)) if known else None


def claims_table(ours: Sequence[Results], others: Rows) -> list[list[str]]:
    """Heading and one row per other method: how much smaller ours is, beside what the abstract claims, and accuracy."""
    heads = ["mean trainable, saved [%]", "claimed", "final extra, saved [%]", "claimed"]
    table = [["against", *heads, *(f"{name.capitalize()}, no name" for name in FIGURES[1:])]]
    for label, runs in others.items():
        row = [label]
        for key, claim in CLAIMS.items():
            mine, theirs = (float(np.mean([run["facts"][key] for run in group])) for group in (ours, runs))
            row += [f"{100 * (1 - mine / theirs):.1f}" if theirs else "stores none", f"{claim}"]
        pair = [[unnamed(run) for run in group] for group in (ours, runs)]
        table.append([*row, *(str(compare(*pair, name) or "-") for name in FIGURES[1:])])
    return table


def expert_table(run: Results) -> list[list[str]]:
    """Heading and one row per task: phases, candidates, reuse, and the step at which each layer's router converged."""
    table = [["task", "phase 1 [steps]", "phase 2", "kept", "pruned", "reused", "reuse", "converged, by block"]]
    for task in run["facts"]["tasks"]:
        steps = " ".join("-" if layer["converged"] is None else str(layer["converged"]) for layer in task["layers"])
        reuse = float(np.mean([layer["reuse"] for layer in task["layers"]]))
        keys = ("steps_phase_1", "steps_phase_2", "kept", "pruned", "reused")
        table.append([task["task"], *(str(task[key]) for key in keys), f"{reuse:.0%}", steps])
    return table


def routing(results: Results, path: Path) -> None:
    """One panel per task of an iGSP run: the routing through the history and each candidate over phase 1.

    Thick lines are means over layers, thin ones single layers (of the history, and of the first candidate).
    """
    tasks = results["facts"]["tasks"]
    figure, panels = task_panels(len(tasks), 2.3, 0.6, sharey=True)
    colours = ["#1f6a96", "#c9432f", "#e39a1f", "#7d3c1e", "#b07aa1", "#59a14f"]
    for axes, task in zip(panels, tasks):
        full = [layer["routing"] for layer in task["layers"] if layer["routing"]]
        most = max((len(points[0]) for points in full), default=1)
        shares = np.array([[[*point, *[np.nan] * (most - len(point))] for point in points] for points in full])
        for expert in range(most if len(full) else 0):
            if expert < 2:
                axes.plot(task["routing_steps"], shares[:, :, expert].T, color=colours[expert], lw=0.4, alpha=0.5)
            name = f"candidate {expert}" if expert else "experts of earlier tasks"
            mean = np.nanmean(shares[:, :, expert], axis=0)
            axes.plot(task["routing_steps"], mean, color=colours[expert % len(colours)], lw=2, label=name)
        axes.axvline(task["steps_phase_1"], color="grey", linestyle=":", linewidth=1)
        fate = f"{task['kept']} kept, {task['pruned']} pruned, {task['reused']} reused"
        axes.set_title(f"{task['task']}: {fate}", fontsize=8)
        axes.set_ylim(0, 1.02)
    finish_panels(figure, panels[0], ("step (dotted: end of phase 1)", "share of routing"), path, 3, fontsize=8)


def write(places: Sequence[str], folder: Path) -> None:
    """Write and print the tables of the runs below `places` and draw their routing."""
    rows = read_rows(places)
    text = report(rows)
    write_text(folder / "experts.md", text)
    for label, runs in rows.items():
        if runs[0]["facts"].get("tasks"):
            routing(runs[0], folder / f"routing-{label}.png")
    print(text + f"\n{folder / 'experts.md'}")
