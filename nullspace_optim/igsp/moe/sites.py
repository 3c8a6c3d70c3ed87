"""Modules that get experts: found by name pattern, measured by the linear maps inside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ...errors import OptionError


@dataclass(frozen=True)
class TargetModule:
    """One layer: its module and name, widths of input and output, and which axis of its input counts samples."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    batch_axis: int


def find_target_modules(model: nn.Module, patterns: Iterable[str]) -> list[TargetModule]:
    """Return the modules of `model` whose name matches one of `patterns`, outermost only, in order.

    Raises:
        OptionError: nothing matches, or a layer holds no linear map; lists names that exist.
    """
    patterns = tuple(patterns)
    named = {name: module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for name, module in named.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns) and not any(
            name.startswith(f"{outer}.") for outer in found
        ):
            found[name] = module
    if not found:
        linear = [name for name, module in named.items() if isinstance(module, nn.Linear)]
        some = ", ".join(f"'{name}'" for name in linear[:6])
        raise OptionError(
            f"IGSP(target_modules={patterns if len(patterns) > 1 else patterns[0]!r}) matches no layer of "
            f"{type(model).__name__}; its linear layers begin with: {some or 'none'}. Give a pattern of these names or "
            "of the blocks around them"
        )
    return [_site(name, module, model) for name, module in found.items()]


def refuse_narrow(sites: Iterable[TargetModule], rank: int) -> None:
    """Refuse experts of a `rank` that does not fit beside one of `sites`.

    Raises:
        OptionError: names the first such layer.
    """
    for site in sites:
        if rank > min(site.inputs, site.outputs):
            raise OptionError(
                f"IGSP(rank={rank}): larger than the layer '{site.name}' ({site.inputs} inputs, "
                f"{site.outputs} outputs); choose a smaller rank or other layers"
            )


def _site(name: str, module: nn.Module, model: nn.Module) -> TargetModule:
    inner = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if not inner:
        raise OptionError(
            f"IGSP(target_modules=...): '{name}' ({type(module).__name__}) holds no torch.nn.Linear, so its width is "
            "unknown; choose linear layers or blocks made of them"
        )
    return TargetModule(name, module, inner[0].in_features, inner[-1].out_features, _batch_axis(name, model))


def _batch_axis(name: str, model: nn.Module) -> int:
    """Return 1 inside modules with ``batch_first=False`` (older open_clip, `nn.Transformer`), else 0."""
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        around = (module, getattr(module, "self_attn", None))
        flags = [flag for flag in (getattr(m, "batch_first", None) for m in around) if isinstance(flag, bool)]
        if flags:
            return 0 if flags[0] else 1
    return 0
