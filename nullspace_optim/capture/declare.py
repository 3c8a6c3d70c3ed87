"""What a forward pass can tell a capture that operators alone do not show. Outside a capture all of it does nothing.

Two cases: a tensor stands for a parameter (a parametrization that leaves the parameter's inputs as they are), and a
parameter whose change reaches the output through rows that never meet it in a product (a prompt that is concatenated
to the tokens; see `policies.vpt_nsp` and `policies.pegp`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import CaptureError
from .aliases import Geometry, Kind, Origin
from .dispatch import CaptureMode


def stand_in(parameter: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Return `compute()`, of the shape of `parameter`; a capture takes the result for the parameter itself.

    Whoever calls this promises that keeping `parameter` on the rows that meet the result keeps the output.
    """
    watch = _active()
    if watch is None:
        return compute()
    watch.memory.knows(parameter)  # a framework may have put it in place a moment ago
    origin = watch.memory.origin(parameter)
    with watch.paused():
        result = compute()
        if origin.kind is Kind.ALIAS:
            strides = [int(parameter.shape[axis + 1 :].numel()) for axis in range(parameter.ndim)]
            geometry = Geometry(0, tuple(parameter.shape), tuple(strides))
            watch.memory.learn(result, Origin(Kind.ALIAS, origin.names, geometry))
    return result


def capturing() -> bool:
    """Whether a capture watches the forward pass in progress."""
    return _active() is not None


def declare_rows(parameter: Tensor, rows: Tensor, side: Literal["right", "left"] = "right") -> None:
    """Tell the capture in progress that `parameter` `[m, d]` (or `[g, m, d]`) meets `rows`; replaces what it saw.

    `rows` are `[n, d]` for side "right" (old outputs stay if the update vanishes on them), `[n, m]` for "left", with
    `[g, n, ...]` for a stack of matrices. The protection is as good as the claim: nothing else that reads the
    parameter counts any more.

    Raises:
        CaptureError: the rows do not fit the parameter.
    """
    watch = _active()
    if watch is None:
        return
    stack = rows.detach().reshape(-1, rows.shape[-1])[None] if parameter.ndim == 2 else rows.detach()
    groups = 1 if parameter.ndim == 2 else parameter.shape[0]
    size = parameter.shape[-1 if side == "right" else -2] if parameter.ndim in (2, 3) else -1
    if stack.ndim != 3 or (stack.shape[0], stack.shape[2]) != (groups, size):
        raise CaptureError(
            f"declare_rows: rows {tuple(rows.shape)} do not fit a parameter {tuple(parameter.shape)} on the {side} "
            "side; expected [n, d] or [n, m] for a matrix [m, d], with a leading [g] for a stack [g, m, d]"
        )
    for name in _names(watch, parameter):
        with watch.paused():
            watch.tally.declare(name, stack, side, batched=parameter.ndim == 3)


def _names(watch: CaptureMode, parameter: Tensor) -> tuple[str, ...]:
    """Return the names of `parameter`, which a framework may have put in place a moment ago."""
    watch.memory.knows(parameter)
    return tuple(watch.memory.origin(parameter).names)


def _active() -> CaptureMode | None:
    """Return the capture's watch of the forward pass in progress."""
    modes = reversed(_get_current_dispatch_mode_stack())
    return next((mode for mode in modes if isinstance(mode, CaptureMode)), None)
