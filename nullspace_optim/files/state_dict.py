"""Optimizer state dicts: several bases in one, and the protection that travels with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..errors import BasisFileError

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

    Raises:
        BasisFileError: the state's entries of protection are not those that `state_dict()` writes.
    """
    plain = {key: value for key, value in state.items() if key != "nullspace"}
    groups = state.get("param_groups", ())
    marks = [group["nullspace"] for group in groups if group.get("nullspace")]
    if any(not isinstance(mark, str) or mark != marks[0] for mark in marks):
        raise BasisFileError(f"the checkpoint's parameter groups carry different or foreign fingerprints: {marks[:3]}")
    if "param_groups" in state:
        plain["param_groups"] = [{key: value for key, value in group.items() if key != "nullspace"} for group in groups]
    return plain, _checked(state["nullspace"]) if "nullspace" in state else None, marks[0] if marks else None


def seal(metadata: str, owed: StateDict) -> str:
    """Return a digest of what is owed (steps since the last exact correction, parameters that wait for one) and of
    the bases it belongs to.
    """
    text = json.dumps([metadata, owed["inexact_steps"], list(owed["pending"]), list(owed["allowed"])])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked(payload: Any) -> StateDict:
    """Return the ``"nullspace"`` entry of a checkpoint if it is made as `state_dict()` makes it."""
    kinds = {"tensors": dict, "metadata": str, "inexact_steps": int, "pending": list, "allowed": list, "seal": str}
    if not isinstance(payload, dict) or set(payload) != set(kinds):
        found = sorted(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
        raise BasisFileError(f"the checkpoint's 'nullspace' entry holds {found}, expected {sorted(kinds)}")
    for key, kind in kinds.items():
        if type(payload[key]) is not kind:
            raise BasisFileError(
                f"the checkpoint's 'nullspace' entry has a {type(payload[key]).__name__} under {key!r}, "
                f"expected {kind.__name__}"
            )
    kinds_right = all(isinstance(name, str) for name in payload["pending"])
    kinds_right &= all(isinstance(drift, float) for drift in payload["allowed"])
    if not kinds_right or payload["seal"] != seal(payload["metadata"], payload):
        raise BasisFileError("the checkpoint's 'nullspace' entry does not match its seal: it was damaged or edited")
    return payload
