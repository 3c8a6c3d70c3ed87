r"""Grids of settings on a short list of tasks, cell by cell: tables, figures and the settings to take.

python -m reference.studies.run ablation --preset mini --data-root DIR --model DIR --reference-root DIR \
    --tasks dtd,mnist,food101 --output DIR

`configs/grids.yaml` holds the grids, and what each is for. Finished cells are not repeated and a killed one goes on
after its last task. Grids of factors leave `cells/<cell>-seed<n>.json`, `<grid>.md` and `<grid>.png` in --output;
grids of rows `<row>-seed<n>/results.json`, `experts.md` and `routing-<row>.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Arguments
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from reference.command import StopRequest, add_settings, carried_out, read_config
from reference.config import Config, for_method, refuse_other_settings
from reference.errors import ExperimentError
from reference.experiment import Experiment, prepare
from reference.methods import METHODS
from reference.sequence import Sequence
from reference.studies import expert_report
from reference.studies.grids import DEFAULTS, LISTED, OURS, Cell, Finished, Values, cells
from reference.studies.summary import chosen, figure, markdown, read_cells
from reference.training.tracking import write_json, write_text

JUDGED_BY = ("average", "last", "transfer", "diagonal_gain")
KEPT = (
    "transfer", "transfer_known", "average", "last", "forgetting", "backward_transfer", "diagonal_gain", "pretrained",
    "accuracy", "tasks", "training", "seconds", "seconds_per_iteration", "consolidation_seconds_per_1000_images",
    "peak_memory", "machine", "torch", "config",
)  # fmt: skip


def main(arguments: Arguments[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status (0, 2 for an error, 130 when interrupted)."""
    options = parse(arguments)
    return carried_out(lambda: run(options), lambda: "the same command goes on")


def run(options: argparse.Namespace) -> None:
    """Run what is missing of the grid, then write and print its table, figure and choice."""
    folder = Path(options.output)
    if not options.report:
        run_grid(options, folder)
    if not DEFAULTS[options.grid]:
        expert_report.write([options.output], folder)
        return
    rows = read_cells(folder, options.grid)
    write_text(folder / f"{options.grid}.md", markdown(rows))
    figure(rows, folder / f"{options.grid}.png")
    print(markdown(rows))
    print(f"best by {options.by} (for a preset's of_method):\n{chosen(rows, options.by)}\n{folder / options.grid}.png")


def run_grid(options: argparse.Namespace, folder: Path) -> None:
    """Run every cell that is not finished, with the first seed, then with the next."""
    options.resume, options.methods = True, None
    grid = chosen_cells(cells(options.grid, parse_values(options.values)), options.rows)
    methods = (OURS, "zscl") if DEFAULTS[options.grid] else tuple({cell.method for cell in grid})
    config = replace(read_config(options, LISTED[options.grid]["settings"]), methods=methods)
    for cell in grid:  # before anything is trained
        settings_of(config, cell.method, replace(cell, bytes_of="").changes(config, {}))
    experiment = prepare(config)
    shared = Experiment(experiment.tasks, experiment.pool, cache(experiment.pretrained))
    stop = StopRequest()
    for seed in config.seeds:
        finished: dict[str, dict[str, Any]] = {}
        for number, cell in enumerate(tqdm(grid, desc=f"{options.grid}, seed {seed}", unit="cell", disable=None)):
            changes = cell.changes(config, finished)
            settings = settings_of(config, cell.method, changes)
            if DEFAULTS[options.grid]:
                about = {"grid": options.grid, "cell": cell.name, "number": number, "seed": seed, "settings": changes}
                finished[cell.name] = figures_of(shared, settings, cell, about, folder, stop)
            else:
                place = folder / f"{cell.name.replace(' ', '_').replace(',', '')}-seed{seed}"
                Sequence(shared, METHODS[cell.method], settings, seed, place, stop).run(resume=True)


def settings_of(config: Config, method: str, changes: Mapping[str, Any]) -> Config:
    """The settings under which `method` runs, with `changes` on top.

    Raises:
        ExperimentError: a change that its setting cannot have.
    """
    own = {**config.of_method.get(method, {}), **changes}
    return for_method(replace(config, methods=(method,), of_method={method: own}), method)


def figures_of(
    experiment: Experiment, settings: Config, cell: Cell, about: Finished, folder: Path, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Figures of `cell` as its small file keeps them; run if they are not there.

    Raises:
        ExperimentError: they are there, but with other settings.
        StoppedError: after `stop()` became true; the state is saved.
    """
    name, method = f"{about['grid']}-{cell.name}-seed{about['seed']}", METHODS[cell.method]
    file = folder / "cells" / f"{name}.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        refuse_other_settings(known["config"], settings, method.needs_reference, file)
        return known
    results = Sequence(experiment, method, settings, about["seed"], folder / "runs" / name, stop).run(resume=True)
    figures = {
        **about,
        "factors": dict(cell.factors),
        "method": cell.method,
        "split": settings.split,
        **{key: results[key] for key in KEPT},
        "loss": float(np.mean([task["loss"] for task in results["training"]])),
        "free_share": results["facts"].get("free_share"),
        "bytes": results["facts"].get("bytes"),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(file, figures)
    return figures


def parse(arguments: Arguments[str] | None) -> argparse.Namespace:
    """The command line."""
    texts = {grid: ", ".join(f"{k} ({' '.join(v)})" for k, v in factors.items()) for grid, factors in DEFAULTS.items()}
    parser = argparse.ArgumentParser(
        prog="python -m reference.studies.run",
        description=(__doc__ or "").split("\n")[0],
        epilog="Factors and their values: " + "; ".join(f"{grid}: {text}" for grid, text in texts.items() if text),
    )
    parser.add_argument("grid", choices=list(LISTED), help="what is varied")
    add_settings(parser)
    value = {"action": "append", "default": [], "metavar": "FACTOR=A,B"}
    parser.add_argument("--values", **value, help="other values of a factor; empty leaves it out")
    parser.add_argument("--rows", help="names of cells separated by commas (by ; where a name holds a comma)")
    parser.add_argument("--by", choices=JUDGED_BY, default="average", help="figure by which settings are chosen")
    parser.add_argument("--output", required=True, help="folder of the cells, the table and the figure")
    parser.add_argument("--report", action="store_true", help="train nothing; table and figure of finished cells")
    return parser.parse_args(arguments)


def parse_values(pairs: Arguments[str]) -> Values:
    """`["energy=0.9,0.99"]` as factors with their values.

    Raises:
        ExperimentError: a pair without `=`.
    """
    found = {}
    for pair in pairs:
        factor, equals, text = pair.partition("=")
        if not equals:
            raise ExperimentError(f"--values {pair}: expected a factor and its values, such as energy=0.9,0.99")
        found[factor.strip()] = tuple(value.strip() for value in text.split(",") if value.strip())
    return found


def chosen_cells(grid: list[Cell], names: str | None) -> list[Cell]:
    """The cells that `names`, separated by commas, name in full; all for None.

    Raises:
        ExperimentError: a name that is not a cell.
    """
    if names is None:
        return grid
    by_name = {cell.name: cell for cell in grid}
    wanted = [part.strip() for part in names.split(";" if ";" in names else ",")]
    for name in wanted:
        if name not in by_name:
            raise ExperimentError(f"unknown row {name!r} in --rows: choose from {'; '.join(by_name)}")
    return [by_name[name] for name in wanted]


if __name__ == "__main__":
    sys.exit(main())
