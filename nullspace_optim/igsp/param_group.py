"""Parameter group of the current task's experts in the wrapped optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..distributed.gradients import GradientAverage
from ..errors import NullSpaceWarning, OptionError
from ..model.names import named_parameters
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
        self._held: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "held": self._held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"])  # type: ignore[misc]
        self._held = state.get("held")

    @property
    def base(self) -> Optimizer:
        """The last base, which is not kept alive."""
        base = self._base()
        assert base is not None
        return base

    @base.setter
    def base(self, base: Optimizer) -> None:
        self._base = weakref.ref(base)

    def _rate(self, bases: Sequence[Optimizer]) -> Any:
        """Return `IGSP(lr=...)`, or 100 x the rate of the first group."""
        first = bases[0].param_groups[0]
        return FACTOR * first.get("initial_lr", first["lr"]) if self.options.lr is None else self.options.lr

    def check(self, bases: Sequence[Optimizer]) -> None:
        """Refuse a base that cannot have a group of experts.

        Raises:
            OptionError: it takes one group only, or gives experts no rate.
        """
        if isinstance(self.base, LBFGS):
            raise OptionError(
                "mode='igsp' trains experts in a parameter group of their own, and LBFGS takes one group only; wrap "
                "AdamW or another first-order optimizer"
            )
        if not self._rate(bases):
            raise OptionError(
                "IGSP(lr=None) takes 100 x the learning rate of the first parameter group, which is 0: give "
                "IGSP(lr=...)"
            )

    def average(self) -> None:
        """Average the gradients of what trains now over the ranks, at the end of every backward pass."""
        self._average.follow(self.parameters)

    def open(self, bases: Sequence[Optimizer]) -> None:
        """Add the group, empty."""
        self.base.add_param_group({"params": [], "lr": self._rate(bases), MARK: True})
        if getattr(self.base.step, "_wrapped_by_lr_sched", getattr(self.base.step, "_with_counter", False)):
            text = "does not know the experts' parameter group: make it after the NullSpaceOptimizer"
            warnings.warn(f"the learning-rate scheduler of this optimizer {text}", NullSpaceWarning, stacklevel=6)

    def tell_held(self, bases: Sequence[Optimizer], model: nn.Module) -> None:
        """Warn of parameters in `bases` that a user left trainable by choice, or has added since: experts alone train.

        Nothing is said where the optimizer simply holds the whole model.
        """
        if self._apart:
            return
        _ = self.group  # or the error that it is gone
        count = sum(len(group["params"]) for base in bases for group in base.param_groups if not group.get(MARK))
        known, self._held = self._held, count
        if count == known:
            return
        held = [p for base in bases for p in self.others(base)]
        names = {id(p): name for name, p in named_parameters(model).items() if not name.startswith(f"{MARK}.")}
        wish = [p for p in held[known or 0 :] if p.requires_grad]
        if known is None and {id(p) for p in wish} == set(names):
            return
        if wish:
            wish.sort(key=lambda p: id(p) in names)
            listed = ", ".join(names.get(id(p), f"one outside the model {tuple(p.shape)}") for p in wish[:3])
            warnings.warn(
                f"mode 'igsp' trains experts alone: {len(wish)} parameters in the optimizer ({listed}"
                f"{', ...' if len(wish) > 3 else ''}) stay as they are; a head needs an optimizer of its own",
                NullSpaceWarning,
                stacklevel=6,
            )

    def close(self) -> None:
        """Remove the group and its state."""
        for parameter in self.group["params"]:
            self.base.state.pop(parameter, None)
        self.base.param_groups.remove(self.group)
        self._average.follow(())

    @property
    def group(self) -> dict[str, Any]:
        """The group itself, a new object after every `load_state_dict`.

        Raises:
            OptionError: the base has lost it.
        """
        for group in self.base.param_groups:
            if group.get(MARK):
                return group  # type: ignore[no-any-return]
        raise OptionError(
            "the experts' parameter group is not in the optimizer: its param_groups were replaced, or a state without "
            "experts was loaded into the base; load a state_dict() of this NullSpaceOptimizer"
        )

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
