"""Parameter names: canonical, one a parameter even where weights are tied; and what of a parameter is on this rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """Return `name` without the components that compile, FSDP and checkpoint wrappers and parametrizations insert."""
    parts = [part for part in name.split(".") if part not in WRAPPER_COMPONENTS]
    if len(parts) >= 3 and parts[-3] == "parametrizations" and parts[-1] == "original":
        parts[-3:] = [parts[-2]]
    return ".".join(parts)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return the canonical name of each of `names`; names that would become one keep their full form."""
    canonical = {name: canonical_name(name) for name in names}
    count = Counter(canonical.values())
    return {name: short if count[short] == 1 else name for name, short in canonical.items()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of `model` once, by canonical name (tied weights keep their first name)."""
    found = dict(model.named_parameters())
    return {name: found[full] for full, name in canonical_names(found).items()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer of `model` once, by canonical name."""
    found = dict(model.named_buffers())
    return {name: found[full] for full, name in canonical_names(found).items()}


def original_names(model: nn.Module) -> set[str]:
    """Return the canonical names of parameters from which a parametrization computes the weight of that name."""
    full = (name for name, _ in model.named_parameters())
    return {short for name, short in canonical_names(full).items() if ".parametrizations." in f".{name}" != f".{short}"}


def fused_name(name: str) -> str | None:
    """Return the weight that folding leaves in the place of the part `name`, `None` if it is no such part.

    Parts are those of `weight_norm` and other parametrizations of several tensors, old and new, and of pruning.
    """
    *path, last = name.split(".")
    if len(path) >= 2 and path[-2] == "parametrizations" and last.startswith("original"):
        return ".".join([*path[:-2], path[-1]])
    stem, mark, end = last.rpartition("_")
    return ".".join([*path, stem]) if mark and end in ("g", "v", "orig") else None


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
                full = f"{prefix}.{name}" if prefix else name
                places.setdefault(id(parameter), (full, module._parameters, name))
    names = canonical_names(full for full, _, _ in places.values())
    return lambda: {names[full]: table[name] for full, table, name in places.values()}
