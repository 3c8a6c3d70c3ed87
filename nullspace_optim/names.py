"""Parameter names: canonical, one a parameter even where weights are tied."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical(name: str) -> str:
    """Return `name` without the components that compile, FSDP and checkpoint wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_COMPONENTS)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of `model` once, by canonical name (tied weights keep their first name)."""
    return {canonical(name): parameter for name, parameter in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer of `model` once, by canonical name."""
    return {canonical(name): buffer for name, buffer in model.named_buffers()}


def names_by_identity(model: nn.Module) -> Mapping[int, str]:
    """Return `id(parameter) -> canonical name` for every parameter of `model`."""
    return {id(parameter): name for name, parameter in named_parameters(model).items()}
