"""Cells of each grid in `configs/grids.yaml`: which method runs with which settings, and what varies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import yaml

from reference.config import CONFIGS, Config, for_method
from reference.errors import ExperimentError

Values = Mapping[str, Sequence[str]]
Finished = Mapping[str, dict[str, Any]]  # figures of finished cells of one seed, by name
OURS = "nullspace-reference"

LISTED: dict[str, dict[str, Any]] = yaml.safe_load((CONFIGS / "grids.yaml").read_text(encoding="utf-8"))
DEFAULTS: dict[str, dict[str, list[str]]] = {name: grid.get("factors", {}) for name, grid in LISTED.items()}
CONTROLS = {
    "matched_share": "matched-plasticity", "ewc_weight": "ewc", "wise_share": "wise-ft", "ensemble_share": "zscl",
    "replay_bytes": "replay",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One method with some settings changed.

    `factors` is what the table shows; `rate` multiplies the method's learning rate; with `bytes_of`, the name of an
    earlier cell, `replay_bytes` is what the bases of that one take.
    """

    name: str
    method: str
    factors: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    bytes_of: str = ""

    def changes(self, config: Config, finished: Finished) -> dict[str, Any]:
        """Settings that differ from those that the method has in `config`."""
        changed = dict(self.settings)
        if "igsp" in changed:
            changed["igsp"] = {**for_method(config, self.method).igsp, **changed["igsp"]}
        if self.rate != 1:
            changed["learning_rate"] = self.rate * for_method(config, self.method).learning_rate
        if self.bytes_of:
            changed["replay_bytes"] = finished[self.bytes_of]["bytes"]
        return changed


def cells(grid: str, given: Values) -> list[Cell]:
    """The cells of `grid`, in an order in which each may look at earlier ones.

    Raises:
        ExperimentError: `given` names an unknown factor, a value that its factor cannot have, or leaves no cell.
    """
    unknown = sorted(given.keys() - DEFAULTS[grid].keys())
    if unknown:
        raise ExperimentError(f"--values {unknown[0]}=...: {grid} varies {', '.join(DEFAULTS[grid])}")
    values = {**DEFAULTS[grid], **given}
    try:
        found = list(GRIDS[grid](values) if grid in GRIDS else _rows(grid))
    except (ValueError, KeyError) as error:
        raise ExperimentError(f"--values: {error}: not a value that this factor can have") from error
    if not found:
        raise ExperimentError(f"--values leave no cell of {grid}: give every factor a value")
    return found


def _rows(grid: str) -> Iterator[Cell]:
    for name, row in LISTED[grid]["rows"].items():
        yield Cell(name, row["method"], {}, {key: value for key, value in row.items() if key != "method"})


def _crossed(values: Values) -> Iterator[Cell]:
    for chosen in product(*(values[factor] for factor in DEFAULTS["ablation"])):
        factors = dict(zip(DEFAULTS["ablation"], chosen))
        moment, pool = factors["moment"], {"no": "", "yes": "-reference"}[factors["pool"]]
        settings: dict[str, Any] = {
            "layers": factors["layers"],
            "pool_losses": {"no": False, "yes": True}[factors["losses"]],
            "energy": float(factors["energy"]),
        }
        if moment != "gradient":
            settings["project"] = moment
        name = "_".join(f"{factor}-{value}" for factor, value in factors.items())
        yield Cell(name, ("gradient" if moment == "gradient" else "nullspace") + pool, factors, settings)


def _one_at_a_time(values: Values) -> Iterator[Cell]:
    yield Cell("base", OURS, {"changed": "nothing", "to": "-"})
    for factor in DEFAULTS["dial"]:
        for value in values[factor]:
            cell = Cell(f"{factor}-{value}", OURS, {"changed": factor, "to": value})
            if factor in ("rate", "finetune"):
                method = OURS if factor == "rate" else "finetune"
                yield replace(cell, method=method, rate=float(value))
            else:
                yield replace(cell, settings={factor: value if factor == "layers" else float(value)})


def _controls(values: Values) -> Iterator[Cell]:
    for rate in values["rate"]:
        yield Cell(f"ours_rate-{rate}", OURS, {"setting": "-", "value": "-", "rate": rate}, rate=float(rate))
    for setting, method in CONTROLS.items():
        for value, rate in product(values[setting], values["rate"]):
            factors = {"setting": setting, "value": value, "rate": rate}
            cell = Cell(f"{setting}-{value}_rate-{rate}", method, factors, rate=float(rate))
            if value == "ours" and setting == "replay_bytes":
                yield replace(cell, bytes_of=f"ours_rate-{rate}")
            else:
                yield replace(cell, settings={setting: int(value) if setting == "replay_bytes" else float(value)})


GRIDS: dict[str, Callable[[Values], Iterator[Cell]]] = {
    "ablation": _crossed,
    "dial": _one_at_a_time,
    "controls": _controls,
}
