"""Parameter group of the current task's experts in the wrapped optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..distributed.gradients import GradientAverage
from ..errors import OptionError
from .bank import ExpertBank
from .moe.layer import ExpertLayer
from .options import IGSP

MARK = "igsp"
FACTOR = 100.0


class ExpertParamGroup:
    """One marked group of the last base optimizer; the mark survives state dicts and copies."""

    def __init__(self, options: IGSP) -> None:
        self.options = options
        self._average = GradientAverage()
        self._apart = False

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"])  # type: ignore[misc]

    @property
    def base(self) -> Optimizer:
        """The last base, which is not kept alive."""
        base = self._base()
        assert base is not None
        return base

    @base.setter
    def base(self, base: Optimizer) -> None:
        self._base = weakref.ref(base)

    def check(self) -> None:
        """Refuse a base that cannot have a group of experts.

        Raises:
            OptionError: it takes one group only.
        """
        if isinstance(self.base, LBFGS):
            raise OptionError(
                "mode='igsp' trains experts in a parameter group of their own, and LBFGS takes one group only; wrap "
                "AdamW or another first-order optimizer"
            )

    def average(self) -> None:
        """Average the gradients of what trains now over the ranks, at the end of every backward pass."""
        self._average.follow(self.parameters)

    def open(self, bases: list[Optimizer]) -> None:
        """Add the group, empty; its rate is `IGSP(lr=...)`, or 100 x that of the first group."""
        first = bases[0].param_groups[0]
        rate = self.options.lr if self.options.lr is not None else FACTOR * first.get("initial_lr", first["lr"])
        self.base.add_param_group({"params": [], "lr": rate, MARK: True})

    def close(self) -> None:
        """Remove the group and its state."""
        for parameter in self.group["params"]:
            self.base.state.pop(parameter, None)
        self.base.param_groups.remove(self.group)
        self._average.follow(())

    @property
    def group(self) -> dict[str, Any]:
        """The group itself, a new object after every `load_state_dict`."""
        return next(group for group in self.base.param_groups if group.get(MARK))

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that train now."""
        return list(self.group["params"])

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Run the block; on any error give the group its parameters and their state back."""
        before = self.parameters
        states = {parameter: self.base.state[parameter] for parameter in before if parameter in self.base.state}
        try:
            yield
        except BaseException:
            for parameter in self.parameters:
                self.base.state.pop(parameter, None)
            self.group["params"][:] = before
            self.base.state.update(states)
            self.average()
            raise

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Take the group and its optimizer state out of the base inside the context."""
        group, states = self.group, {p: self.base.state.pop(p) for p in self.parameters if p in self.base.state}
        place = next(index for index, other in enumerate(self.base.param_groups) if other is group)
        del self.base.param_groups[place]
        self._apart = True
        try:
            yield
        finally:
            self._apart = False
            self.base.param_groups.insert(place, group)
            self.base.state.update(states)

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the group, and the optimizer state of each of its parameters in order (empty: none yet)."""
        settings = {key: value for key, value in self.group.items() if key != "params"}
        return {"settings": settings, "states": [dict(self.base.state.get(p, {})) for p in self.parameters]}

    @training.setter
    def training(self, state: dict[str, Any]) -> None:
        self.group.update(state["settings"])
        for parameter, values in zip(self.parameters, state["states"], strict=True):
            self.base.state.pop(parameter, None)
            if values:
                self.base.state[parameter] = {
                    key: value.to(parameter.device) if getattr(value, "shape", None) == parameter.shape else value
                    for key, value in values.items()
                }

    @property
    def count(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def active(self) -> bool:
        """True if any of them has a gradient and the group is not `apart`."""
        return not self._apart and any(p.grad is not None for p in self.parameters)

    def others(self, base: Optimizer) -> list[Tensor]:
        """Return the parameters of `base` outside the group: the backbone."""
        return [p for group in base.param_groups if not group.get(MARK) for p in group["params"]]

    def refresh(self, bank: ExpertBank) -> None:
        """Make the group hold exactly what trains now; delete the optimizer state of what left."""
        wanted = [p for layer in bank.layers for p in layer.trainable().values()]
        stay = {id(p) for p in wanted}
        group = self.group
        for parameter in group["params"]:
            if id(parameter) not in stay:
                self.base.state.pop(parameter, None)
        group["params"][:] = wanted
        self.average()

    @contextmanager
    def carry_state(self, layer: ExpertLayer, kept: Tensor) -> Iterator[None]:
        """Give the optimizer state of the rows `kept` `[E]` of a layer's router to the router that replaces it."""
        old = layer.router
        yield
        state = self.base.state.get(old)
        if layer.router is not old and state and layer.router.requires_grad:
            rows = _select_rows(state, old, kept)
            if rows is not None:
                self.base.state[layer.router] = rows


def _select_rows(state: dict[str, Any], old: nn.Parameter, kept: Tensor) -> dict[str, Any] | None:
    """Return `state` restricted to the rows `kept`; None if it holds tensors of another shape (it then starts anew)."""
    found = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape != old.shape:
            return None
        found[key] = value[kept].clone() if isinstance(value, torch.Tensor) and value.ndim else value
    return found
