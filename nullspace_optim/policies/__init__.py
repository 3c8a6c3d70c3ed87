"""Rank rules, one paper a file. `Energy` (GPM) is the default of the library."""

from __future__ import annotations

from .base import Policy, Spectrum
from .cgp import CGP
from .code_cl import CODECL
from .eigenvalue_ratio import EigenvalueRatio
from .energy import Energy
from .fixed_rank import FixedRank
from .inflora import InfLoRA
from .keeplora import KeepLoRA
from .numerical_rank import NumericalRank
from .osf import OSF
from .owm import OWM
from .pegp import PEGP
from .rank_budget import RankBudget
from .sgp import SGP
from .split_lora import SplitLoRA
from .tail_energy import TailEnergy
from .trgp import TRGP
from .vpt_nsp import VPTNSP
from .weight_bands import WeightBands

__all__ = [
    "CGP",
    "CODECL",
    "OSF",
    "OWM",
    "PEGP",
    "SGP",
    "TRGP",
    "VPTNSP",
    "EigenvalueRatio",
    "Energy",
    "FixedRank",
    "InfLoRA",
    "KeepLoRA",
    "NumericalRank",
    "Policy",
    "RankBudget",
    "Spectrum",
    "SplitLoRA",
    "TailEnergy",
    "WeightBands",
]
