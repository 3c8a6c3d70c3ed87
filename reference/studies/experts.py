"""iGSP against other methods, and iGSP with one choice changed at a time: rows of `configs/experts.yaml`.

python -m reference.studies.experts comparison --data-root DIR --model DIR --output DIR
python -m reference.studies.experts ablation   --data-root DIR --model DIR --output DIR
python -m reference.studies.experts report DIR

A run that is finished is not repeated and one that was begun is taken up, so the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Arguments
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from reference.command import StopRequest, add_settings, carried_out
from reference.config import CONFIGS, Config, for_method, load_config, parse_overrides
from reference.errors import ExperimentError
from reference.experiment import prepare
from reference.methods import chosen_methods, refuse_unknown
from reference.sequence import Sequence
from reference.studies.expert_report import read_rows, report, routing
from reference.training.tracking import writing

LISTINGS = CONFIGS / "experts.yaml"


@dataclass(frozen=True)
class Row:
    """One row: its name (also of its folders), the method, and what it changes in the settings."""

    name: str
    method: str = "igsp"
    igsp: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self, options: argparse.Namespace, common: Mapping[str, Any]) -> Config:
        """The settings of this row: preset, listing, row, command line, the last one wins."""
        given = {
            name: getattr(options, name)
            for name in ("data_root", "model", "reference_root", "tasks", "order", "split", "output")
            if getattr(options, name) is not None
        }
        given.update(parse_overrides(options.set))
        settings = {**common, **self.settings, **given, "methods": [self.method]}
        config = load_config(options.preset, settings)
        refuse_unknown(config.of_method)
        base = for_method(config, self.method)
        return replace(base, igsp={**base.igsp, **self.igsp})


def read_listing(name: str) -> tuple[list[Row], tuple[int, ...], dict[str, Any]]:
    """Rows, seeds and common settings of the listing `name`."""
    listing = yaml.safe_load(LISTINGS.read_text(encoding="utf-8"))[name]
    rows = []
    for label, row in listing["rows"].items():
        known = {key: row[key] for key in ("method", "igsp") if key in row}
        rest = {key: value for key, value in row.items() if key not in known}
        rows.append(Row(label, **known, settings=rest))
    return rows, tuple(listing["seeds"]), dict(listing.get("settings", {}))


def chosen_rows(rows: list[Row], names: str | None) -> list[Row]:
    """The rows that `names`, separated by commas, name in full; all for None.

    Raises:
        ExperimentError: a name that is not a row.
    """
    if names is None:
        return rows
    by_name = {row.name: row for row in rows}
    wanted = [part.strip() for part in names.split(";" if ";" in names else ",")]
    for name in wanted:
        if name not in by_name:
            raise ExperimentError(f"unknown row {name!r} in --rows: choose from {'; '.join(by_name)}")
    return [by_name[name] for name in wanted]


def run_all(options: argparse.Namespace) -> None:
    """Every row with the first seed, then with the next."""
    listed, seeds, common = read_listing(options.what)
    rows = chosen_rows(listed, options.rows)
    seeds = tuple(int(seed) for seed in options.seeds.split(",")) if options.seeds else seeds
    configs = {row.name: row.config(options, common) for row in rows}
    first = next(iter(configs.values()))
    experiment, stop = prepare(replace(first, methods=tuple({row.method for row in rows}))), StopRequest()
    for seed in seeds:
        for row in rows:
            (method,) = chosen_methods((row.method,))
            folder = Path(options.output) / f"{row.name.replace(' ', '_').replace(',', '')}-seed{seed}"
            Sequence(experiment, method, configs[row.name], seed, folder, stop).run(resume=True)


def main(arguments: Arguments[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status (0, 2 for an error, 130 when interrupted)."""
    options = parse(arguments)
    return carried_out(lambda: run(options), lambda: "the same command goes on")


def run(options: argparse.Namespace) -> None:
    """Run what is missing, then write and print the tables and draw the routing."""
    if options.what != "report":
        run_all(options)
    rows = read_rows([options.output] if options.what != "report" else options.places)
    folder = Path(options.output or ".")
    text = report(rows)
    with writing(folder / "experts.md") as draft:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
    for label, runs in rows.items():
        if runs[0]["facts"].get("tasks"):
            routing(runs[0], folder / f"routing-{label}.png")
    print(text + f"\n{folder / 'experts.md'}")


def parse(arguments: Arguments[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.studies.experts", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text in (
        ("comparison", "iGSP, MoE-Adapters, one LoRA a task, one for all, one under protection, GNSP exact"),
        ("ablation", "iGSP with one choice changed at a time, on four tasks, scored on the validation split"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add_settings(command)
        command.set_defaults(preset="mini")
        command.add_argument("--rows", help="names of rows separated by commas (by ; where a name holds a comma)")
        command.add_argument("--output", required=True, help="folder of results and of the report")
    command = commands.add_parser("report", help="the tables and figures of finished runs")
    command.add_argument("places", nargs="+", help="folders of finished runs, or their results.json")
    command.add_argument("--output", default=".", help="folder for experts.md and figures (default: here)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
