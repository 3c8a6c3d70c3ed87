"""The methods that are compared, one family a file; `METHODS` has them by name.

A new method is a child of `base.Method` in a file of its own and one entry in `FAMILIES`.
"""

from __future__ import annotations

from reference.errors import ExperimentError
from reference.methods.base import Method, Setting
from reference.methods.distillation import ZSCL, LwF
from reference.methods.gnsp import Gnsp, GnspExact, LossesOnly, ProjectionOnly
from reference.methods.igsp import ExpertsOfTasks
from reference.methods.lora import LoraPerTask, LoraShared, LoraSharedNullSpace
from reference.methods.moe import MoeAdapters
from reference.methods.plain import FineTune, FineTunePerTask, Joint, MatchedPlasticity, WiseFT, ZeroShot
from reference.methods.projection import (
    Gradient,
    GradientReference,
    NullSpace,
    NullSpaceLosses,
    NullSpaceReference,
    RandomBasis,
)
from reference.methods.rehearsal import EWC, Replay

FAMILIES: tuple[tuple[type[Method], ...], ...] = (
    (ZeroShot, FineTune, FineTunePerTask, WiseFT, MatchedPlasticity, Joint),
    (LwF, ZSCL),
    (Gnsp, GnspExact, LossesOnly, ProjectionOnly),
    (Gradient, GradientReference, NullSpace, NullSpaceReference, NullSpaceLosses, RandomBasis),
    (Replay, EWC),
    (ExpertsOfTasks, MoeAdapters, LoraPerTask, LoraShared, LoraSharedNullSpace),
)
METHODS: dict[str, type[Method]] = {method.name: method for family in FAMILIES for method in family}

__all__ = ["METHODS", "Method", "Setting", "chosen_methods"]


def chosen_methods(names: tuple[str, ...]) -> tuple[type[Method], ...]:
    """The classes of `names`; `all` stands for every method.

    Raises:
        ExperimentError: a name that is not a method.
    """
    for name in names:
        if name != "all" and name not in METHODS:
            raise ExperimentError(f"unknown method {name!r} in methods: choose from {', '.join(METHODS)}, or all")
    return tuple(METHODS.values()) if "all" in names else tuple(METHODS[name] for name in dict.fromkeys(names))
