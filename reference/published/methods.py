"""The methods of the tables: a base optimizer, a policy of the library, and what is projected.

A method is one entry of `methods.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.policies import CODECL, OWM, SGP, TRGP, EigenvalueRatio, Energy, Policy, Spectrum
from reference.errors import ExperimentError
from reference.published import sessions
from reference.published.protocols import Protocol


@dataclass(frozen=True)
class ByLayer(Policy):
    """A rule of GPM's family with another threshold for each layer, growing from task to task.

    Of the `layers` (name, rule) whose name begins the parameter's, the longest decides; `growth` is added to its
    threshold for each task before.
    """

    layers: tuple[tuple[str, Energy], ...]
    growth: float = 0.0

    def rank(self, spectrum: Spectrum) -> int:
        """Number of new directions that the layer's rule takes."""
        return self._of(spectrum).rank(spectrum)

    def scale(self, spectrum: Spectrum, take: int, before: Tensor | None) -> Tensor | None:
        """Strength with which the layer's rule keeps each direction."""
        return self._of(spectrum).scale(spectrum, take, before)

    def members(self, spectrum: Spectrum, take: int) -> Tensor | None:
        """Directions that the layer's rule counts as the task's own."""
        return self._of(spectrum).members(spectrum, take)

    def _of(self, spectrum: Spectrum) -> Energy:
        name = max((name for name, _ in self.layers if spectrum.name.startswith(name)), key=len)
        rule = dict(self.layers)[name]
        return replace(rule, threshold=rule.threshold + self.growth * spectrum.tasks)


@dataclass(frozen=True)
class Method:
    """Row of a table: optimizer, policy and training.

    `rate` None takes the protocol's. `policy` None trains without protection; a mapping has one a table, and rules of
    GPM's family take the protocol's thresholds. `options` are further ones of
    `NullSpaceOptimizer`; `changes` are, by table, settings of the protocol that are the method's own: where there are
    any, the method has settings for these tables alone. `session` is what
    happens around a task. `parts` are the optimizer's groups and `rates` the learning rate of each at the start of a
    task; None: one group at `rate`.
    """

    name: str
    title: str
    base: Literal["sgd", "adam", "adamw"] = "sgd"
    rate: float | None = None
    policy: Policy | Mapping[str, Policy] | None = None
    project: Literal["update", "gradient", "both"] = "gradient"
    session: Callable[[NullSpaceOptimizer, nn.Module, Protocol], sessions.Session] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    rates: Callable[[Optimizer, int], list[float]] | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate > 0:
            raise ExperimentError(f"rate={self.rate} of {self.name} must be positive")

    def on(self, protocol: Protocol) -> Protocol:
        """A table's protocol with the method's own settings.

        Raises:
            ExperimentError: it has some, but not for this table.
        """
        if self.changes and protocol.name not in self.changes:
            raise ExperimentError(f"--methods {self.name}: has settings for {', '.join(self.changes)} only")
        return replace(protocol, **self.changes.get(protocol.name, {}))

    def rule(self, protocol: Protocol) -> Policy | None:
        """The policy under `protocol`."""
        policy = self.policy[protocol.name] if isinstance(self.policy, Mapping) else self.policy
        return by_layer(policy, protocol) if isinstance(policy, Energy) else policy

    def optimizer(self, model: nn.Module, protocol: Protocol) -> Optimizer:
        """The optimizer of the whole sequence."""
        rate = self.rate_in(protocol)
        groups = list(model.parameters()) if self.parts is None else self.parts(model)
        base: Optimizer
        if self.base == "sgd":
            base = SGD(groups, lr=rate)
        else:
            base = (Adam if self.base == "adam" else AdamW)(groups, lr=rate, fused=True)
        if self.policy is None:
            return base
        projected = self.project_in(protocol)
        products = "fast" if protocol.precision == "bfloat16" and projected == "update" else "exact"
        options = {"project": projected, "precision": products, **self.options}
        return NullSpaceOptimizer(base, model, policy=self.rule(protocol), **options)

    def corrects_instead(self, protocol: Protocol) -> bool:
        """True where the weights are corrected although the published rule projects the gradient.

        A step of plain SGD is a multiple of the gradient, so both come to the same; a run in bfloat16 takes the
        correction, whose low-precision products lose no exactness.
        """
        return protocol.precision == "bfloat16" and self.base == "sgd" and self.policy is not None

    def project_in(self, protocol: Protocol) -> str | None:
        """Kind of projection, None without protection."""
        return None if self.policy is None else "update" if self.corrects_instead(protocol) else self.project

    def set_rates(self, optimizer: Optimizer, protocol: Protocol, task: int) -> None:
        """Give every group of `optimizer` its learning rate at the start of `task` (from 0)."""
        count = len(optimizer.param_groups)
        rates = [self.rate_in(protocol)] * count if self.rates is None else self.rates(optimizer, task)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate

    def rate_in(self, protocol: Protocol) -> float:
        """The learning rate at the start of each task."""
        return protocol.rate if self.rate is None else self.rate


