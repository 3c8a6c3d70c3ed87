"""The experiment on one page: fine-tune CLIP on task after task with several methods and compare what is kept.

python -m reference.run                                              everything embedded, a few minutes
python -m reference.run --preset mini --data-root DIR --model DIR    folders of images, a CLIP of your own
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence as Arguments
from pathlib import Path
from typing import Any

from reference.command import NAMED, StopRequest, add_settings, carried_out, read_config
from reference.config import Config
from reference.errors import ExperimentError
from reference.evaluation import comparison, figures
from reference.evaluation.tables import aligned, matrix_table
from reference.experiment import Experiment, prepare
from reference.methods import chosen_methods
from reference.sequence import Sequence
from reference.training.tracking import writing


def main(arguments: Arguments[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status (0, 2 for an error, 130 when interrupted)."""
    options = parse(arguments)
    return carried_out(lambda: run(options), lambda: f"go on with: {resume_command(options)}")


def run(options: argparse.Namespace) -> None:
    """Run every method with every seed, print the tables and write the figures.

    Raises:
        ExperimentError: the output holds results already, or a setting is wrong.
    """
    config = read_config(options)
    output = Path(config.output)
    if not options.resume and any(any(output.glob(f"*/{name}")) for name in ("results.json", "checkpoint.pt")):
        raise ExperimentError(
            f"output={output} already holds results, finished or begun; add --resume or choose another --output"
        )
    chosen_methods(config.methods)
    stop = StopRequest()
    runs = compare(prepare(config), config, output, options.resume, stop)
    accuracy, rest = comparison.tables(runs)
    measured = [figure for figure in zip(*rest) if set(figure[1:]) != {"-"}]  # methods as columns: fits a line
    tables = [*map(matrix_table, runs), aligned(accuracy), aligned(measured)]
    print("\n" + "\n\n".join([*tables, "\n".join(comparison.notes(runs))]))
    print(f"\nresults and figures: {output}")


def compare(
    experiment: Experiment, config: Config, output: Path, resume: bool, stop: StopRequest
) -> list[dict[str, Any]]:
    """Every method with every seed, each with its results file and heatmap; then the curves of all."""
    runs = []
    for seed in config.seeds:
        for method in chosen_methods(config.methods):
            folder = output / f"{method.name}-seed{seed}"
            runs.append(Sequence(experiment, method, config, seed, folder, stop).run(resume))
            with writing(folder / "heatmap.png") as draft:
                figures.heatmap(runs[-1], draft)
    with writing(output / "forgetting.png") as draft:
        figures.forgetting_curves(runs, draft)
    return runs


def parse(arguments: Arguments[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.run", description=(__doc__ or "").split("\n")[0])
    add_settings(parser)
    parser.add_argument("--methods", help="names separated by commas, or all")
    parser.add_argument("--output", help="folder for results; default: runs/<preset>-<date and time>")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished runs in --output")
    return parser.parse_args(arguments)


def resume_command(options: argparse.Namespace) -> str:
    """The command that goes on where this one stopped."""
    named = [(name.replace("_", "-"), getattr(options, name)) for name in NAMED]
    given = [pair for pair in (*named, *(("set", text) for text in options.set)) if pair[1] is not None]
    words = ["python", "-m", "reference.run", "--preset", options.preset, "--output", options.output, "--resume"]
    return shlex.join([*words, *(word for name, value in given for word in (f"--{name}", value))])


if __name__ == "__main__":
    sys.exit(main())
