"""Weights that a base optimizer keeps beside the model's, and the moment at which both are evaluated.

Schedule-Free (Defazio et al. 2024) takes gradients at `y = (1 - b) z + b x`, evaluates at the average `x`, holds `y`
(training) or `x` (evaluation) in the parameters and `z` in its state; `x` and `y` are exchanged by linear interpolation
with `z`. A kept direction is a linear condition `W U = A`. If it holds for `z` and for what the parameters hold, it
holds for every interpolation of the two, hence for `x` and `y` in either mode. So both are corrected after each step,
and a consolidation measures at `x` and aligns `z` with it: nothing of `x` changes. The slow weights of Lookahead (Zhang
et al. 2019) are interpolated in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from ..distributed.fsdp import reshard
from ..distributed.group import local_tensor
from ..errors import OptionError
from ..model.hooks import ModelHook

# Part of a class's name -> the entries of its state that hold weights ("x" and "y" in reference implementations).
SECOND_WEIGHTS = {"ScheduleFree": ("z", "x", "y"), "Lookahead": ("slow_params",)}


def state_keys(base: Optimizer) -> tuple[str, ...]:
    """Return the entries of `base.state[p]` that hold another set of weights."""
    return _keys_of(tuple(kind.__name__ for kind in type(base).__mro__))


@cache
def _keys_of(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for part, keys in SECOND_WEIGHTS.items() if any(part in name for name in names) for key in keys)


def second_weights(base: Optimizer, members: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield, for each set of weights that `base` keeps beside the parameters, its tensors for `members`."""
    for key in state_keys(base):
        found = [base.state[p][key] for p in members if p in base.state and key in base.state[p]]
        if len(found) == len(members):
            yield found


def has_modes(base: Any) -> bool:
    """True if `train()` and `eval()` of `base` exchange what the parameters hold."""
    return hasattr(base, "train_mode") or any("train_mode" in group for group in base.param_groups)


def refuse_unknown_modes(base: Any) -> None:
    """Refuse optimizers that exchange weights in a way that is not known to keep directions.

    Raises:
        OptionError: `base` has modes but is not Schedule-Free.
    """
    if has_modes(base) and not state_keys(base):
        raise OptionError(
            f"{type(base).__name__} exchanges the weights in train() and eval() for averages that it does not "
            "interpolate linearly, so kept directions cannot be held in both; use Schedule-Free or an optimizer "
            "with one set of weights, such as AdamW"
        )


def _training(base: Any) -> bool:
    return bool(getattr(base, "train_mode", False)) or any(group.get("train_mode") for group in base.param_groups)


class Evaluation:
    """The parameters of bases with modes while they hold the weights that are evaluated."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self.switched: list[Any] = [base for base in bases if has_modes(base) and _training(base)]
        self.kept = [
            (p, p.detach().clone()) for base in self.switched for group in base.param_groups for p in group["params"]
        ]
        for base in self.switched:
            base.eval()
        self.keep_changes = False


@contextmanager
def evaluated(bases: Sequence[Optimizer]) -> Iterator[Evaluation]:
    """Let the parameters hold what is evaluated (`x`, not `y`), and give the mode back on exit.

    Every bit of the parameters is as before on exit, unless the body sets `keep_changes`: then `train()` computes them
    anew from the second weights (which the body may have aligned).
    """
    moment = Evaluation(bases)
    try:
        yield moment
    finally:
        for base in moment.switched:
            base.train()
        if not moment.keep_changes:
            with torch.no_grad():
                for parameter, value in moment.kept:
                    parameter.detach().copy_(value)


class BeforeEvaluation(ModelHook):
    """Forward pre-hook of the model: an evaluation sees exact weights."""

    def __call__(self, model: nn.Module, *args: Any) -> None:
        """Apply pending exact corrections before an evaluation forward."""
        core = self.owner
        if core is None or model.training:
            return
        interrupted = [guard for step in core.protection.interrupted for guard in step.guards]
        if interrupted or core.protection.inexact_steps:
            pending = [g.parameter for g in core.protection.guards.values() if g.pending and not g.edited]
            pending += [p for guard in interrupted for p in guard.members]
            with ExitStack() as versions:  # a graph that waits for its backward pass stays usable
                for parameter in pending:
                    versions.enter_context(_unsafe_preserve_version_counter(local_tensor(parameter)))
                reshard(model)
                core.protection.make_exact()
            for guard in core.protection.guards.values():
                if any(guard.parameter is parameter for parameter in pending):
                    guard.mark()