def by_layer(rule: Energy, protocol: Protocol) -> ByLayer:
    """A rule with the protocol's thresholds."""
    layers = tuple((name, replace(rule, threshold=share)) for name, share in protocol.thresholds.items())
    return ByLayer(layers, protocol.growth)


def alone(
    kind: Callable[..., sessions.Session],
) -> Callable[[NullSpaceOptimizer, nn.Module, Protocol], sessions.Session]:
    """Sessions that need no protocol."""
    return lambda optimizer, model, protocol: kind(optimizer, model)


def trust(optimizer: NullSpaceOptimizer, model: nn.Module, protocol: Protocol) -> sessions.Session:
    """TRGP's trust regions: threshold 0.2 on permuted MNIST, else 0.5."""
    return sessions.TrustRegions(optimizer, model, 0.2 if protocol.name == "pmnist" else 0.5)


def trust_as_released(optimizer: NullSpaceOptimizer, model: nn.Module, protocol: Protocol) -> sessions.Session:
    """The same as TRGP's code runs it."""
    permuted = protocol.name == "pmnist"
    return sessions.ReleasedTrustRegions(optimizer, model, 0.2 if permuted else 0.5, third_alone=permuted)


def nscl_parts(model: nn.Module) -> list[dict[str, Any]]:
    """A group for each convolution, then one for normalisation, with L2 decay 5e-5; one for the heads, without."""
    parts: list[dict[str, Any]] = []
    norms, heads = [], []
    for name, parameter in model.named_parameters():
        if name.startswith("heads."):
            heads.append(parameter)
        elif parameter.ndim == 1:
            norms.append(parameter)
        else:
            parts.append({"params": [parameter], "weight_decay": 5e-5})
    return [*parts, {"params": norms, "weight_decay": 5e-5}, {"params": heads, "weight_decay": 0.0}]


def nscl_rates(optimizer: Optimizer, task: int) -> list[float]:
    """Convolutions 1e-4, from the second task on 5e-5 over the norm of their projector; norms 5e-4, heads 1e-3.

    The released code divides each projector by its Frobenius norm, the root of the number of free directions: that is
    a learning rate of its own for every matrix.
    """
    assert isinstance(optimizer, NullSpaceOptimizer)
    free = {
        id(optimizer.model.get_parameter(name)): sum(
            space.size - rank for space in basis.subspaces.values() for rank in space.ranks
        )
        for name, basis in optimizer.bases.items()
    }
    weights = [group["params"][0] for group in optimizer.param_groups[:-2]]
    first = [1e-4] * len(weights)
    later = [5e-5 / max(1, free.get(id(weight), 1)) ** 0.5 for weight in weights]
    return [*(later if task else first), 5e-4, 1e-3]


def without_head(model: nn.Module) -> list[dict[str, Any]]:
    """Everything but the head, which stays as it began."""
    return [{"params": [parameter for name, parameter in model.named_parameters() if not name.startswith("head.")]}]


# What `methods.yaml` names. GPM's rule is one direction short on the first task, as in its code, ours is not.
NAMED: dict[str, dict[str, Any]] = {
    "policy": {
        "gpm": Energy(paper_code=True), "trgp": TRGP(), "sgp": SGP(alpha=10.0, paper_code=True),
        "code-cl": CODECL(aperture=6.0), "default": Energy(), "owm": OWM(alpha=1.0),
        "nscl": EigenvalueRatio(10.0),  # free: what is within ten times the smallest eigenvalue
        "ours": {"pmnist": Energy(), "cifar100": SGP(alpha=30.0)},
    },
    "session": {
        "trust": trust, "trust-released": trust_as_released, "norms": alone(sessions.KeptNorms),
        "shared": alone(sessions.SharedConceptors), "shared-released": alone(sessions.ReleasedConceptors),
    },
    "parts": {"nscl": nscl_parts, "no-head": without_head},
    "rates": {"nscl": nscl_rates},
}  # fmt: skip
METHODS = {
    name: Method(name, **{key: NAMED[key][value] if key in NAMED else value for key, value in row.items()})
    for name, row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
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
