"""Policies as text, for command lines and files of settings."""

from __future__ import annotations

import ast
from typing import Any

from .. import policies
from ..errors import OptionError
from .base import Policy


def parse_policy(text: str, option: str) -> Policy:
    """Return the policy that `text` calls, such as ``Energy(0.99)``; only literal arguments are read.

    An error names `option`, where the text stands.

    Raises:
        OptionError: not a call of a known policy, or arguments it refuses.
    """
    known = {name: kind for name in policies.__all__ if _is_policy(kind := getattr(policies, name))}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in known:
            raise ValueError("none of these")
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        policy: Policy = known[call.func.id](*positional, **named)
    except (SyntaxError, ValueError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(
            f"{option} {text!a}: expected a call such as Energy(0.99) of one of {', '.join(known)} ({error})"
        ) from error
    return policy


def _is_policy(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Policy) and kind is not Policy
