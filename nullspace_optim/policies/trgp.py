"""TRGP: a subspace of its own for every task, and a memory that only grows by what is new (Lin et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Spectrum
from .energy import Energy


@dataclass(frozen=True)
class TRGP(Energy):
    """Choose the task's subspace among stored and new directions alike; the new ones among them join the memory.

    With `d_i = u_i^T K u_i` along the stored directions and the residual's eigenvalues `l_i`, the largest of both
    together are taken until they hold `threshold` of `tr K` (arXiv 2202.02931, section 4.3). That choice is the task's
    subspace (`Subspace.members`), which `ForwardScaling` scales for later, related tasks. Paper: thresholds as in GPM.

    The guarantee is that of `Energy`: every stored direction is kept exactly, and at least `threshold` of a task's
    energy lies in stored directions. TRGP stores more than GPM at the same threshold, because stored directions along
    which the new task has little energy do not count.

    The released code selects new directions by an index `> r` where `>= r` is meant, so the strongest new direction
    never enters the memory; here it does. It captures inputs without the task's scaling, though the task is used with
    it; here they are captured as used. It also overwrites the activations it measures while it measures them, and
    leaves batch normalisation trainable on CIFAR-100 after the first task; here statistics are taken from whole rows,
    and norm weights follow `uncovered=`. `paper_code` is refused: it belongs to GPM's count.
    """

    threshold: float = 0.97

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paper_code:
            raise OptionError("TRGP(paper_code=True): that is GPM's count of directions; take Energy(paper_code=True)")

    def rank(self, spectrum: Spectrum) -> int:
        """Return how many of the chosen directions are new."""
        return int(self._chosen(spectrum)[spectrum.kept :].sum())

    def members(self, spectrum: Spectrum, take: int) -> Tensor:
        """Return which of the stored and taken directions are the task's subspace."""
        return self._chosen(spectrum)[: spectrum.kept + take]

    def _chosen(self, spectrum: Spectrum) -> Tensor:
        """Return which of `[stored, new]` directions hold the threshold together, strongest first, `[kept + s]`."""
        energies = torch.cat([spectrum.stored, spectrum.values.to(spectrum.stored)]).clamp(min=0)
        order = energies.argsort(descending=True, stable=True)
        before = energies[order].cumsum(0) - energies[order]
        chosen = torch.zeros_like(energies, dtype=torch.bool)
        chosen[order] = (before < self.threshold * spectrum.total) & (energies[order] > 0)
        return chosen
