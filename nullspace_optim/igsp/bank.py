"""All experts of one model: a silent child module, and the forward hooks that consult it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from .experts import Silent
from .layer import ExpertLayer, Scope
from .options import IGSP
from .sites import find_sites, refuse_narrow

CHILD = "igsp"


class Bank(Silent):
    """One `ExpertLayer` a layer, as children whose names are those of the layers with ``/`` for ``.``."""

    def __init__(self, layers: list[ExpertLayer], scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self.handles: list[Any] = []
        for layer in layers:
            self.add_module(layer.name.replace(".", "/"), layer)

    @property
    def layers(self) -> list[ExpertLayer]:
        """The layers in the order of the model."""
        return [layer for layer in self._modules.values() if isinstance(layer, ExpertLayer)]

    def remove(self, model: nn.Module) -> None:
        """Take the hooks and this module away from `model`."""
        for handle in self.handles:
            handle.remove()
        model._modules.pop(CHILD, None)

    def count(self) -> tuple[int, int]:
        """Return how many parameters the frozen experts have, and how many all routers and prototypes."""
        experts = sum(value.numel() for layer in self.layers for value in layer.history.values())
        routers = sum(
            value.numel() for layer in self.layers for record in layer.routers() for value in record.buffers()
        )
        return experts, routers


def installed(model: nn.Module, options: IGSP) -> Bank:
    """Put experts beside the layers of `model` that the options name; return their bank.

    Raises:
        OptionError: no layer matches, an expert does not fit a layer, or the model carries experts already.
    """
    if hasattr(model, CHILD):
        raise OptionError(
            f"{type(model).__name__} already carries experts (its attribute '{CHILD}'): detach() the optimizer that "
            "put them there, or take an unchanged copy of the model"
        )
    sites, scope = find_sites(model, options.patterns), Scope()
    refuse_narrow(sites, options.width)
    layers = [ExpertLayer(site, options, scope, number, _device(site.module)) for number, site in enumerate(sites)]
    bank = Bank(layers, scope)
    for site, layer in zip(sites, layers):
        bank.handles.append(site.module.register_forward_hook(layer.attend, with_kwargs=True))
    bank.train(model.training)
    model.add_module(CHILD, bank)
    return bank


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
