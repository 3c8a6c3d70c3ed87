"""Hooks on the user's model: they act for a living owner only, and never on a copy of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..errors import HookError


class ModelHook:
    """A forward hook that acts for `owner`, to which it holds a weak reference.

    `owner` is `None` once the object is gone, and on copies of the model: the hook then does nothing. A pickled model
    needs no module of this package: the hook is pickled as the `__exit__` of a null context, which takes any arguments.
    """

    def __init__(self, owner: Any = None) -> None:
        self._owner: Callable[[], Any] = (lambda: None) if owner is None else weakref.ref(owner)

    @property
    def owner(self) -> Any:
        """The object for which the hook acts, `None` if there is none."""
        return self._owner()

    @property
    def __name__(self) -> str:
        """Refuse torch.jit.script, which asks every hook for its name and then compiles its source.

        Raises:
            HookError: always.
        """
        raise HookError(
            "this model carries hooks of NullSpaceOptimizer, which torch.jit.script cannot compile: call opt.detach() "
            "first (for a copy: before copying), or use torch.export or torch.jit.trace"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHook:
        return ModelHook()

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")

    def __call__(self, *args: Any) -> Any:
        """Do nothing."""


def remove_idle_hooks(model: nn.Module) -> None:
    """Remove hooks of this library whose owner is gone, and those that came with a copy of a model."""
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                unpickled = isinstance(getattr(hook, "__self__", None), nullcontext)
                if unpickled or (isinstance(hook, ModelHook) and hook.owner is None):
                    del table[key]
                    module._forward_hooks_always_called.pop(key, None)
