"""The kernel of the library: keep a weight's action on protected directions fixed. Pure functions on tensors.

Shapes: a weight is a stack of matrices `W` `[g, m, d]` (see `layout`). A right basis `U` is `[g, d, k]` and protects
`W U` `[g, m, k]`; a left basis is `[g, m, k]` and protects `U^H W` `[g, k, d]`; a row index `[k]` protects
`W[0, index]` `[k, d]`. Zero columns of `U` protect nothing and cost nothing in exactness.

Functions whose name ends in `_` write into their first argument. Half-precision weights are corrected in float32 and
rounded once. Products never use TF32, or bfloat16 in place of float32, unless `low_precision` asks for it, whatever
the global flags and autocast say: `W U - A` is smaller than TF32's error in `W U`.

The projections are those of GPM (Saha et al. 2021) and Adam-NSCL (Wang et al. 2021), applied to
what the base optimizer really did; the anchor form `W <- W - (W U - A) U^H` is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .layout import MatrixSide, Side

_ANCHOR_FLOOR = 1e-2


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply matrices on `device` in full float32: no TF32, no bfloat16 passes, no autocast."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    flags: Any = getattr(backend, "matmul", None)
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    if hasattr(flags, "fp32_precision"):
        before, exact = flags.fp32_precision, "ieee"
        allow: Callable[[str], None] = partial(setattr, flags, "fp32_precision")
    else:  # torch before 2.9 has one flag for all devices
        before, exact, allow = torch.get_float32_matmul_precision(), "highest", torch.set_float32_matmul_precision
    if before == exact and not autocast:  # as inside another `exact_products`
        yield
        return
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        allow(exact)
        try:
            yield
        finally:
            allow(before)


@torch.no_grad()
def anchor(weight: Tensor, basis: Tensor, side: Side) -> Tensor:
    """Return what must not change: `W U` `[g, m, k]`, `U^H W` `[g, k, d]`, or the rows `[k, d]` of the index `basis`.

    The result is float32 for half-precision weights, otherwise in the weight's dtype.
    """
    if side == "rows":
        return _wide(weight[0].index_select(0, basis))
    wide = _wide(weight)
    with exact_products(weight.device):
        basis = basis.to(wide.dtype)
        return wide @ basis if side == "right" else basis.mH @ wide


@torch.no_grad()
def restore_anchor_(weight: Tensor, basis: Tensor, kept: Tensor, side: Side, workspace: Tensor | None = None) -> Tensor:
    """Correct `W` `[g, m, d]` so that its anchor is `kept` again, changing nothing outside the protected span.

    `W <- W - (W U - A) U^H` (right) or `W <- W - U (U^H W - A)` (left): `4 m d k` operations, and no memory besides
    the residual, which goes into `workspace` (shape and dtype of the anchor) if one is given.
    """
    if side == "rows":
        return restore_rows_(weight, basis, kept)
    wide = _wide(weight)
    basis, kept = basis.to(wide.dtype), kept.to(wide.dtype)
    with exact_products(weight.device):
        residual = torch.baddbmm(kept, *_pair(wide, basis, side), beta=-1, out=workspace)
        _subtract_lifted_(wide, residual, basis, side)
    return _write_back_(weight, wide)


@torch.no_grad()
def yield_anchor_(weight: Tensor, basis: Tensor, kept: Tensor, scale: Tensor, side: MatrixSide) -> Tensor:
    """Let the share `1 - s` of the movement along each protected direction through, and `kept` follow it, both in
    place; return the part that was taken out of `W` `[g, m, d]`, in coordinates of `U` (the shape of `kept`).

    With `R = W U - A` (right): `A <- A + R diag(1 - s)` and `W <- W - R diag(s) U^H`. Because `A` is always what `W U`
    shall be, that equals `project_difference_` with `scale`, without a copy of the weight before the step, and a
    direction with `s = 1` has the constant anchor of `restore_anchor_`.
    """
    wide = _wide(weight)
    basis, share = basis.to(wide.dtype), scale.to(kept.dtype).unsqueeze(-2 if side == "right" else -1)
    with exact_products(weight.device):
        residual = torch.baddbmm(kept.to(wide.dtype), *_pair(wide, basis, side), beta=-1)
        kept.add_(residual.to(kept.dtype) * (1 - share))
        removed = residual * share.to(wide.dtype)
        _subtract_lifted_(wide, removed, basis, side)
    _write_back_(weight, wide)
    return removed


@torch.no_grad()
def shift_anchor_(kept: Tensor, basis: Tensor, removed: Tensor, other: Tensor, side: MatrixSide) -> Tensor:
    """Take out of the anchor `kept` of `side` what `removed` took out of the weight along the basis `other` of the
    opposite side: `A <- A - (V C) U` (right) or `A <- A - U^H (C V^H)` (left); return it.
    """
    basis, other = basis.to(removed.dtype), other.to(removed.dtype)
    with exact_products(kept.device):
        lifted = other @ (removed @ basis) if side == "right" else (basis.mH @ removed) @ other.mH
        return kept.sub_(lifted.to(kept.dtype))


@torch.no_grad()
def restore_rows_(weight: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """Write the kept rows `[k, d]` back into the rows `index` `[k]` of `W` `[1, m, d]`; return it. Exact."""
    weight[0].index_copy_(0, index, kept.to(weight.dtype))
    return weight


@torch.no_grad()
def project_difference_(
    weight: Tensor,
    previous: Tensor,
    basis: Tensor,
    side: MatrixSide,
    scale: Tensor | None = None,
    low_precision: torch.dtype | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Remove from the change `W - previous` its part in the span of `U`; return `W` `[g, m, d]`.

    `W <- W - ((W - previous) U) diag(s) U^H` (right) or `W <- W - U diag(s) (U^H (W - previous))` (left). `scale`
    `[g, k]` in 0..1 protects softly (SGP, Saha and Roy 2023), 1 by default. Where `W` equals `previous` it stays as
    it is.

    `low_precision` (bfloat16) is the dtype of the products; the differences are taken in the weight's precision, so
    the error is relative to the change, not to the weight. `basis` may then already have that dtype. An anchor `kept`
    follows, in place, the share that `scale` lets through.
    """
    wide = _wide(weight)
    product = low_precision or wide.dtype
    basis = basis.to(product)
    with exact_products(weight.device):
        inside = torch.bmm(*_pair((wide - previous).to(product), basis, side))
        if scale is not None:
            share = scale.unsqueeze(-2 if side == "right" else -1)
            if kept is not None:
                kept.add_(inside.to(kept.dtype) * (1 - share).to(kept.dtype))
            inside *= share.to(product)
        if product == wide.dtype:
            _subtract_lifted_(wide, inside, basis, side)
        else:
            wide.sub_(_lift(inside, basis, side))
    return _write_back_(weight, wide)


