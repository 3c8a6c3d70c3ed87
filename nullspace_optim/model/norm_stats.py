"""Keep running statistics that a past task relied on: such norm layers run as in `eval()` while everything else trains.

BatchNorm's running mean and variance move in every train-mode forward, whatever the optimizer does; so do the singular
vectors of `spectral_norm`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .names import named_buffers


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
    """Hook every module of `model` that owns running statistics named in `buffers`; return the handles.

    Running statistics are those of norm layers and the singular vectors of `spectral_norm`, old and new.
    """
    handles: list[Any] = []
    named = {id(buffer) for name, buffer in named_buffers(model).items() if name in buffers}
    for module in model.modules():
        if not any(id(module._buffers[name]) in named for name in _statistics(module)):
            continue
        hooks = FrozenStatistics()
        handles.append(module.register_forward_pre_hook(hooks.before, prepend=True))
        handles.append(module.register_forward_hook(hooks.after, always_call=True))
    return handles


def _statistics(module: nn.Module) -> list[str]:
    """Return the names of the buffers of `module` itself that its train-mode forward moves."""
    spectral = [
        name for name in module._buffers if name == "_u" or f"{name.removesuffix('_u')}_orig" in module._parameters
    ]
    return ["running_mean", *spectral] if "running_mean" in module._buffers else spectral


def forget_compiled() -> None:
    """Make compiled models notice hooks that come or go: compiled code does not look for hooks again by itself."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
