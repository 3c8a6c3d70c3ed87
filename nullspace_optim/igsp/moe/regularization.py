"""Subspace-constrained regularization of phase 1: pure functions, and the penalty of one layer.

The paper's abstract asks that new gradients be projected on the historical subspace "implicitly". Three readings:

* `mass`: routing to candidates costs, so the loss falls through historical experts until they are exhausted; with
  graded prices also through the first candidate before the second;
* `geom`: what a candidate's matrix `B A` adds outside the historical output space costs;
* `function`: what a candidate puts out for the batch, outside the span of what historical experts put out for theirs
  ("projection in the expert-induced alignment function space").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import IGSP
from .experts import Stack, output_rows, second_moment, stack
from .layer import ExpertLayer
from .router import logits

FLOOR = 1e-12


def mass(logits: Tensor, prices: Tensor) -> Tensor:
    """Return `E_x[sum_j c_j p_j(x)]` over the candidates, scalar in 0..1.

    `logits` `[n, E]` of the samples, the last `m` columns being the candidates with `prices` `c` `[m]`;
    `p = softmax(logits)` over all experts, without noise and before top-k, so that a historical expert outside the
    top-k set can gain as well.
    """
    probabilities = torch.softmax(logits, dim=-1)
    return (probabilities[:, logits.shape[1] - len(prices) :] @ prices).mean()


def prices(candidates: int, price: str) -> Tensor:
    """Return what each of `m` candidates costs, `[m]`: 1 (``"flat"``), or `1/m, 2/m, ... 1` (``"graded"``).

    Equal prices leave candidates alike: they share the routing, and all of them stay or all go. Graded ones fill the
    first before the second.
    """
    return torch.arange(1, candidates + 1) / candidates if price == "graded" else torch.ones(candidates)


def geom(down: Tensor, up: Tensor, history: Tensor) -> Tensor:
    """Return `sum_e ||(I - P) B_e A_e||_F^2 / ||B_e A_e||_F^2`, scalar, 0 for experts that are still zero.

    Args:
        down: `A` of the candidates, `[m, r, d]`.
        up: `B^T` of the candidates, `[m, r, o]`.
        history: orthonormal basis of the column space of all historical `B`, `[o, k]`; `P` projects on it.

    Nothing of size `[o, d]` is formed: `||B A||_F^2 = tr((A A^T) (B^T B))`.
    """
    return _share_outside(down @ down.mT, up, history)


def function(x: Tensor, experts: Stack, history: Tensor) -> Tensor:
    """Return `sum_e sum_x ||(I - P) f_e(x)||^2 / sum_x ||f_e(x)||^2`, scalar, 0 for experts that are still zero.

    For LoRA experts each summand is `tr(A C A^T B^T (I - P) B) / tr(A C A^T B^T B)` with `C = sum x x^T`; neither `C`
    nor an output is formed. Gradients reach the experts, not `x`.

    Args:
        x: inputs of the layer, `[..., d]`.
        experts: the candidates.
        history: orthonormal basis of what historical experts put out, `[o, k]`; `P` projects on it.
    """
    return _share_outside(second_moment(x, experts), output_rows(experts), history)


def layer_penalties(layer: ExpertLayer, options: IGSP) -> list[Tensor]:
    """Return the penalties of one layer, each `[]`; none without candidates or without a forward since the last step.

    Without history only graded prices tell anything.
    """
    if not len(layer.fresh) or not layer.watch.recent:
        return []
    kind, parts = options.regularization, []
    if kind in ("mass", "both") and (layer.size or options.price == "graded"):
        scores = logits(torch.cat(layer.watch.recent), layer.router)
        parts.append(mass(scores, prices(len(layer.fresh), options.price).to(scores)))
    if layer.size and kind in ("geom", "both", "function"):
        candidates = stack(layer.fresh, options.kind)
        if kind != "function":
            parts.append(geom(candidates["down"], candidates["up"], layer.outputs))
        elif layer.watch.tokens is not None:
            parts.append(function(layer.watch.tokens, candidates, layer.emitted))
    return parts


def _share_outside(gram: Tensor, up: Tensor, history: Tensor) -> Tensor:
    outside = up - (up @ history) @ history.mT
    return (_energy(gram, outside) / (_energy(gram, up) + FLOOR)).sum()


def _energy(gram: Tensor, up: Tensor) -> Tensor:
    """Return `tr(G B^T B)` `[m]`, `G` being `A A^T` or `A C A^T`."""
    return (gram * (up @ up.mT)).sum(dim=(-2, -1))