@torch.no_grad()
def project_difference_complement_(
    weight: Tensor, previous: Tensor, complement: Tensor, side: MatrixSide, low_precision: torch.dtype | None = None
) -> Tensor:
    """Keep of the change `W - previous` only its part in the span of the complement `N`; return `W` `[g, m, d]`.

    `W <- previous + ((W - previous) N) N^H` (right) or `W <- previous + N (N^H (W - previous))` (left): the same
    projection as `project_difference_`, cheaper when more than half of all directions are protected. `low_precision`
    likewise.
    """
    wide = _wide(weight)
    product = low_precision or wide.dtype
    complement = complement.to(product)
    with exact_products(weight.device):
        free = torch.bmm(*_pair((wide - previous).to(product), complement, side))
        if product == wide.dtype == previous.dtype:
            torch.baddbmm(previous, *_lift_pair(free, complement, side), out=wide)
        else:
            wide.copy_(previous).add_(_lift(free, complement, side))
    return _write_back_(weight, wide)


@torch.no_grad()
def project_gradient_(gradient: Tensor, basis: Tensor, side: MatrixSide, scale: Tensor | None = None) -> Tensor:
    """Remove from a gradient `[g, m, d]` its part in the span of `U`: `G <- G - (G U) U^H` (GPM), or left.

    With `scale` `[g, k]` the share `s` of it: `G <- G - (G U) diag(s) U^H` (SGP).
    """
    wide = _wide(gradient)
    basis = basis.to(wide.dtype)
    with exact_products(gradient.device):
        inside = torch.bmm(*_pair(wide, basis, side))
        if scale is not None:
            inside *= scale.to(inside.dtype).unsqueeze(-2 if side == "right" else -1)
        _subtract_lifted_(wide, inside, basis, side)
    return _write_back_(gradient, wide)


