"""Keep running statistics that a past task relied on: such norm layers run as in `eval()` while everything else trains.

BatchNorm's running mean and variance move in every train-mode forward, whatever the optimizer does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .names import canonical


class ModelHook:
    """A forward hook of ours; `copied` is True on a model that was made by deepcopy or unpickling."""

    copied = False


class FrozenStatistics(ModelHook):
    """Forward hooks of one norm layer that switch it to evaluation for the duration of its forward."""

    def __init__(self) -> None:
        self.interrupted: list[bool] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, copied=True)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: use the running statistics."""
        self.interrupted.append(module.training)
        module.training = False

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook (also after an error): back to the mode the user set."""
        if self.interrupted:
            module.training = self.interrupted.pop()


def remove_copied_hooks(model: nn.Module) -> None:
    """Remove hooks of ours that came with a copy of a model, so that the copy's own optimizer can put its own."""
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                owner = getattr(hook, "__self__", hook)
                if isinstance(owner, ModelHook) and owner.copied:
                    del table[key]
                    module._forward_hooks_always_called.pop(key, None)


def freeze_statistics(model: nn.Module, buffers: Collection[str]) -> list[Any]:
    """Hook every module of `model` that owns running statistics named in `buffers`; return the handles."""
    handles: list[Any] = []
    for prefix, module in model.named_modules():
        if "running_mean" not in module._buffers or canonical(f"{prefix}.running_mean").lstrip(".") not in buffers:
            continue
        hooks = FrozenStatistics()
        handles.append(module.register_forward_pre_hook(hooks.before))
        handles.append(module.register_forward_hook(hooks.after, always_call=True))
    return handles
