"""Weights under a parametrization of ours: found, checked, registered, and written back as plain weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import OptionError
from ..model.names import canonical_name


class Parametrization(nn.Module):
    """Base class: `forward(weight)` is the weight in its place; `trained` says whether it trained before."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.trained = weight.requires_grad

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in its place, computed in at least float32, under autocast too, and rounded once."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            return self.changed(weight.to(wide)).to(weight.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight in its place, of the dtype of `weight`."""
        raise NotImplementedError


def place_of(model: nn.Module, name: str, verb: str) -> tuple[nn.Module, str]:
    """Return the module that holds the weight `name`, as bases or `model` name it, and its name there.

    Raises:
        OptionError: it is unknown; `verb` names the function that asks.
    """
    every = [full for full, _ in model.named_parameters(remove_duplicate=False)]
    known = {name_of(full): full for full in every for name_of in (canonical_name, _plain_name, str)}
    if name not in known:
        raise OptionError(f"{verb}: no parameter '{name}' in {type(model).__name__}")
    path, _, leaf = _plain_name(known[name]).rpartition(".")
    return model.get_submodule(path), leaf


def _plain_name(full: str) -> str:
    """Return the name under which the model reads the parameter `full`, with those of wrappers."""
    parts = full.split(".")
    return ".".join([*parts[:-3], parts[-2]]) if parts[-3:-2] == ["parametrizations"] else full


def plain_weight(model: nn.Module, name: str, verb: str) -> Tensor:
    """Return the weight `name`, which has no parametrization and belongs to one module alone.

    Raises:
        OptionError: it is unknown, parametrized already or tied; `verb` names the function that asks.
    """
    module, leaf = place_of(model, name, verb)
    if leaf in getattr(module, "parametrizations", {}):
        end = verb.replace("begin", "merge")
        raise OptionError(f"{verb}: '{name}' is parametrized already; {end} or remove what is there")
    weight = module.get_parameter(leaf)
    names = [other for other, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) > 1:
        other = next(other for other in names if name not in (other, canonical_name(other)))
        raise OptionError(f"{verb}: '{name}' is tied to '{other}', which would not move with it: untie them")
    return weight


def register(model: nn.Module, name: str, parametrization: Parametrization, verb: str) -> None:
    """Put the weight `name` under `parametrization`; it no longer trains itself."""
    module, leaf = place_of(model, name, verb)
    weight = module.get_parameter(leaf).requires_grad_(False)
    weight.grad = None  # a step would follow what is left there
    _own_class(module)
    parametrize.register_parametrization(module, leaf, parametrization, unsafe=True)


@torch.no_grad()
def merge(model: nn.Module, kind: type[Parametrization]) -> list[str]:
    """Write every weight under a parametrization of `kind` as a plain one, and return their names.

    Raises:
        OptionError: another parametrization was put on one of them later; nothing is merged.
    """
    found = [
        (f"{path}.{leaf}".lstrip("."), module, leaf, chain)
        for path, module in model.named_modules()
        for leaf, chain in dict(
            module._modules.get("parametrizations") or {}
        ).items()  # its own: compile hands on others'
        if any(isinstance(part, kind) for part in chain)
    ]
    for name, _, _, chain in found:
        if len(chain) > 1:
            others = ", ".join(type(part).__name__ for part in chain if not isinstance(part, kind))
            raise OptionError(f"'{name}' has a parametrization beside {kind.__name__} ({others}): remove that first")
    for _, module, leaf, chain in found:
        value, trained = getattr(module, leaf).detach().clone(), chain[0].trained
        _own_class(module)
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
        getattr(module, leaf).copy_(value).requires_grad_(trained)
    return [canonical_name(name) for name, *_ in found]


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: torch lets copies share it, and edits it in place."""
    if parametrize.is_parametrized(module):
        kind: Any = type(module)
        body = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, body)
