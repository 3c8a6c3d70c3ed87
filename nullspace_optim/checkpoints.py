"""Optimizer state dicts: several bases in one, and the protection that travels with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import BasisFileError

StateDict = dict[str, Any]


def join_states(states: Sequence[StateDict]) -> StateDict:
    """Return one state dict `{"state", "param_groups"}` for several optimizers; parameter ids are renumbered in
    order.
    """
    if len(states) == 1:
        return dict(states[0])
    joined: StateDict = {"state": {}, "param_groups": []}
    offset = 0
    for state in states:
        count = sum(len(group["params"]) for group in state["param_groups"])
        joined["state"].update({key + offset: value for key, value in state["state"].items()})
        joined["param_groups"] += [
            {**group, "params": [i + offset for i in group["params"]]} for group in state["param_groups"]
        ]
        offset += count
    return joined


def split_states(state: StateDict, groups: Sequence[int]) -> list[StateDict]:
    """Undo `join_states` for optimizers with `groups` parameter groups each.

    Raises:
        BasisFileError: the number of groups differs.
    """
    if len(groups) == 1:
        return [state]
    if len(state["param_groups"]) != sum(groups):
        raise BasisFileError(
            f"the checkpoint has {len(state['param_groups'])} parameter groups, "
            f"the wrapped optimizers have {sum(groups)} together"
        )
    parts, start, offset = [], 0, 0
    for count in groups:
        chosen = state["param_groups"][start : start + count]
        size = sum(len(group["params"]) for group in chosen)
        parts.append(
            {
                "state": {
                    key - offset: value for key, value in state["state"].items() if offset <= key < offset + size
                },
                "param_groups": [{**group, "params": [i - offset for i in group["params"]]} for group in chosen],
            }
        )
        start, offset = start + count, offset + size
    return parts


def pop_protection(state: StateDict) -> tuple[StateDict, Any, str | None]:
    """Return `state` without protection, the packed bases (or None) and the fingerprint its groups carry (or None).

    `state` itself is not changed.
    """
    plain = {key: value for key, value in state.items() if key != "nullspace"}
    prints = {group.get("nullspace") for group in state.get("param_groups", ())} - {None}
    if "param_groups" in state:
        plain["param_groups"] = [
            {key: value for key, value in group.items() if key != "nullspace"} for group in state["param_groups"]
        ]
    return plain, state.get("nullspace"), prints.pop() if prints else None
