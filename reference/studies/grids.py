"""The cells of each grid: which method runs with which settings, and what varies.

* `ablation`: every combination of project moment, layers, pool consolidated or not, losses on the pool or not, and
  energy threshold.
* `dial`: our method with one setting changed at a time, between standing still and learning freely; and plain
  fine-tuning at several rates, the curve to beat.
* `controls`: every rival with several values of its own setting, and our method, to which two of them are matched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from reference.config import Config, for_method
from reference.errors import ExperimentError

Values = Mapping[str, tuple[str, ...]]
Finished = Mapping[str, dict[str, Any]]  # figures of finished cells of one seed, by name
OURS = "nullspace-reference"

DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "ablation": {
        "moment": ("gradient", "update", "both"),
        "layers": ("gnsp", "vision", "all"),
        "pool": ("no", "yes"),
        "losses": ("no", "yes"),
        "energy": ("0.95", "0.99"),
    },
    "dial": {
        "energy": ("0.85", "0.9", "0.95", "0.99", "0.999", "0.9999"),
        "rate": ("0.25", "0.5", "2", "4"),
        "layers": ("gnsp", "vision"),
        "sgp_alpha": ("1", "10", "100"),
        "prune_bound": ("0.001", "0.01", "0.05"),
        "finetune": ("0.05", "0.1", "0.25", "0.5", "1"),
    },
    "controls": {
        "rate": ("1",),
        "matched_share": ("0.02", "0.05", "0.1", "0.2", "0.4"),
        "ewc_weight": ("10", "100", "1000", "10000", "100000"),
        "wise_share": ("0.2", "0.35", "0.5", "0.65", "0.8"),
        "ensemble_share": ("0.02", "0.05", "0.1", "0.2"),
        "replay_bytes": ("ours",),
    },
}
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
        """What differs from the settings that the method has in `config`."""
        changed = dict(self.settings)
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
        found = list(GRIDS[grid](values))
    except (ValueError, KeyError) as error:
        raise ExperimentError(f"--values: {error}: not a value that this factor can have") from error
    if not found:
        raise ExperimentError(f"--values leave no cell of {grid}: give every factor a value")
    return found


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
