"""Find the `NullSpaceOptimizer` inside what a framework made of it."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from ..optimizer.optimizer import NullSpaceOptimizer


def unwrap(optimizer: Any) -> NullSpaceOptimizer:
    """Return the `NullSpaceOptimizer` inside `optimizer`.

    Accelerate, Lightning, Fabric and learning-rate schedulers keep it as `.optimizer` or `._optimizer`. Lightning makes
    a subclass of it on the fly, so the innermost one is taken: only that one owns the bases.

    Raises:
        OptionError: there is none inside.
    """
    seen, inner = set[int](), optimizer
    while id(inner) not in seen:
        seen.add(id(inner))
        held = getattr(inner, "__dict__", {})
        inner = held.get("_optimizer", held.get("optimizer", inner))
    if not isinstance(inner, NullSpaceOptimizer):
        raise OptionError(
            f"there is no NullSpaceOptimizer inside {type(optimizer).__name__}: wrap the base optimizer before the "
            "framework does, NullSpaceOptimizer(AdamW(...))"
        )
    return inner
