"""The methods that are compared, one family a file; `METHODS` has them by name.

A new method is a child of `base.Method` in a file of its own and one entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from reference.errors import ExperimentError
from reference.methods.base import Method, Setting
from reference.methods.distillation import ZSCL, LwF
from reference.methods.finetune import FineTune, FineTunePerTask, Joint, MatchedPlasticity, WiseFT, ZeroShot
from reference.methods.gap import LoraKeyValue, MgClip
from reference.methods.gnsp import Gnsp, GnspExact, LossesOnly, ProjectionOnly
from reference.methods.igsp import ExpertsOfTasks
from reference.methods.lora import LoraPerTask, LoraShared, LoraSharedNullSpace
from reference.methods.moe import MoeAdapters
from reference.methods.nullspace import (
    Gradient,
    GradientReference,
    NullSpace,
    NullSpaceLosses,
    NullSpaceReference,
    RandomBasis,
)
from reference.methods.rehearsal import EWC, Replay
from reference.methods.sparse import LoRSU, LoRSURandom
from reference.methods.turns import FreeTurns, OrthSR, OrthSRFree

FAMILIES: tuple[tuple[type[Method], ...], ...] = (
    (ZeroShot, FineTune, FineTunePerTask, WiseFT, MatchedPlasticity, Joint),
    (LwF, ZSCL),
    (Gnsp, GnspExact, LossesOnly, ProjectionOnly),
    (Gradient, GradientReference, NullSpace, NullSpaceReference, NullSpaceLosses, RandomBasis),
    (Replay, EWC),
    (FreeTurns, OrthSR, OrthSRFree),
    (MgClip, LoraKeyValue, LoRSU, LoRSURandom),
    (ExpertsOfTasks, MoeAdapters, LoraPerTask, LoraShared, LoraSharedNullSpace),
)
METHODS: dict[str, type[Method]] = {method.name: method for family in FAMILIES for method in family}

__all__ = ["METHODS", "Method", "Setting", "chosen_methods", "refuse_unknown"]


def refuse_unknown(of_method: Mapping[str, Any]) -> None:
    """Refuse settings of methods that there are not.

    Raises:
        ExperimentError: naming the first of them, and the nearest method.
    """
    for name in of_method:
        if name not in METHODS:
            near = get_close_matches(name, METHODS, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS)}"
            raise ExperimentError(f"of_method has settings for {name!r}, which is no method: {advice}")


def chosen_methods(names: tuple[str, ...]) -> tuple[type[Method], ...]:
    """The classes of `names`; `all` stands for every method.

    Raises:
        ExperimentError: a name that is not a method.
    """
    for name in names:
        if name != "all" and name not in METHODS:
            raise ExperimentError(f"unknown method {name!r} in methods: choose from {', '.join(METHODS)}, or all")
    return tuple(METHODS.values()) if "all" in names else tuple(METHODS[name] for name in dict.fromkeys(names))
