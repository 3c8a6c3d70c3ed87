"""The figures that are to be reproduced, and what counts as reproduced.

ACC: mean accuracy on all tasks after the last, percent. BWT: mean over all tasks but the last of the final accuracy
less that right after training the task. Unless another source is named: the table printed in the CUBER paper (Lin et
al. 2022), five runs each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Published:
    """Mean and, where printed, deviation of ACC in percent; BWT in percent; where it stands."""

    accuracy: float
    deviation: float | None = None
    backward: float | None = None
    source: str = "CUBER paper"


FIGURES: dict[str, dict[str, Published]] = {
    table: {method: Published(**figure) for method, figure in rows.items()}
    for table, rows in yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text("utf-8")).items()
}


def verdict(mean: float, deviation: float | None, published: Published | None) -> str:
    """Say whether ours lies within the published deviation plus ours of the published mean."""
    if published is None:
        return "no published figure"
    difference = mean - published.accuracy
    if published.deviation is None or deviation is None:
        return f"{difference:+.2f}; no verdict: {'one seed' if deviation is None else 'no published deviation'}"
    within = abs(difference) <= published.deviation + deviation
    return f"{difference:+.2f}: {'reproduced' if within else 'not reproduced'}"
