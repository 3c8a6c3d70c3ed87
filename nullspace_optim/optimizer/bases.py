"""Base optimizers: which can be wrapped, which need other settings, and what they must forget."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import LBFGS, Optimizer

from ..distributed.fsdp import refuse_unsupported
from ..errors import NullSpaceWarning, OptionError
from ..protection.averaged_weights import refuse_unknown_modes
from ..settings import Settings
from .engine import Engine


def check_bases(bases: list[Any]) -> None:
    """Refuse what cannot be protected.

    Raises:
        OptionError: not an optimizer, wrapped already, without step hooks, with weights that cannot be reached,
            differentiable, LBFGS beside others, or a parameter in two bases.
    """
    if not bases:
        raise OptionError("base=[]: expected an optimizer or a list of optimizers")
    refuse_unsupported(bases)
    for base in bases:
        _check_base(base)
    if len(bases) > 1 and any(isinstance(base, LBFGS) for base in bases):
        raise OptionError("LBFGS evaluates its closure many times and cannot share a step: wrap it alone")
    owners: dict[int, tuple[int, Any]] = {}
    for number, base in enumerate(bases):
        for group in base.param_groups:
            for parameter in group["params"]:
                if id(parameter) in owners:
                    first = owners[id(parameter)][0]
                    where = f"bases {first} and {number}" if first != number else "the groups of its optimizer twice"
                    raise OptionError(
                        f"a parameter of shape {tuple(parameter.shape)} is in {where}: each parameter belongs to one "
                        "optimizer, once"
                    )
                owners[id(parameter)] = (number, group)


def forget_curvature(bases: list[Any]) -> None:
    """Drop the history of LBFGS: its curvature pairs lie in directions that may be kept from now on."""
    for base in bases:
        if isinstance(base, LBFGS):
            base.state.clear()


def _check_base(base: Any) -> None:
    if isinstance(getattr(base, "_core", None), Engine):
        raise OptionError("base is a NullSpaceOptimizer already: one wrapper is enough, use it or its detach()")
    if not isinstance(base, Optimizer) or not hasattr(base, "state") or not hasattr(base, "defaults"):
        raise OptionError(
            f"base={type(base).__name__}: expected a torch.optim.Optimizer with param_groups, state and defaults "
            "(one that keeps its own copies of the weights, as offloading optimizers do, would undo every correction)"
        )
    if not getattr(type(base).step, "hooked", False):
        raise OptionError(
            f"{type(base).__name__}.step() runs no step hooks (its class skips torch.optim.Optimizer.__init__), so "
            "nothing could be protected; use the optimizer inside it on its own"
        )
    if hasattr(base, "fused_backward"):
        raise OptionError(
            f"{type(base).__name__} moves the weights during the backward pass, outside step(), where kept directions "
            "cannot be held; use an optimizer that moves them in step()"
        )
    if any(isinstance(getattr(hook, "__self__", None), Engine) for hook in base._optimizer_step_pre_hooks.values()):
        raise OptionError(
            f"this {type(base).__name__} is wrapped already: call detach() on its NullSpaceOptimizer first"
        )
    refuse_unknown_modes(base)
    if any(group.get("differentiable") for group in base.param_groups):
        raise OptionError(
            f"{type(base).__name__}(differentiable=True): corrections cannot be differentiated through; "
            "use differentiable=False"
        )


def warn_adaptive_rate(bases: list[Any], options: Settings) -> None:
    """Warn of bases that estimate their rate from whole gradients, and diverge where a part of the step is undone."""
    names = [type(b).__name__ for b in bases if any(kind.__name__.startswith("DAdapt") for kind in type(b).__mro__)]
    if names and options.project == "update":
        warnings.warn(
            f"{names[0]} estimates its learning rate from gradients, of which a consolidation keeps a part out of the "
            "step: the estimate grows until the run diverges. Use project='both'",
            NullSpaceWarning,
            stacklevel=4,
        )
