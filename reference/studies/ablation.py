r"""Run a grid of settings on a short list of tasks, cell by cell; write a table, a figure and the settings to take.

python -m reference.studies.ablation ablation --preset mini --data-root DIR --model DIR --reference-root DIR \
    --tasks dtd,mnist,food101 --output DIR
python -m reference.studies.ablation dial     ... what to turn between standing still and learning freely
python -m reference.studies.ablation controls ... the settings of the rivals, chosen on validation images

Cells that are finished are not repeated and a killed one goes on after its last task; files in --output:
`cells/<cell>-seed<n>.json`, `<grid>.md`, `<grid>.png`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence as Arguments
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reference.command import StopRequest, add_settings, carried_out, read_config
from reference.errors import ExperimentError
from reference.experiment import Experiment, prepare
from reference.studies.grids import DEFAULTS, OURS, Values, cells
from reference.studies.runs import Place, figures_of, settings_of
from reference.studies.summary import chosen, figure, markdown, read_cells
from reference.training.tracking import writing

JUDGED_BY = ("average", "last", "transfer", "diagonal_gain")


def main(arguments: Arguments[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status (0, 2 for an error, 130 when interrupted)."""
    options = parse(arguments)
    return carried_out(lambda: run(options), lambda: "the same command goes on")


def run(options: argparse.Namespace) -> None:
    """Run what is missing of the grid, then write and print its table, figure and choice."""
    folder = Path(options.output)
    if not options.report:
        run_grid(options, folder)
    rows = read_cells(folder, options.grid)
    with writing(folder / f"{options.grid}.md") as draft:
        draft.write_text(markdown(rows), encoding="utf-8")
    figure(rows, folder / f"{options.grid}.png")
    print(markdown(rows))
    print(f"best by {options.by} (for a preset's of_method):\n{chosen(rows, options.by)}\n{folder / options.grid}.png")


def run_grid(options: argparse.Namespace, folder: Path) -> None:
    """Run every cell that is not finished."""
    options.resume, options.methods = True, None
    options.split = options.split or "validation"
    config = replace(read_config(options), methods=(OURS, "zscl"))
    grid = cells(options.grid, parse_values(options.values))
    for cell in grid:  # before anything is trained
        settings_of(config, cell.method, replace(cell, bytes_of="").changes(config, {}))
    experiment = prepare(config)
    shared = Experiment(experiment.tasks, experiment.pool, cache(experiment.pretrained))
    stop = StopRequest()
    for seed in config.seeds:
        finished: dict[str, dict[str, Any]] = {}
        for number, cell in enumerate(tqdm(grid, desc=f"{options.grid}, seed {seed}", unit="cell", disable=None)):
            place = Place(folder, options.grid, number, seed)
            finished[cell.name] = figures_of(shared, config, cell, finished, place, stop)


def parse(arguments: Arguments[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.studies.ablation",
        description=(__doc__ or "").split("\n")[0],
        epilog="Factors and their values: "
        + "; ".join(
            f"{grid}: " + ", ".join(f"{name} ({' '.join(known)})" for name, known in factors.items())
            for grid, factors in DEFAULTS.items()
        ),
    )
    parser.add_argument("grid", choices=list(DEFAULTS), help="what is varied")
    add_settings(parser)
    parser.add_argument(
        "--values",
        action="append",
        default=[],
        metavar="FACTOR=A,B",
        help="other values of a factor; empty leaves it out",
    )
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


if __name__ == "__main__":
    sys.exit(main())
