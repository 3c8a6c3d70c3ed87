"""The methods that are compared, one family a file; `METHODS` has them by name, in the order of the files.

A new method is a child of `base.Method` with a `name`, in one of these files or in another that `FAMILIES` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from reference.errors import ExperimentError
from reference.methods import distillation, finetune, gap, gnsp, igsp, lora, moe, nullspace, rehearsal, sparse, turns
from reference.methods.base import Method, Setting

FAMILIES = (finetune, distillation, gnsp, nullspace, rehearsal, turns, gap, sparse, igsp, moe, lora)
METHODS: dict[str, type[Method]] = {
    thing.name: thing
    for family in FAMILIES
    for thing in vars(family).values()
    if isinstance(thing, type) and thing.__module__ == family.__name__ and "name" in vars(thing)
}

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
