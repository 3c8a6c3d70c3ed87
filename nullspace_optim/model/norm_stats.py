"""Running statistics that a past task relied on: such norm layers run as in `eval()` while everything else trains.

BatchNorm's running mean and variance move in every train-mode forward, whatever the optimizer does; so do the singular
vectors of `spectral_norm`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import ModelHook
from .names import named_buffers


class UseRunningStatistics(ModelHook):
    """Forward pre-hook of one norm layer: it runs as in `eval()` until `RestoreMode`."""

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self.interrupted: list[bool] = []

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Use the running statistics."""
        if self.owner is not None:
            self.interrupted.append(module.training)
            module.training = False


class RestoreMode(ModelHook):
    """Forward hook (called after an error too): back to the mode that the user set."""

    def __init__(self, before: UseRunningStatistics) -> None:
        super().__init__(before)
        self.before = before

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Restore the flag that `before` has changed."""
        if self.before.interrupted:
            module.training = self.before.interrupted.pop()


def freeze_statistics(model: nn.Module, buffers: Collection[str], owner: object) -> list[Any]:
    """Hook every module of `model` that owns running statistics named in `buffers`, while `owner` lives; return the
    handles.

    Running statistics are those of norm layers and the singular vectors of `spectral_norm`, old and new.
    """
    handles: list[Any] = []
    named = {id(buffer) for name, buffer in named_buffers(model).items() if name in buffers}
    for module in model.modules():
        if not any(id(module._buffers[name]) in named for name in _statistics(module)):
            continue
        before = UseRunningStatistics(owner)
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(RestoreMode(before), always_call=True))
    return handles


def statistics(model: nn.Module, buffers: Collection[str]) -> dict[str, Tensor]:
    """Return the buffers named in `buffers` that train-mode forwards of `model` move, by name."""
    moving = {
        id(buffer)
        for module in model.modules()
        if _statistics(module)
        for buffer in module.buffers(recurse=False)
        if buffer.is_floating_point()
    }
    return {name: b for name, b in named_buffers(model).items() if name in buffers and id(b) in moving}


def _statistics(module: nn.Module) -> list[str]:
    """Return the names of the buffers of `module` itself that its train-mode forward moves."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    spectral = [name for name in names if name == "_u" or f"{name.removesuffix('_u')}_orig" in module._parameters]
    return ["running_mean", *spectral] if "running_mean" in names else spectral


def forget_compiled() -> None:
    """Make compiled models notice hooks that come or go: compiled code does not look for hooks again by itself."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
