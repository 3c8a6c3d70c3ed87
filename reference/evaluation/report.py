"""Finished runs as Markdown tables and one figure: `python -m reference.evaluation.report RUNS...`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from reference.command import carried_out
from reference.errors import ExperimentError
from reference.evaluation import comparison, figures
from reference.evaluation.bootstrap import compare
from reference.evaluation.comparison import by_method, notes
from reference.evaluation.tables import Results, markdown_table
from reference.methods import METHODS
from reference.training.tracking import write_text, writing

OF_THE_POOL = {"reference_root", "reference_images"}
NOT_A_METHODS_OWN = {"methods", "seeds", "note", "device"}
LOOKED_AT = {"robust_images", "dense_collages"}  # they train nothing: a run without them lacks those figures alone


def files_below(places: Sequence[str]) -> list[Path]:
    """The results files below `places`, files or folders, each once, in order of name."""
    folders = {place: sorted(place.rglob("results.json")) if place.is_dir() else [place] for place in map(Path, places)}
    return list(dict.fromkeys(file for files in folders.values() for file in files))


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
    first: dict[tuple[str, str], Results] = {}  # by method and setting
    for run in runs:
        method, seed, config = run["method"], run["seed"], run["config"]
        if [(r["method"], r["seed"]) for r in runs].count((method, seed)) > 1:
            raise ExperimentError(f"two runs of {method} with seed {seed}; report one folder of runs at a time")
        pooled = method not in METHODS or METHODS[method].needs_reference or config.get("pool_losses")
        unseen = {key for key in LOOKED_AT if config.get(key) is None}
        for key in sorted(config.keys() - NOT_A_METHODS_OWN - unseen - (set() if pooled else OF_THE_POOL)):
            other = first.setdefault((method, key), run)
            if config[key] != other["config"][key]:
                raise ExperimentError(
                    f"{method} has {key}={other['config'][key]!r} with seed {other['seed']} and {config[key]!r} with "
                    f"seed {seed}; report runs of the same settings"
                )


def tables(runs: Sequence[Results], against: str) -> tuple[list[list[str]], list[list[str]]]:
    """Those of `comparison`, with the differences of accuracy to the method `against`."""
    groups, (accuracy, rest) = by_method(runs), comparison.tables(runs)
    for figure in ("transfer", "average", "last") if against in groups and len(groups) > 1 else ():
        accuracy[0].append(f"Δ {figure.capitalize()} to {against}")
        for row, (name, group) in zip(accuracy[1:], groups.items()):
            row.append(str((name != against and compare(group, groups[against], figure)) or "-"))
    return accuracy, rest


def markdown(runs: Sequence[Results], against: str) -> str:
    """The tables as Markdown with their notes."""
    return "".join(markdown_table(rows) + "\n\n" for rows in tables(runs, against)) + "\n".join(notes(runs)) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `report.md` and `report.png`, the accuracy of each task along the sequence; returns the exit status."""
    options = parse(arguments)
    return carried_out(lambda: write(options.runs, options.against, Path(options.output)), str)


def write(places: Sequence[str], against: str, folder: Path) -> None:
    """Write and print the tables of the runs below `places`, and draw the figure, in `folder`."""
    runs = load_runs(places)
    refuse_mixed(runs)
    text = markdown(runs, against)
    write_text(folder / "report.md", text + "\n![Accuracy of each task along the sequence](report.png)\n")
    with writing(folder / "report.png") as draft:
        figures.forgetting_curves([run for group in by_method(runs).values() for run in group], draft)
    print(text + f"\n{folder / 'report.md'}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.evaluation.report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", help="folders of finished runs, or their results.json")
    parser.add_argument("--against", default="finetune", help="method that differences are taken to")
    parser.add_argument("--output", default=".", help="folder for report.md and report.png (default: here)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
