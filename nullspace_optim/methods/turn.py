"""Orthogonal turns of a frozen weight: in blocks of its inputs (OFT, OrthSR), or inside its free directions.

Blocks (OrthSR, arXiv 2407.08374, with the parametrization of OFT): `W' = W diag(Q_1 .. Q_r)` for a weight `W` `[m, d]`
and `r` blocks `[d/r, d/r]` of its inputs. Free: with the stored directions `M` and the free ones `N` `[d, k]`,
`W' = W + W N (Q - I) N^T`. Then `W' M = W M`: inputs within the stored directions see nothing, under any optimizer and
decay, and no step has to be corrected. In both `W' W'^T = W W^T`: outputs keep their norms and angles to each other.

`Q = (I - S) (I + S)^-1` (Cayley) with `S = (R - R^T) / 2`; `R` trains and is zero at first, so `W' = W`. The control
without orthogonality, of equal size, is `Q = I + R`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import NullSpaceWarning, OptionError, ShapeError
from ..model.names import canonical_name
from ..optimizer.optimizer import NullSpaceOptimizer
from .parametrized import Parametrization, merge, plain_weight, register


class Turn(Parametrization):
    """The parametrization of one weight, `[m, d]` or read as such: `R` `[r, b, b]` and, if there is one, `N` `[d, b]`.

    `mixing` is `Q` `[r, b, b]`, at least float32.
    """

    free: Tensor | None
    unfinished = "merge_turn(optimizer)"  # before `consolidate`

    def __init__(self, weight: Tensor, free: Tensor | None, blocks: int, orthogonal: bool) -> None:
        super().__init__(weight)
        side = weight[0].numel() // blocks if free is None else free.shape[1]
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.orthogonal = orthogonal
        self.register_buffer("free", None if free is None else free.to(wide))
        start = torch.zeros(blocks if free is None else 1, side, side, dtype=wide, device=weight.device)
        self.rotation = nn.Parameter(start)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the turned weight."""
        matrix, mixing = weight.flatten(1), self.mixing().to(weight.dtype)
        if self.free is None:
            parts = matrix.reshape(len(matrix), *mixing.shape[:2])
            return torch.einsum("mri,rij->mrj", parts, mixing).reshape(weight.shape)
        free = self.free.to(weight.dtype)
        eye = torch.eye(len(mixing[0]), dtype=weight.dtype, device=weight.device)
        return (matrix + matrix @ free @ (mixing[0] - eye) @ free.T).reshape(weight.shape)

    def mixing(self) -> Tensor:
        """Return `Q` `[r, b, b]`."""
        rotation = self.rotation.to(torch.promote_types(self.rotation.dtype, torch.float32))  # of a model made bfloat16
        eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
        if not self.orthogonal:
            return eye + rotation
        skew = (rotation - rotation.mT) / 2
        mixing: Tensor = torch.linalg.solve(eye + skew, eye - skew)
        return mixing


def begin_turn(
    optimizer: NullSpaceOptimizer | nn.Module,
    names: Iterable[str],
    *,
    blocks: int | None = None,
    orthogonal: bool = True,
) -> list[nn.Parameter]:
    """Let the weights `names` turn from now on, and return what trains in their place, for an optimizer of its own.

    With a `NullSpaceOptimizer` each weight turns inside the directions that its basis leaves free (all where it has
    none); one without free directions stays as it is, with a warning. With `blocks`, or a model, the inputs turn in so
    many equal blocks (OrthSR: 4), whatever is stored. The weights themselves no longer train until `merge_turn`.

    Raises:
        OptionError: a name is unknown, or its weight is tied or turns already. Nothing turns then.
        ShapeError: a weight has fewer than two dimensions or inputs that cannot be divided, or its basis is not one of
            its inputs.
    """
    guard, model = _parts(optimizer)
    if isinstance(names, str) or not (blocks is None or type(blocks) is int):
        raise OptionError(
            f"begin_turn(names={names!r}, blocks={blocks!r}): expected a list of names and a whole number"
        )
    turns = {name: _turn(guard, model, name, blocks, orthogonal) for name in dict.fromkeys(names)}
    if full := [name for name, turn in turns.items() if turn is None]:
        more = ", ..." if len(full) > 3 else ""
        text = f"begin_turn: {len(full)} weights have no free direction and stay: {', '.join(full[:3])}{more}"
        warnings.warn(text, NullSpaceWarning, stacklevel=2)
    for name, turn in turns.items():
        if turn is not None:
            register(model, name, turn, "begin_turn")
    return [turn.rotation for turn in turns.values() if turn is not None]


def _turn(
    guard: NullSpaceOptimizer | None, model: nn.Module, name: str, blocks: int | None, orthogonal: bool
) -> Turn | None:
    """Return the parametrization of one weight, `None` where no direction is free; the model is not changed."""
    weight = plain_weight(model, name, "begin_turn")
    size = weight[0].numel() if weight.ndim > 1 else 0
    free = None if blocks is not None or guard is None else _free(guard, name, size, weight.device)
    count = 4 if blocks is None else blocks
    if size == 0 or (free is None and (count < 1 or size % count)):
        raise ShapeError(f"begin_turn: '{name}' {tuple(weight.shape)} has no inputs of {count} equal blocks")
    return None if free is not None and not free.shape[1] else Turn(weight, free, count, orthogonal)


def merge_turn(optimizer: NullSpaceOptimizer | nn.Module) -> list[str]:
    """Write every turned weight as a plain one that may train again; return their names.

    A `NullSpaceOptimizer` takes the new values for its anchors, so `consolidate` can follow.

    Raises:
        StaleAnchorError: a weight was edited meanwhile, whose values would be taken too; nothing is merged.
        OptionError: another parametrization was put on a turned weight later; nothing is merged.
    """
    guard, model = _parts(optimizer)
    if guard is not None:
        guard._core.protection.check_anchors()
    merged = merge(model, Turn)
    if guard is not None and merged:
        guard.reanchor()
    return merged


def _parts(optimizer: NullSpaceOptimizer | nn.Module) -> tuple[NullSpaceOptimizer | None, nn.Module]:
    """Return the optimizer, if it is one, and the model."""
    if not isinstance(optimizer, (nn.Module, NullSpaceOptimizer)):
        raise OptionError(f"expected a NullSpaceOptimizer or a model, not {type(optimizer).__name__}")
    return (None, optimizer) if isinstance(optimizer, nn.Module) else (optimizer, optimizer.model)


def _free(optimizer: NullSpaceOptimizer, name: str, size: int, device: torch.device) -> Tensor:
    """Return an orthonormal basis `[d, k]` of the directions of `name` that its basis leaves free."""
    basis = optimizer.bases.get(name) or optimizer.bases.get(canonical_name(name))
    if basis is None or not basis.subspaces:
        kept = 0 if basis is None or basis.kept is None else size  # frozen: nothing is free
        return torch.eye(size, device=device)[:, kept:]
    stored = basis.subspaces.get("right")
    if stored is None or len(basis.subspaces) > 1 or stored.basis.shape[:2] != (1, size) or basis.bias is not None:
        raise ShapeError(f"begin_turn: the basis of '{name}' is not one of its {size} inputs alone; use blocks=")
    used = stored.basis[0, :, : stored.rank].double()
    whole: Tensor = torch.linalg.qr(used, mode="complete").Q
    return whole[:, stored.rank :].to(stored.basis.dtype).to(device)
