"""Carried here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..covariance.sketch import SketchedCovariance
from ..errors import OptionError
from ..policies.base import Policy
from ..policies.energy import Energy
from ..protection.guard import Precision
from .grow_sketched import check_sketchable


@dataclass(frozen=True)
class ConsolidationOptions:
    """What is measured and how much of it is protected (see `NullSpaceOptimizer`)."""

    policy: Policy = field(default_factory=Energy)
    rows: Literal["relevant", "all"] = "relevant"
    bias: Literal["freeze", "joint"] = "freeze"
    uncovered: Literal["freeze", "train"] = "freeze"
    on_full: Literal["warn", "raise"] = "warn"
    covariance: Literal["exact"] | SketchedCovariance = "exact"
    precision: Precision = "exact"

    @property
    def sketch(self) -> SketchedCovariance | None:
        """Which second moments are sketched, `None`: none."""
        return self.covariance if isinstance(self.covariance, SketchedCovariance) else None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise OptionError(
                f"policy={self.policy!r}: expected a policy such as Energy(0.999), not {type(self.policy).__name__}"
            )
        if self.covariance != "exact" and self.sketch is None:
            raise OptionError(f"covariance={self.covariance!r}: expected 'exact' or a SketchedCovariance(size, above)")
        if self.sketch is not None:
            check_sketchable(self.policy)
        choices = {
            "rows": ("relevant", "all"),
            "bias": ("freeze", "joint"),
            "uncovered": ("freeze", "train"),
            "on_full": ("warn", "raise"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, allowed))}")
