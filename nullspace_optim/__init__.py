"""Continual fine-tuning that does not forget: wrap any torch optimizer, protect what earlier tasks used.

>>> from torch.optim import AdamW
>>> opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-5))   # doctest: +SKIP
>>> report = opt.consolidate(task_loader)                          # doctest: +SKIP
"""

from __future__ import annotations

from .basis import Basis, Fate
from .clip_losses import alignment_loss, distillation_loss
from .discovery import clip_forward
from .errors import (
    BasisFileError,
    BatchError,
    CaptureError,
    ConsolidationError,
    ModelNotFoundError,
    NullSpaceError,
    NullSpaceWarning,
    OptionError,
    PruningError,
    ShapeError,
    StaleAnchorError,
)
from .hints import declare_rows, stand_in
from .igsp import IGSP, ExpertReport, LayerReport, Status, Trainable
from .mode import MODES
from .optimizer import NullSpaceOptimizer
from .policies import (
    CODECL,
    SGP,
    TRGP,
    EigenvalueRatio,
    Energy,
    FixedRank,
    NumericalRank,
    Policy,
    RankBudget,
    Spectrum,
    TailEnergy,
)
from .report import ConsolidationReport, ParameterReport, VerifyReport
from .scaling import ForwardScaling, shared_directions, trust_regions

__all__ = [
    "CODECL",
    "IGSP",
    "SGP",
    "TRGP",
    "Basis",
    "BasisFileError",
    "BatchError",
    "CaptureError",
    "ConsolidationError",
    "ConsolidationReport",
    "EigenvalueRatio",
    "Energy",
    "ExpertReport",
    "Fate",
    "FixedRank",
    "ForwardScaling",
    "LayerReport",
    "ModelNotFoundError",
    "NullSpaceError",
    "NullSpaceOptimizer",
    "NullSpaceWarning",
    "NumericalRank",
    "OptionError",
    "ParameterReport",
    "Policy",
    "PruningError",
    "RankBudget",
    "ShapeError",
    "Spectrum",
    "StaleAnchorError",
    "Status",
    "TailEnergy",
    "Trainable",
    "VerifyReport",
    "alignment_loss",
    "clip_forward",
    "declare_rows",
    "distillation_loss",
    "shared_directions",
    "stand_in",
    "trust_regions",
]
__version__ = "0.1.0"

MODES["igsp"] = IGSP
