"""Errors on one rank, raised on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import errors
from ..errors import ConsolidationError, NullSpaceError
from .collectives import all_gather_object
from .group import to_backend_device, world_size


@contextmanager
def raise_on_all_ranks(*, communicating: bool = False) -> Iterator[None]:
    """Run a block on every rank; if it fails on one, it fails on all of them with the same message.

    The error names the rank; it is of the same class if it is one of this library or an `OSError`, otherwise a
    `ConsolidationError`. A block that is `communicating` (the forward pass of a sharded model) may use collectives, the
    same ones in the same order on every rank: before each of them the ranks exchange whether one has failed, so
    that none waits for it. Any other block communicates only where all ranks do so before they can fail.
    """
    if world_size() == 1:
        yield
        return
    failure: BaseException | None = None
    asking = _Asking()
    try:
        with asking if communicating else nullcontext():
            yield
    except BaseException as error:
        failure = None if asking.told else error
    if not asking.told and not _one_failed(failure is not None):
        return
    told = all_gather_object(None if failure is None else _told(failure))
    if failure is not None and not isinstance(failure, Exception):
        raise failure
    number, words = next((number, words) for number, words in enumerate(told) if words is not None)
    raise _retold(number, *words) from failure


def _one_failed(here: bool) -> bool:
    """Return whether any rank has failed."""
    flag = to_backend_device(torch.tensor([float(here)]))
    dist.all_reduce(flag)
    return bool(flag)


class _ElsewhereError(BaseException):
    """Another rank has failed. Derives from `BaseException` so that `except Exception` in a model cannot swallow it."""


class _Asking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that exchanges, before every collective, whether a rank has failed; `told` is True once one has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.told = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Tensor) and kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it becomes ordinary operators, which come here again
        if _is_collective(func):
            self.told = self.told or _one_failed(False)
            if self.told:
                raise _ElsewhereError
        return func(*args, **(kwargs or {}))


def _is_collective(func: Any) -> bool:
    """Return whether an operator is one that all ranks of a group take part in."""
    if getattr(func, "namespace", "") not in ("c10d", "c10d_functional", "_c10d_functional"):
        return False
    return not func.__name__.startswith(("send", "recv", "wait_tensor"))


def _told(error: BaseException) -> tuple[str, str]:
    """Return the class and the text of `error`, with the notes attached to it."""
    ours = isinstance(error, NullSpaceError)
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return type(error).__name__ if ours else "OSError" if isinstance(error, OSError) else "", text + notes


def _retold(number: int, kind: str, text: str) -> Exception:
    found = OSError if kind == "OSError" else getattr(errors, kind or "ConsolidationError", ConsolidationError)
    error: Exception = found(f"rank {number}: {text}")
    return error
