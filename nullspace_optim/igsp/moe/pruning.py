"""Pruning: the experts that a task keeps, by routing probability.

With `y = sum_e p_e f_e(x)` the gradient that reaches expert `e` is `E[p_e J_e^T dL/dy]`: the mean gate `pi_e` bounds
it, so it measures how much of the task flows through the expert (the abstract's "gradient flow indicator").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import PruningError
from .experts import FLOATS


def keep_above(flow: Tensor, threshold: float | None, where: str, candidates: int) -> Tensor:
    """Return a mask `[E]` of the experts whose mean gate `flow` `[E]` is at least `threshold`.

    If `threshold` is None it is half of an equal share: among all `E` experts for a historical one, `1 / (2 E)`; for
    the last `m`, the `candidates`, among these and the history as a whole, `1 / (2 (m + 1))` (`1 / (2 m)` without
    history). So what a new expert must carry does not shrink as the history grows, and the default never removes all.

    Raises:
        PruningError: no expert would be left, or the flow is not finite; names the layer `where`.
    """
    if not bool(torch.isfinite(flow).all()):
        raise PruningError(
            f"'{where}': routing probabilities are not finite, so experts or routers diverged; go back to an earlier "
            f"checkpoint and {FLOATS}"
        )
    history = len(flow) - candidates
    limits = torch.full_like(flow, 1.0 / (2 * len(flow)) if threshold is None else threshold)
    if threshold is None and candidates:
        limits[history:] = 1.0 / (2 * (candidates + (history > 0)))
    kept = flow >= limits
    if not bool(kept.any()):
        raise PruningError(
            f"'{where}': pruning below {float(limits.min()):g} would remove the last expert (the largest of "
            f"{len(flow)} routing probabilities is {float(flow.max()):.3g}); nothing was removed, lower "
            "IGSP(threshold=...)"
        )
    return kept
