"""Spectra and second moments of made-up tasks, and one consolidation by a policy."""

from __future__ import annotations

import torch
from torch import Tensor

from nullspace_optim.consolidation.grow import GrownBasis, decompose, grow_basis
from nullspace_optim.policies import (
    Policy,
    Spectrum,
)


def task_rows(seed: int, n: int = 40, s: int = 24, decay: float = 3.0) -> Tensor:
    """Rows `[n, s]` with a spectrum that falls by `10^decay`, in a rotation of their own."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(s, s, generator=generator, dtype=torch.float64))[0]
    rows = torch.randn(n, s, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -decay, s, dtype=torch.float64
    )
    return rows @ rotation


def moment_of(*groups: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([rows.mH @ rows for rows in groups]).to(dtype)


def consolidate(policy: Policy, moment: Tensor, before: GrownBasis | None = None, tasks: int = 0) -> GrownBasis:
    """One consolidation of one weight with the policy alone in the model."""
    moment = moment.double() if policy.precise and not moment.is_complex() else moment
    basis, covariance, scale = (before.basis, before.covariance, before.scale) if before else (None, None, None)
    candidate = decompose(policy, moment, [40] * len(moment), basis, covariance, scale=scale, tasks=tasks, name="w")
    taken = policy.ranks({str(i): spectrum for i, spectrum in enumerate(candidate.spectra)})
    return grow_basis(candidate, list(taken.values()), basis, scale)


def spectrum(values: list[float], *, covered: float = 0.0, kept: int = 0, total: float | None = None) -> Spectrum:
    return Spectrum(torch.tensor(values), total or sum(values), max(values), covered, kept, rows=10)
