"""What a mode is: an object that the optimizer calls around each step and after each task, found by name.

`__init__` fills the registry, so that a mode and `optimizer` never import each other. Plain null-space protection is
the absence of a mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OptionError
from ..model.loader import LoaderPass
from ..protection.step_hooks import Protection
from ..report import ConsolidationReport
from ..subspace.basis import BasisStore, Extension

NULL_SPACE = "null-space"


class Host(Protocol):
    """What a mode may use of the optimizer it serves."""

    bases: list[Optimizer]
    store: BasisStore
    protection: Protection
    parameters: dict[str, Tensor]
    base_handles: list[Any]

    def owner(self) -> nn.Module:
        """Return the model."""

    def trainable(self) -> dict[str, Tensor]:
        """Return the trainable parameters of the model that the bases own, by name."""

    def take(self, store: BasisStore, parameters: dict[str, Tensor]) -> None:
        """Guard what `store` keeps."""


class Mode(Protocol):
    """The five methods of an optimizer's life, and the three that a user calls through the optimizer."""

    def attach(self, host: Host) -> None:
        """Begin to serve `host` (after construction, and again for a copy)."""

    def before_step(self, base: Optimizer) -> None:
        """Called before each step of `base`, before gradients are hidden."""

    def after_step(self, base: Optimizer) -> None:
        """Called after each step of `base`, after weights were corrected."""

    def consolidated(self, work: LoaderPass) -> ConsolidationReport:
        """Finish the task at work; all or nothing."""

    @property
    def state(self) -> Extension:
        """Everything that a file or checkpoint must hold of the mode."""

    @state.setter
    def state(self, state: Extension) -> None: ...

    def task(self, name: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
        """Run the model for one finished task, for the task of each sample, or for none in particular."""

    def status(self) -> Any:
        """Tell what the mode is doing and why."""

    def regularization(self) -> Tensor:
        """Return a scalar to add to the loss."""


@runtime_checkable
class ModeOptions(Protocol):
    """Options of a mode, which can build it."""

    def build(self) -> Mode:
        """Return a new mode with these options."""


MODES: dict[str, Callable[[], ModeOptions]] = {}


def built(mode: str | ModeOptions) -> Mode | None:
    """Return the mode that the argument ``mode=`` asks for, None for plain null-space protection.

    Raises:
        OptionError: no mode of this name.
    """
    if mode == NULL_SPACE:
        return None
    if isinstance(mode, str) and mode in MODES:
        return MODES[mode]().build()
    if isinstance(mode, ModeOptions) and not isinstance(mode, type):
        return mode.build()
    known = ", ".join(map(repr, (NULL_SPACE, *MODES)))
    raise OptionError(f"mode={mode!r}: expected one of {known}, or options such as IGSP(rank=8)")
