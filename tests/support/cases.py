"""Every optimizer of `torch.optim` as a table: how it is built, and what its parameters must look like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from training import mlp

from nullspace_optim import NullSpaceOptimizer, NumericalRank

DECAY = 0.01


@dataclass(frozen=True)
class Case:
    """One way to build one optimizer class."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: Literal["plain", "closure", "sparse", "matrices"] = "plain"

    @property
    def id(self) -> str:
        """`AdamW-fused`, `SGD-momentum-nesterov`, ..."""
        shown = [
            key if value is True else f"{key}={value}"
            for key, value in self.options.items()
            if key not in ("lr", "weight_decay", "max_iter", "step_sizes")
        ]
        return "-".join([self.name, *shown])

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Return the optimizer for those of `parameters` that it accepts."""
        chosen = [p for p in parameters if p.requires_grad and (self.kind != "matrices" or p.ndim == 2)]
        optimizer: Optimizer = getattr(torch.optim, self.name)(chosen, **self.options)
        return optimizer

    @property
    def exists(self) -> bool:
        """False for classes newer than the installed torch."""
        return hasattr(torch.optim, self.name)


BASIC = [
    Case("ASGD", {"lr": 0.05, "weight_decay": DECAY}),
    Case("Adadelta", {"lr": 1.0, "weight_decay": DECAY}),
    Case("Adafactor", {"lr": 0.02, "weight_decay": DECAY}),
    Case("Adagrad", {"lr": 0.05, "weight_decay": DECAY}),
    Case("Adam", {"lr": 0.005, "weight_decay": DECAY}),
    Case("AdamW", {"lr": 0.005, "weight_decay": DECAY}),
    Case("Adamax", {"lr": 0.005, "weight_decay": DECAY}),
    Case("LBFGS", {"lr": 0.5, "max_iter": 3}, kind="closure"),
    Case("Muon", {"lr": 0.005, "weight_decay": DECAY}, kind="matrices"),
    Case("NAdam", {"lr": 0.005, "weight_decay": DECAY}),
    Case("RAdam", {"lr": 0.005, "weight_decay": DECAY}),
    Case("RMSprop", {"lr": 0.002, "weight_decay": DECAY}),
    Case("Rprop", {"lr": 0.005, "step_sizes": (1e-6, 0.02)}),
    Case("SGD", {"lr": 0.05, "weight_decay": DECAY}),
    Case("SparseAdam", {"lr": 0.01}, kind="sparse"),
]
EXTRA = [
    Case("Adam", {"lr": 0.005, "weight_decay": DECAY, "amsgrad": True}),
    Case("AdamW", {"lr": 0.005, "weight_decay": DECAY, "maximize": True}),
    Case("NAdam", {"lr": 0.005, "weight_decay": DECAY, "decoupled_weight_decay": True}),
    Case("RAdam", {"lr": 0.005, "weight_decay": DECAY, "decoupled_weight_decay": True}),
    Case("RMSprop", {"lr": 0.002, "weight_decay": DECAY, "momentum": 0.9, "centered": True}),
    Case("SGD", {"lr": 0.02, "weight_decay": DECAY, "momentum": 0.9}),
    Case("SGD", {"lr": 0.02, "weight_decay": DECAY, "momentum": 0.9, "nesterov": True}),
    Case("LBFGS", {"lr": 1.0, "max_iter": 3, "line_search_fn": "strong_wolfe"}, kind="closure"),
    Case("Muon", {"lr": 0.005, "weight_decay": DECAY, "momentum": 0.9, "nesterov": False}, kind="matrices"),
]
FUSED_ON_CPU = ("Adagrad", "Adam", "AdamW", "SGD")


def _variants(case: Case) -> list[Case]:
    """Return `case` with every implementation that its class offers on the CPU."""
    accepted = inspect.signature(getattr(torch.optim, case.name)).parameters if case.exists else {}
    flags: list[dict[str, Any]] = [{}]
    flags += [{"foreach": True}, {"foreach": False}] if "foreach" in accepted else []
    flags += [{"fused": True}] if case.name in FUSED_ON_CPU and "fused" in accepted else []
    return [Case(case.name, {**case.options, **flag}, case.kind) for flag in flags]


CASES = [case for case in [*(v for basic in BASIC for v in _variants(basic)), *EXTRA] if case.exists]


class Words(nn.Module):
    """An embedding with sparse gradients and nothing else to train: `[n, 4]` tokens to `[n, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).mean(1)


@dataclass
class Setting:
    """A model, inputs of an old task and the new task's data."""

    model: nn.Module
    old: Tensor
    inputs: Tensor
    targets: Tensor

    def loss(self) -> Tensor:
        """Return the new task's loss on all of its data."""
        loss: Tensor = (self.model(self.inputs) - self.targets).square().mean()
        return loss

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Return the outputs on the old task in evaluation mode and double precision."""
        training = self.model.training
        result: Tensor = self.model.eval()(self.old).double()
        self.model.train(training)
        return result


def setting(case: Case, dtype: torch.dtype = torch.float32) -> Setting:
    """Return a task that `case` can learn beside 6 old rows (fewer than half of every input dimension)."""
    torch.manual_seed(0)
    if case.kind == "sparse":
        words, rows = Words(), torch.randint(0, 30, (16, 4))
        return Setting(words, torch.randint(0, 12, (6, 4)), rows, torch.randn(16, 8))
    model, teacher = mlp(dtype=dtype), mlp(dtype=dtype)
    inputs = torch.randn(16, 24, dtype=dtype)
    with torch.no_grad():
        targets = 2 * teacher(inputs)
    return Setting(model, torch.randn(6, 24, dtype=dtype), inputs, targets)


def take_steps(optimizer: Optimizer, loss: Callable[[], Tensor], steps: int, closure: bool = False) -> None:
    """Train for so many full-batch steps."""

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()


def protected(case: Case, task: Setting, **options: Any) -> NullSpaceOptimizer:
    """Return `case` around the model of `task` with the old task consolidated exactly."""
    optimizer = NullSpaceOptimizer(case.build(task.model.parameters()), task.model, policy=NumericalRank(), **options)
    optimizer.consolidate([task.old], progress=False)
    return optimizer


def layer_rows(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return the input rows `[n, d]` in float64 of linear layers and convolutions, by hooks (an independent oracle)."""
    rows: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(_keep(rows, f"{name}.weight")))
    training = model.training
    with torch.no_grad():
        model.eval()(inputs)
    model.train(training)
    for handle in handles:
        handle.remove()
    return rows


def _keep(rows: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        x = args[0].detach()
        if isinstance(module, nn.Conv2d):
            x = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
        rows[name] = x.reshape(-1, x.shape[-1]).double()

    return hook


def span_drift(model: nn.Module, before: dict[str, Tensor], rows: dict[str, Tensor]) -> float:
    """Return the largest `||(W_t - W_0) X^T|| / ||W_0 X^T||` over layers, in float64."""
    worst = 0.0
    for name, x in rows.items():
        old = before[name].double().flatten(1)
        new = model.get_parameter(name).detach().double().flatten(1)
        worst = max(worst, float(((new - old) @ x.T).norm() / (old @ x.T).norm()))
    return worst
