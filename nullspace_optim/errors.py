"""Every error this library raises on purpose. Each message names the parameter, file or key and the way out."""

from __future__ import annotations


class NullSpaceError(Exception):
    """Base class of all errors raised by `nullspace_optim`."""


class OptionError(NullSpaceError, ValueError):
    """An option has a value outside its allowed range; the message states the range."""


class ModelNotFoundError(NullSpaceError):
    """The module that owns the wrapped parameters could not be found or is ambiguous."""


class BatchError(NullSpaceError):
    """A batch could not be fed to the model; the message names its type and the way out, `forward=`."""


class CaptureError(NullSpaceError):
    """The inputs that met a weight could not be observed (non-finite rows, a filled autocast cache)."""


class ConsolidationError(NullSpaceError):
    """A consolidation could not be completed; nothing was changed."""


class PruningError(NullSpaceError):
    """Pruning would remove the last expert of a layer, or more than the stated bound; nothing was removed."""


class StaleAnchorError(NullSpaceError):
    """A protected weight was edited outside the optimizer; `reanchor()` accepts the edit."""


class ShapeError(NullSpaceError):
    """A parameter has another shape than its stored basis."""


class BasisFileError(NullSpaceError):
    """A basis file or a protected checkpoint is damaged, foreign or does not fit the model."""


class HookError(NullSpaceError, AttributeError):
    """A hook of this library was asked for what it has not, such as source that torch.jit.script could compile."""


class NullSpaceWarning(UserWarning):
    """A limit of protection in this run; the text names the way out."""
