"""Constraints on training, as bases for the optimizer's own protection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..subspace.basis import Basis, Fate, Subspace
from ..subspace.projection import anchor
from .bank import CHILD, ExpertBank
from .options import IGSP

PARTS = {"input": ("down",), "both": ("down", "up"), "structural": (), "none": ()}


def yield_constraints(bank: ExpertBank, parameters: Mapping[str, Tensor], options: IGSP) -> Iterator[Basis]:
    """Yield a basis for a shared router, and in phase 2 for each surviving expert.

    A shared router keeps the logits of all experts for what it saw in finished tasks (`W x` for `x` in that span);
    those of new experts, whose rows begin as constants, stay constant there. An expert's rows of `A` keep their part in
    the span of the historical `A`; with ``orthogonal="both"`` also the columns of `B` theirs in the span of the
    historical `B`. `W U = const` is the condition that null-space protection keeps exactly, so the same kernel,
    `verify` and files serve.
    """
    for key, layer in bank.named_children():
        if isinstance(layer.gates, Tensor) and layer.gates.shape[1]:
            yield _basis(f"{CHILD}.{key}.router", parameters[f"{CHILD}.{key}.router"], layer.gates, "shared router")
        if bank.scope.first_phase:
            continue
        for number in range(len(layer.fresh)):  # type: ignore[arg-type]
            for part in PARTS[options.orthogonal]:
                kept = layer.inputs if part == "down" else layer.outputs
                name = f"{CHILD}.{key}.fresh.{number}.{part}"
                if isinstance(kept, Tensor) and kept.shape[1]:
                    yield _basis(name, parameters[name], kept, "updates orthogonal to the historical subspace")


def _basis(name: str, parameter: Tensor, kept: Tensor, reason: str) -> Basis:
    columns, width = kept.unsqueeze(0), kept.shape[1]
    full = width >= kept.shape[0]
    subspace = Subspace(
        side="right",
        basis=columns,
        anchor=anchor(parameter.detach().unsqueeze(0), columns, "right"),
        ranks=(width,),
        size=kept.shape[0],
        spectrum=torch.zeros(1, kept.shape[0], device=kept.device),
        energy=1.0,
    )
    return Basis(
        name=name,
        shape=tuple(parameter.shape),
        fate=Fate.FULL if full else Fate.PROTECTED,
        reason=reason,
        subspaces={"right": subspace},
        kept=parameter.detach().clone() if full else None,
    )
