"""Optimizer state dicts: several bases in one, and the protection that travels with them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..errors import BasisFileError
from ..subspace.basis import BasisStore
from . import basis_file, validate

StateDict = dict[str, Any]
SOURCE = "the optimizer's state dict"


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
    parts, start = [], 0
    for count in groups:
        chosen = state["param_groups"][start : start + count]
        keys = [key for group in chosen for key in group["params"]]  # names, where DCP has been at work
        place = {key: number for number, key in enumerate(keys)}
        parts.append(
            {
                "state": {place[key]: value for key, value in state["state"].items() if key in place},
                "param_groups": [{**group, "params": [place[i] for i in group["params"]]} for group in chosen],
            }
        )
        start += count
    return parts


def carry(state: StateDict, store: BasisStore, record: StateDict) -> None:
    """Let the first parameter group of `state` carry `store` and `record` as text beside its fingerprint.

    torch.distributed.checkpoint keeps such text where it drops a ``"nullspace"`` entry: a key of a group is read again
    whatever it was before.
    """
    bases = base64.b64encode(basis_file.dumps(store, SOURCE)).decode()
    groups = state["param_groups"]
    first = next((group for group in groups if group["params"]), groups[0])
    first["nullspace"] = json.dumps({"fingerprint": first["nullspace"], "bases": bases, **record})


def pop_protection(state: StateDict) -> tuple[StateDict, Any, str | None]:
    """Return `state` without protection, the packed bases (or None) and the fingerprint its groups carry (or None).

    `state` itself is not changed.

    Raises:
        BasisFileError: the state's entries of protection are not those that `state_dict()` writes.
    """
    plain = {key: value for key, value in state.items() if key != "nullspace"}
    groups = state.get("param_groups", ())
    marks = [group["nullspace"] for group in groups if group.get("nullspace")]
    carried = [mark for mark in marks if isinstance(mark, str) and mark.startswith("{")]
    payload = _carried(carried[0]) if carried else None
    if payload is not None:
        marks = [payload["fingerprint"] if mark == carried[0] else mark for mark in marks]
    if any(not isinstance(mark, str) or mark != marks[0] for mark in marks):
        raise BasisFileError(f"the checkpoint's parameter groups carry different or foreign fingerprints: {marks[:3]}")
    if "param_groups" in state:
        plain["param_groups"] = [{key: value for key, value in group.items() if key != "nullspace"} for group in groups]
    return plain, _checked(state["nullspace"]) if "nullspace" in state else payload, marks[0] if marks else None


def read_store(payload: StateDict) -> BasisStore:
    """Return the bases in what `pop_protection` found.

    Raises:
        BasisFileError: they are damaged.
    """
    if "bases" in payload:
        return basis_file.loads(payload["bases"], SOURCE)
    return validate.unpack(payload["tensors"], payload["metadata"], source=SOURCE)


def lost_its_mark(state: StateDict) -> bool:
    """True if DCP has been at work on `state` (it names parameters) and no group has a mark, not even an empty one.

    A flattened state dict loses it on the way; the state of a bare optimizer never had one.
    """
    groups = state.get("param_groups", ())
    named = any(isinstance(key, str) for group in groups for key in group["params"])
    return named and not any("nullspace" in group for group in groups)


def seal(metadata: str, owed: StateDict) -> str:
    """Return a digest of what is owed (steps since the last exact correction, parameters that wait for one) and of
    the bases it belongs to.
    """
    text = json.dumps([metadata, owed["inexact_steps"], list(owed["pending"]), list(owed["allowed"])])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _carried(text: str) -> StateDict:
    """Return what `carry` wrote."""
    kinds = {"fingerprint": str, "inexact_steps": int, "pending": list, "allowed": list, "stateless": list}
    try:
        found: StateDict = json.loads(text)
        found["bases"] = base64.b64decode(found["bases"], validate=True)
    except (ValueError, TypeError, KeyError) as error:
        raise BasisFileError(f"the bases in the checkpoint's parameter groups are damaged ({error!r})") from None
    wrong = [key for key, kind in kinds.items() if type(found.get(key)) is not kind]
    if wrong:
        raise BasisFileError(f"the bases in the checkpoint's parameter groups lack {', '.join(wrong)}")
    return found


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
