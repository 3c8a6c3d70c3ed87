"""Modes: objects that the optimizer calls around each step and after each task.

The package of a mode registers it, so that a mode and `optimizer` never import each other. Plain null-space protection
is the absence of a mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OptionError
from ..model.loader import LoaderPass
from ..report import ConsolidationReport
from ..subspace.basis import BasisStore, Extension

NULL_SPACE = "null-space"
GONE = (
    "detach() took the experts away: save() still writes them, make a new NullSpaceOptimizer over the model and load "
    "there"
)


class Host(Protocol):
    """The parts of an optimizer that its mode may use."""

    store: BasisStore
    parameters: dict[str, Tensor]

    @property
    def bases(self) -> list[Optimizer]:
        """The wrapped optimizers."""

    def owner(self) -> nn.Module:
        """Return the model."""

    def take(self, store: BasisStore, parameters: dict[str, Tensor]) -> None:
        """Protect what `store` keeps of `parameters`."""


class Mode(Protocol):
    """The life of a mode beside an optimizer, and what a user asks of it through `opt.mode`."""

    def attach(self, host: Host) -> None:
        """Begin to serve `host`: after construction, and again for a copy."""

    def detach(self) -> None:
        """Take everything away that `attach` added to model and optimizer."""

    def before_step(self, base: Optimizer) -> list[Tensor]:
        """Return the parameters that the coming step of `base` must leave as they are."""

    def add_penalty(self) -> None:
        """Add the gradient of a penalty; called once all gradients of a step are there, before any is hidden."""

    def after_step(self, base: Optimizer) -> None:
        """Note a step of `base`, after weights were corrected."""

    def consolidate(self, work: LoaderPass) -> ConsolidationReport:
        """Finish the task at work; all or nothing."""

    @property
    def state(self) -> Extension:
        """Everything that a file or checkpoint must hold of the mode."""

    @state.setter
    def state(self, state: Extension) -> None: ...

    def apart(self) -> AbstractContextManager[None]:
        """Take the parameters that the mode trains, with their state, out of the optimizer inside the context."""

    @property
    def training(self) -> dict[str, Any]:
        """Optimizer state and settings of these parameters, as tensors and plain values."""

    @training.setter
    def training(self, state: dict[str, Any]) -> None: ...

    def task(self, name: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
        """Run the model for one finished task, for the task of each sample, or for none in particular."""

    def drifts(self) -> dict[str, tuple[float, float]]:
        """Return the relative change of parameters without a basis that should have stood still, and its limit."""

    def reanchor(self) -> None:
        """Let these parameters stand still where they are now."""

    def status(self) -> Any:
        """Return the present phase and the reason for it."""

    def regularization(self) -> Tensor:
        """Return a scalar to add to the loss."""


Options = TypeVar("Options")
MODES: dict[str, tuple[type, Callable[[Any], Mode]]] = {}


def register_mode(name: str, options: type[Options], build: Callable[[Options], Mode]) -> None:
    """Register a mode: ``mode=name`` takes the default `options`, and an instance of `options` is a mode as well."""
    MODES[name] = options, build


def build_mode(mode: object, model: nn.Module | None) -> Mode | None:
    """Return a new mode for the argument ``mode=``, None for plain null-space protection.

    Raises:
        OptionError: no mode of this name, or no model for its experts.
    """
    if isinstance(mode, str) and mode == NULL_SPACE:
        return None
    chosen = _named_mode(mode)
    if model is None:
        raise OptionError(f"mode={mode!r} adds experts to the model at once: pass it, model=")
    return chosen


def _named_mode(mode: object) -> Mode:
    if isinstance(mode, str) and mode in MODES:
        options, build = MODES[mode]
        return build(options())
    for options, build in MODES.values():
        if isinstance(mode, options):
            return build(mode)
    known = ", ".join(map(repr, (NULL_SPACE, *MODES)))
    raise OptionError(f"mode={mode!r}: expected one of {known}, or options such as IGSP(rank=8)")
