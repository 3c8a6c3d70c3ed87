"""The figures that are to be reproduced, and what counts as reproduced.

ACC: mean accuracy on all tasks after the last, percent. BWT: mean over all tasks but the last of the final accuracy
less that right after training the task. Unless another source is named: the table printed in the CUBER paper (Lin et
al. 2022), five runs each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Mean and, where printed, deviation of ACC in percent; BWT in percent; where it stands."""

    accuracy: float
    deviation: float | None = None
    backward: float | None = None
    source: str = "CUBER paper"


FIGURES: dict[str, dict[str, Published]] = {
    "pmnist": {
        "gpm": Published(93.91, 0.16, -3),
        "trgp": Published(96.34, 0.11, -0.8),
        "trgp-released": Published(96.34, 0.11, -0.8),
        **dict.fromkeys(("code-cl", "code-cl-released"), Published(96.56, None, None, "secondary page")),
    },
    "cifar100": {
        "gpm": Published(72.48, 0.40, -0.9),
        "trgp": Published(74.46, 0.32, -0.9),
        "trgp-released": Published(74.46, 0.32, -0.9),
        "sgp": Published(76.05, 0.43, None, "from memory, unverified"),  # BWT -0.01: of 1 or in percent?
        **dict.fromkeys(("code-cl", "code-cl-released"), Published(77.21, 0.32, -1.1, "from memory, unverified")),
    },
    "cifar100-resnet": {"adam-nscl": Published(73.76, None, -1.6, "logs of its authors")},
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
