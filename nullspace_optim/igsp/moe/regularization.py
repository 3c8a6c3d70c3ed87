"""Subspace-constrained regularization of phase 1: pure functions, each the penalty of one layer.

The paper's abstract asks that new gradients be projected on the historical subspace "implicitly". Two readings:

* `mass`: routing to candidates costs, so the loss falls through historical experts until they are exhausted; with
  graded prices also through the first candidate before the second;
* `geom`: what a candidate adds outside the historical output space costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    gram = down @ down.mT
    outside = up - (up @ history) @ history.mT
    whole = _energy(gram, up)
    return (_energy(gram, outside) / (whole + FLOOR)).sum()


def _energy(gram: Tensor, up: Tensor) -> Tensor:
    """Return `tr((A A^T) (B^T B))` `[m]`."""
    return (gram * (up @ up.mT)).sum(dim=(-2, -1))
