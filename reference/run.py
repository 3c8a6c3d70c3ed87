"""The experiment on one page: fine-tune CLIP on task after task with several methods and compare what is kept.

python -m reference.run                                              everything embedded, a few minutes
python -m reference.run --preset mini --data-root DIR --model DIR    folders of images, a CLIP of your own
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence as Arguments
from pathlib import Path
from types import FrameType
from typing import Any

from reference import figures
from reference.config import Config, load_config, parse_overrides
from reference.errors import ExperimentError
from reference.experiment import Experiment, prepare
from reference.methods import chosen_methods
from reference.report import cost_table, matrix_table, summary_table
from reference.sequence import Sequence, StoppedError

NAMED = ("data_root", "model", "reference_root", "methods", "tasks", "seeds", "order", "split")


class StopRequest:
    """True after Ctrl-C: the running step is finished and saved; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        print("\nstopping after this step ...", file=sys.stderr)
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: Arguments[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status (0, 2 for an error, 130 when interrupted)."""
    options = parse(arguments)
    try:
        config = read_config(options)
        output = Path(config.output)
        if not options.resume and any(any(output.glob(f"*/{name}")) for name in ("results.json", "checkpoint.pt")):
            raise ExperimentError(
                f"output={output} already holds results, finished or begun; add --resume or choose another --output"
            )
        chosen_methods(config.methods)
        stop = StopRequest()
        runs = compare(prepare(config), config, output, options.resume, stop)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError:
        print(f"stopped and saved; go on with: {resume_command(options, config)}", file=sys.stderr)
        return 130
    for results in runs:
        print("\n" + matrix_table(results))
    print("\n" + summary_table(runs, config.note) + "\n\n" + cost_table(runs))
    print(f"\nresults and figures: {output}")
    return 0


def compare(
    experiment: Experiment, config: Config, output: Path, resume: bool, stop: StopRequest
) -> list[dict[str, Any]]:
    """Every method with every seed, each with its results file and heatmap; then the curves of all."""
    runs = []
    for seed in config.seeds:
        for method in chosen_methods(config.methods):
            folder = output / f"{method.name}-seed{seed}"
            runs.append(Sequence(experiment, method, config, seed, folder, stop).run(resume))
            figures.heatmap(runs[-1], folder / "heatmap.png")
    figures.forgetting_curves(runs, output / "forgetting.png")
    return runs


def parse(arguments: Arguments[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.run", description=(__doc__ or "").split("\n")[0])
    add_settings(parser)
    parser.add_argument("--methods", help="names separated by commas, or all")
    parser.add_argument("--output", help="folder for results; default: runs/<preset>-<date and time>")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished runs in --output")
    return parser.parse_args(arguments)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that say on what and how every method runs."""
    parser.add_argument("--preset", default="demo", help="demo (default), mini or paper")
    parser.add_argument("--data-root", help="folder with one folder of images per task")
    parser.add_argument("--model", help="folder of an open_clip model, <architecture>:<pretrained tag>, or :random")
    parser.add_argument("--reference-root", help="folder with captions.csv, for methods with a pool")
    parser.add_argument("--tasks", help="names separated by commas, in this order; default: all of --order")
    parser.add_argument("--seeds", help="numbers separated by commas")
    parser.add_argument("--order", help="I or II")
    parser.add_argument("--split", help="test or validation, on which settings are chosen")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting of reference/config.py; gradient_checkpointing=true, say, for less memory in training",
    )


def read_config(options: argparse.Namespace) -> Config:
    """Preset, then `--set`, then the named options."""
    if options.resume and not options.output:
        raise ExperimentError("--resume needs the --output folder of the run to go on with")
    options.output = options.output or f"runs/{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    given = {name: value for name in (*NAMED, "output") if (value := getattr(options, name)) is not None}
    return load_config(options.preset, {**parse_overrides(options.set), **given})


def resume_command(options: argparse.Namespace, config: Config) -> str:
    """The command that goes on where this one stopped."""
    words = ["python", "-m", "reference.run", "--preset", options.preset, "--output", config.output, "--resume"]
    for name in NAMED:
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(options, name)]
    for pair in options.set:
        words += ["--set", pair]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
