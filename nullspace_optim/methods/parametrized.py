"""Weights under a parametrization of ours: checked, registered, and written back as plain weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import OptionError


class Parametrization(nn.Module):
    """Base class: `forward(weight)` is the weight in its place; `trained` says whether it trained before."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.trained = weight.requires_grad


def plain_weight(model: nn.Module, name: str, verb: str) -> Tensor:
    """Return the weight `name`, which has no parametrization and belongs to one module alone.

    Raises:
        OptionError: it is unknown, parametrized already or tied; `verb` names the function that asks.
    """
    path, _, leaf = name.rpartition(".")
    owners = dict(model.named_parameters(remove_duplicate=False))
    if f"{path}.parametrizations.{leaf}.original".lstrip(".") in owners:
        end = verb.replace("begin", "merge")
        raise OptionError(f"{verb}: '{name}' is parametrized already; {end} or remove what is there")
    if name not in owners:
        raise OptionError(f"{verb}: no parameter '{name}' in {type(model).__name__}")
    weight = owners[name]
    tied = [other for other, p in owners.items() if p is weight and other != name]
    if tied:
        raise OptionError(f"{verb}: '{name}' is tied to '{tied[0]}', which would not move with it: untie them")
    return weight


def register(model: nn.Module, name: str, parametrization: Parametrization) -> None:
    """Put the weight `name` under `parametrization`; it no longer trains itself."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    weight = module.get_parameter(leaf).requires_grad_(False)
    weight.grad = None  # a step would follow what is left there
    parametrize.register_parametrization(module, leaf, parametrization, unsafe=True)


@torch.no_grad()
def merge(model: nn.Module, kind: type[Parametrization]) -> list[str]:
    """Write every weight under a parametrization of `kind` as a plain one, and return their names."""
    merged = []
    for path, module in list(model.named_modules()):
        for leaf, chain in list(getattr(module, "parametrizations", {}).items()):
            if len(chain) == 1 and isinstance(chain[0], kind):
                value, trained = getattr(module, leaf).detach().clone(), chain[0].trained
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
                getattr(module, leaf).copy_(value).requires_grad_(trained)
                merged.append(f"{path}.{leaf}" if path else leaf)
    return merged
