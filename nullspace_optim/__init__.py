"""Continual fine-tuning that does not forget: wrap any torch optimizer, protect what earlier tasks used.

>>> from torch.optim import AdamW
>>> opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-5))   # doctest: +SKIP
>>> report = opt.consolidate(task_loader)                          # doctest: +SKIP

Further public names: `policies` (rules of single papers), `methods` (functions of single papers), `clip` (losses),
`igsp` (reports of experts), `errors`, `plots`, `integrations`.
"""

from __future__ import annotations

from .clip import clip_forward
from .covariance.sketch import SketchedCovariance
from .errors import (
    BasisFileError,
    ConsolidationError,
    NullSpaceError,
    NullSpaceWarning,
    ShapeError,
    StaleAnchorError,
)
from .igsp import IGSP
from .integrations import unwrap
from .optimizer.optimizer import NullSpaceOptimizer
from .policies import OSF, SGP, Energy, FixedRank, NumericalRank, Policy, TailEnergy
from .report import ConsolidationReport, ParameterReport, VerifyReport
from .subspace.basis import Basis, Fate

__all__ = [
    "IGSP",
    "OSF",
    "SGP",
    "Basis",
    "BasisFileError",
    "ConsolidationError",
    "ConsolidationReport",
    "Energy",
    "Fate",
    "FixedRank",
    "NullSpaceError",
    "NullSpaceOptimizer",
    "NullSpaceWarning",
    "NumericalRank",
    "ParameterReport",
    "Policy",
    "ShapeError",
    "SketchedCovariance",
    "StaleAnchorError",
    "TailEnergy",
    "VerifyReport",
    "clip_forward",
    "unwrap",
]
__version__ = "0.1.0"