@torch.no_grad()
def subtract_coordinates_(weight: Tensor, coordinates: Tensor, basis: Tensor, side: MatrixSide) -> Tensor:
    """Subtract `C U^H` (right) or `U C` (left) from `W` `[g, m, d]`, for coordinates `C` found elsewhere; return it."""
    wide = _wide(weight)
    with exact_products(weight.device):
        _subtract_lifted_(wide, coordinates.to(wide.dtype), basis.to(wide.dtype), side)
    return _write_back_(weight, wide)


@torch.no_grad()
def project_gradient_complement_(gradient: Tensor, complement: Tensor, side: MatrixSide) -> Tensor:
    """Keep of a gradient `[g, m, d]` only its part in the span of the complement `N`: `G <- (G N) N^H`, or left.

    The same projection as `project_gradient_`, cheaper when more than half of all directions are protected.
    """
    wide = _wide(gradient)
    complement = complement.to(wide.dtype)
    with exact_products(gradient.device):
        free = torch.bmm(*_pair(wide, complement, side))
        torch.bmm(*_lift_pair(free, complement, side), out=wide)
    return _write_back_(gradient, wide)


@torch.no_grad()
def anchor_drift(weight: Tensor, basis: Tensor, kept: Tensor, side: Side) -> Tensor:
    """Return `||W U - A||_F / ||A||_F` as a 0-dimensional tensor, without waiting for the device.

    Where `A` vanishes beside `W` (below `1e-2 ||W||_F`, as for a zero weight or a basis in its null space) the drift
    is relative to `1e-2 ||W||_F`, since rounding is relative to `W`; it is 0 if the weight and its anchor are both
    zero.
    """
    now = anchor(weight, basis, side)
    kept = kept.to(now.dtype)
    moved = torch.linalg.vector_norm(now - kept)
    size = torch.maximum(torch.linalg.vector_norm(kept), _ANCHOR_FLOOR * torch.linalg.vector_norm(_wide(weight)))
    drift: Tensor = moved / size.clamp(min=torch.finfo(size.dtype).tiny)
    return drift


def _wide(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _write_back_(target: Tensor, wide: Tensor) -> Tensor:
    """Round `wide` into `target` if it is a copy of it; return `target`."""
    return target if wide is target else target.copy_(wide)


def _pair(matrix: Tensor, basis: Tensor, side: MatrixSide) -> tuple[Tensor, Tensor]:
    """Return the factors of the coordinates `W U` (right) or `U^H W` (left)."""
    return (matrix, basis) if side == "right" else (basis.mH, matrix)


def _lift_pair(coordinates: Tensor, basis: Tensor, side: MatrixSide) -> tuple[Tensor, Tensor]:
    """Return the factors of `C U^H` (right) or `U C` (left)."""
    return (coordinates, basis.mH) if side == "right" else (basis, coordinates)


def _lift(coordinates: Tensor, basis: Tensor, side: MatrixSide) -> Tensor:
    """Return `C U^H` (right) or `U C` (left) `[g, m, d]`."""
    return torch.bmm(*_lift_pair(coordinates, basis, side))


def _subtract_lifted_(matrix: Tensor, coordinates: Tensor, basis: Tensor, side: MatrixSide) -> None:
    """Subtract `C U^H` (right) or `U C` (left) from `matrix` `[g, m, d]` in place, without a temporary."""
    matrix.baddbmm_(*_lift_pair(coordinates, basis, side), alpha=-1)
