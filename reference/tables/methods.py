"""The methods of the tables: a base optimizer, a policy of the library, and what is projected.

A method is one entry of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from nullspace_optim import Energy, NullSpaceOptimizer, Policy, Spectrum
from reference.errors import ExperimentError
from reference.tables.protocols import Protocol


@dataclass(frozen=True)
class ByLayer(Policy):
    """Another policy for each layer: of the entries whose name begins the parameter's name, the longest decides."""

    layers: tuple[tuple[str, Policy], ...]

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """How many directions of each spectrum (keys begin with the parameter's name) its layer's policy takes."""
        return {key: min(self._of(key).rank(spectrum), spectrum.free) for key, spectrum in spectra.items()}

    def _of(self, key: str) -> Policy:
        return max((len(name), policy) for name, policy in self.layers if key.startswith(name))[1]


@dataclass(frozen=True)
class Method:
    """How one row of a table is trained.

    `rate` None takes the protocol's. `policy` None trains without protection.
    """

    name: str
    title: str
    base: Literal["sgd", "adamw"] = "sgd"
    rate: float | None = None
    policy: Callable[[Protocol], Policy] | None = None
    project: Literal["update", "gradient", "both"] = "gradient"

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate > 0:
            raise ExperimentError(f"rate={self.rate} of {self.name} must be positive")

    def optimizer(self, model: nn.Module, protocol: Protocol) -> Optimizer:
        """The optimizer of the whole sequence."""
        rate = self.rate_in(protocol)
        base = (
            SGD(model.parameters(), lr=rate) if self.base == "sgd" else AdamW(model.parameters(), lr=rate, fused=True)
        )
        if self.policy is None:
            return base
        return NullSpaceOptimizer(base, model, policy=self.policy(protocol), project=self.project)

    def rate_in(self, protocol: Protocol) -> float:
        """The learning rate at the start of each task."""
        return protocol.rate if self.rate is None else self.rate


def gpm(protocol: Protocol) -> Policy:
    """GPM's rule with its thresholds, one direction short on the first task as in its code."""
    return ByLayer(tuple((name, Energy(share, paper_code=True)) for name, share in protocol.thresholds.items()))


METHODS = {
    method.name: method
    for method in (
        Method("sgd", "SGD, no protection"),
        Method("gpm", "GPM", policy=gpm),
        Method("adamw", "AdamW, no protection", base="adamw", rate=1e-3),
        Method("adamw-gradient", "AdamW, gradient projected before it", base="adamw", rate=1e-3, policy=gpm),
        Method("adamw-update", "AdamW, ours", base="adamw", rate=1e-3, policy=gpm, project="update"),
        Method("adamw-both", "AdamW, ours, gradient as well", base="adamw", rate=1e-3, policy=gpm, project="both"),
    )
}


def chosen_methods(names: str) -> list[Method]:
    """The methods of a list of names separated by commas.

    Raises:
        ExperimentError: a name that is not a method.
    """
    unknown = [name for name in names.split(",") if name not in METHODS]
    if unknown:
        raise ExperimentError(f"--methods: unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    return [METHODS[name] for name in dict.fromkeys(names.split(","))]
