"""Modules that get experts: selected by name as in PEFT, measured by the linear maps inside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from ...errors import OptionError
from ..options import ALL_LINEAR


@dataclass(frozen=True)
class TargetModule:
    """One layer: its module and name, widths of input and output, and which axis of its input counts samples."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    batch_axis: int


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear map, None for other modules.

    Linear maps are `nn.Linear` and GPT-2's `Conv1D`, a linear map whose weight `[inputs, outputs]` is transposed.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, nn.Parameter) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None


def find_target_modules(model: nn.Module, target_modules: str | Sequence[str]) -> list[TargetModule]:
    """Return the modules of `model` that `target_modules` selects as in PEFT, outermost only, in order.

    A module that the model holds under several names is found by any and gets its experts under the first.

    A list selects the modules whose name is an entry or ends with ``.entry``; a string is a regular expression that
    the whole name matches; ``"all-linear"`` selects every linear map but the layer of `get_output_embeddings()`.

    Raises:
        OptionError: an entry matches nothing (names the nearest names), or a layer holds no linear map.
    """
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    first = {module: name for name, module in reversed(named.items())}
    if target_modules == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {name for name, module in named.items() if linear_widths(module) and module is not output}
        entries = {ALL_LINEAR: chosen}
    elif isinstance(target_modules, str):
        expression = re.compile(target_modules)
        entries = {target_modules: {name for name in named if expression.fullmatch(name)}}
    else:
        entries = {entry: {name for name in named if f".{name}".endswith(f".{entry}")} for entry in target_modules}
    for entry, names in entries.items():
        if not names:
            raise OptionError(_unmatched(entry, target_modules, model, named))
    found: dict[str, nn.Module] = {}
    chosen = {first[named[name]] for names in entries.values() for name in names}
    for name in filter(chosen.__contains__, named):
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = named[name]
    return [_site(name, module, model) for name, module in found.items()]


def _unmatched(entry: str, target_modules: object, model: nn.Module, named: Mapping[str, nn.Module]) -> str:
    """Return the message for an entry that matches nothing."""
    usable = [name for name, module in named.items() if any(map(linear_widths, module.modules()))]
    last = dict.fromkeys(name.rpartition(".")[2] for name in usable)
    near = dict.fromkeys([*get_close_matches(entry, usable, 3), *get_close_matches(entry.rpartition(".")[2], last, 3)])
    linear = [name for name in usable if linear_widths(named[name])]
    names = ", ".join(f"'{name}'" for name in ([*near] or linear)[:6]) or "none"
    return (
        f"IGSP(target_modules={target_modules!r}): '{entry}' matches no layer of {type(model).__name__}; "
        f"{'the nearest names are' if near else 'its linear layers begin with'}: {names}. Give a list of names or "
        "of their ends after a dot, a regular expression that whole names match, or 'all-linear'"
    )


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
    inner = [widths for widths in map(linear_widths, module.modules()) if widths]
    if not inner:
        raise OptionError(
            f"IGSP(target_modules=...): '{name}' ({type(module).__name__}) holds no torch.nn.Linear or Conv1D, so its "
            "width is unknown; choose linear layers or blocks made of them"
        )
    return TargetModule(name, module, inner[0][0], inner[-1][1], _batch_axis(name, model))


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
