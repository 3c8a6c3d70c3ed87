"""Rank rules, one paper a file. `Energy` (GPM) is the default of the library."""

from __future__ import annotations

from .base import Policy, Spectrum
from .code_cl import CODECL
from .eigenvalue_ratio import EigenvalueRatio
from .energy import Energy
from .fixed_rank import FixedRank
from .numerical_rank import NumericalRank
from .rank_budget import RankBudget
from .sgp import SGP
from .tail_energy import TailEnergy
from .trgp import TRGP

__all__ = [
    "CODECL",
    "SGP",
    "TRGP",
    "EigenvalueRatio",
    "Energy",
    "FixedRank",
    "NumericalRank",
    "Policy",
    "RankBudget",
    "Spectrum",
    "TailEnergy",
]
