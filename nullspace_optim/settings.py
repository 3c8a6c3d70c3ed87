"""Options of one optimizer, checked once and frozen: capture, consolidation and protection read the same object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from .covariance.sketch import SketchedCovariance
from .errors import OptionError
from .options import check_choice
from .policies.base import Policy
from .policies.energy import Energy

Project = Literal["update", "gradient", "both"]
Precision = Literal["exact", "fast"]
Uncovered = Literal["freeze", "train"]
Bias = Literal["freeze", "joint"]
NormStats = Literal["frozen", "train"]
Rows = Literal["relevant", "all"]
OnFull = Literal["warn", "raise"]

CHOICES: dict[str, tuple[str, ...]] = {
    "project": get_args(Project),
    "precision": get_args(Precision),
    "uncovered": get_args(Uncovered),
    "bias": get_args(Bias),
    "norm_stats": get_args(NormStats),
    "rows": get_args(Rows),
    "on_full": get_args(OnFull),
}


@dataclass(frozen=True)
class Settings:
    """Arguments of `NullSpaceOptimizer`, which describes each of them.

    Raises:
        OptionError: an unknown value, or a policy that a sketch cannot serve.
    """

    policy: Policy = field(default_factory=Energy)
    project: Project = "both"
    precision: Precision = "exact"
    uncovered: Uncovered = "freeze"
    bias: Bias = "freeze"
    norm_stats: NormStats = "frozen"
    rows: Rows = "relevant"
    on_full: OnFull = "warn"
    covariance: Literal["exact"] | SketchedCovariance = "exact"

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise OptionError(
                f"policy={self.policy!r}: expected a policy such as Energy(0.99), not {type(self.policy).__name__}"
            )
        if self.covariance != "exact" and self.sketch is None:
            raise OptionError(f"covariance={self.covariance!r}: expected 'exact' or a SketchedCovariance(size, above)")
        if self.sketch is not None:
            check_sketchable(self.policy)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)

    @property
    def sketch(self) -> SketchedCovariance | None:
        """Sketch of wide second moments; `None`: every second moment is held whole."""
        return self.covariance if isinstance(self.covariance, SketchedCovariance) else None

    @property
    def dtype(self) -> torch.dtype:
        """Accumulation type of second moments."""
        return torch.float64 if self.policy.precise else torch.float32


def is_sketchable(policy: Policy) -> bool:
    """Return whether a policy needs no whole second moments: it appends directions and keeps them fully."""
    soft = type(policy).scale is not Policy.scale or type(policy).members is not Policy.members
    return policy.merge == "append" and not (policy.batch_frobenius or soft)


def check_sketchable(policy: Policy) -> None:
    """Refuse policies that need whole second moments.

    Raises:
        OptionError: the policy merges second moments over tasks, or keeps directions by part.
    """
    if not is_sketchable(policy):
        raise OptionError(
            f"{type(policy).__name__} needs whole second moments, a SketchedCovariance has none: "
            'use covariance="exact", or a policy that appends, such as Energy or FixedRank'
        )
