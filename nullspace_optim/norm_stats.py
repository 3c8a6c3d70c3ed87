"""Keep running statistics that a past task relied on: such norm layers run as in `eval()` while everything else trains.

BatchNorm's running mean and variance move in every train-mode forward, whatever the optimizer does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .names import canonical


class FrozenStatistics:
    """Forward hooks of one norm layer that switch it to evaluation for the duration of its forward."""

    def __init__(self) -> None:
        self.interrupted: list[bool] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: use the running statistics."""
        self.interrupted.append(module.training)
        module.training = False

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook (also after an error): back to the mode the user set."""
        if self.interrupted:
            module.training = self.interrupted.pop()


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
