"""Parts of a step that users call by themselves (SAM's `first_step` and `second_step`), under the protection of a step.

torch runs step hooks around `step` alone. Classes with such methods are given the hooks of this library around each of
them, as torch gives hooks to `step` of a class; of optimizers that are not wrapped nothing changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from .step_hooks import Protection

PHASES = ("first_step", "second_step", "third_step", "ascent_step", "descent_step")
PACKAGE = f"{__name__.partition('.')[0]}."


def hook_phases(base: Optimizer) -> None:
    """Let every phase of `base` run the step hooks of its protection, where it is not called by `step()` itself."""
    kind: Any = type(base)
    for name in PHASES:
        method = getattr(kind, name, None)
        if callable(method) and not getattr(method, "hooked", False):
            setattr(kind, name, _hooked(method))


def _hooked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def phase(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, after = _ours(self, "_optimizer_step_pre_hooks"), _ours(self, "_optimizer_step_post_hooks")
        owners = [getattr(getattr(hook, "__self__", None), "protection", None) for hook in before]
        protection = next((owner for owner in owners if isinstance(owner, Protection)), None)
        if not before or (protection is not None and protection.calls_phase(self, method.__name__)):
            return method(self, *args, **kwargs)
        for hook in before:
            hook(self, (self,), {})
        if protection is None:
            return method(self, *args, **kwargs)
        with protection.finishing():
            result = method(self, *args, **kwargs)
            for hook in after:
                hook(self, (self,), {})
        return result

    phase.hooked = True  # type: ignore[attr-defined]
    return phase


def _ours(base: Any, table: str) -> list[Any]:
    """Return the step hooks that this library registered at `base`."""
    hooks = getattr(base, table, {}).values()
    return [hook for hook in hooks if str(getattr(hook, "__module__", "")).startswith(PACKAGE)]
