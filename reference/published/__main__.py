"""Run a published table again: every method with every seed, on the full data, beside the published figures.

python -m reference.published pmnist --data-root DIR --methods gpm,sgd --seeds 1,2,3 --output DIR
python -m reference.published pmnist --output DIR --report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence as Arguments
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from reference.command import carried_out
from reference.errors import ExperimentError
from reference.published.methods import METHODS, chosen_methods
from reference.published.protocols import PROTOCOLS, Protocol
from reference.published.report import read_runs, report
from reference.published.runs import Run

Number = TypeVar("Number", int, float)


def main(arguments: Arguments[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status (0, 2 for an error)."""
    options = parse(arguments)
    return carried_out(lambda: run(options, Path(options.output)), str)


def run(options: argparse.Namespace, folder: Path) -> None:
    """Run what is missing, unless only the table is asked for, and print it."""
    if not options.report:
        run_all(options, folder)
    print(report(read_runs(folder, options.table), options.table))


def run_all(options: argparse.Namespace, folder: Path) -> None:
    """Every method with every seed; finished runs are not repeated, begun ones are taken up."""
    published = PROTOCOLS[options.table]
    given = departures(options, published)
    changed = {} if options.rate is None else {"rate": options.rate}
    methods = [replace(method, **changed) for method in chosen_methods(options.methods)]
    protocols = [replace(method.on(published), **given) for method in methods]
    drawn = numbers(options.seeds, "--seeds", int)
    images = published.read(Path(options.data_root))
    for seed in drawn:
        for method, protocol in zip(methods, protocols):
            Run(protocol, method, seed, images, folder, options.split).finish()


def departures(options: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """Settings that the command line gives in place of the table's and the method's.

    Raises:
        ExperimentError: another number of thresholds than the network has layers with one, or one that is no share.
    """
    names = ("tasks", "epochs", "batch", "samples", "precision", "held_out")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.thresholds is not None:
        shares = numbers(options.thresholds, "--thresholds", float)
        if len(shares) != len(protocol.thresholds):
            layers = ", ".join(name or "all layers" for name in protocol.thresholds) or "none"
            raise ExperimentError(f"--thresholds {options.thresholds}: {options.table} has one each for: {layers}")
        if not all(0 < share <= 1 for share in shares):
            raise ExperimentError(
                f"--thresholds {options.thresholds}: each is a share of energy, above 0 and at most 1"
            )
        given["thresholds"] = dict(zip(protocol.thresholds, shares))
    return given


def numbers(text: str, option: str, kind: type[Number]) -> list[Number]:
    """Numbers separated by commas.

    Raises:
        ExperimentError: something else is found.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        wanted, example = ("whole numbers", "1,2,3") if kind is int else ("numbers", "0.95,0.99,0.99")
        raise ExperimentError(f"{option} {text}: expected {wanted} separated by commas, such as {example}") from error


def parse(arguments: Arguments[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.published", description=(__doc__ or "").split("\n")[0])
    tables = "permuted MNIST, 10-split CIFAR-100 with one of two networks; short-*: ours alone, for the defaults"
    parser.add_argument("table", choices=sorted(PROTOCOLS), help=tables)
    parser.add_argument("--data-root", default=".", help="folder that holds mnist/ or cifar100/ (torchvision's too)")
    parser.add_argument("--methods", default="gpm", help=f"names separated by commas: {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="1,2,3,4,5", help="numbers separated by commas")
    parser.add_argument("--output", required=True, help="folder of results; finished runs there are not repeated")
    parser.add_argument("--report", action="store_true", help="train nothing, print the table of --output")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="choose settings on validation")
    parser.add_argument("--held-out", type=float, help="share of the training images that is the validation part")
    parser.add_argument("--rate", type=float, help="another learning rate than the method's")
    parser.add_argument("--tasks", type=int, help="only the first tasks")
    parser.add_argument("--epochs", type=int, help="at most so many epochs a task")
    parser.add_argument("--batch", type=int, help="images in a step")
    parser.add_argument("--thresholds", help="share of energy kept in each layer, separated by commas")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of training; bfloat16: autocast")
    parser.add_argument("--samples", type=int, help="images whose inputs are protected after each task")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
