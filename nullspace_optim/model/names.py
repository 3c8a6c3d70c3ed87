"""Parameter names: canonical, one a parameter even where weights are tied; and what of a parameter is on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """Return `name` without the components that compile, FSDP and checkpoint wrappers and parametrizations insert."""
    parts = [part for part in name.split(".") if part not in WRAPPER_COMPONENTS]
    if len(parts) >= 3 and parts[-3] == "parametrizations" and parts[-1] == "original":
        parts[-3:] = [parts[-2]]
    return ".".join(parts)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of `model` once, by canonical name (tied weights keep their first name)."""
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer of `model` once, by canonical name."""
    return {canonical_name(name): buffer for name, buffer in model.named_buffers()}


def names_by_identity(model: nn.Module) -> Mapping[int, str]:
    """Return `id(parameter) -> canonical name` for every parameter of `model`."""
    return {id(parameter): name for name, parameter in named_parameters(model).items()}


def present_parameters(model: nn.Module) -> Callable[[], dict[str, Tensor]]:
    """Return a function that gives the tensors which stand in the places of the parameters of `model` at that moment.

    FSDP2 puts whole parameters there for the duration of a forward pass. Names are canonical; tied weights keep their
    first name.
    """
    places: dict[int, tuple[str, dict[str, Any], str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = canonical_name(f"{prefix}.{name}" if prefix else name)
                places.setdefault(id(parameter), (full, module._parameters, name))
    return lambda: {full: table[name] for full, table, name in places.values()}
