"""Continual fine-tuning that does not forget: wrap any torch optimizer, protect what earlier tasks used.

>>> from torch.optim import AdamW
>>> opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-5))   # doctest: +SKIP
>>> report = opt.consolidate(task_loader)                          # doctest: +SKIP
"""

from __future__ import annotations

from .basis import Basis, Fate
from .classes import consolidate_classes
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
from .igsp import IGSP, ExpertReport, LayerReport, Merged, Status, Trainable
from .integrations import unwrap
from .lora import begin_lora, inflora_rows, keeplora_rows, lora_rows
from .mode import MODES
from .optimizer import NullSpaceOptimizer
from .policies import (
    CGP,
    CODECL,
    OSF,
    OWM,
    PEGP,
    SGP,
    TRGP,
    VPTNSP,
    EigenvalueRatio,
    Energy,
    FixedRank,
    InfLoRA,
    KeepLoRA,
    NumericalRank,
    Policy,
    RankBudget,
    Spectrum,
    SplitLoRA,
    TailEnergy,
)
from .prompts import declare_prompt, declare_tokens
from .report import ConsolidationReport, ParameterReport, VerifyReport
from .scaling import ForwardScaling, shared_directions, trust_regions
from .sketch import SketchedCovariance
from .thinning import PruneReport

__all__ = [
    "CGP",
    "CODECL",
    "IGSP",
    "OSF",
    "OWM",
    "PEGP",
    "SGP",
    "TRGP",
    "VPTNSP",
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
    "InfLoRA",
    "KeepLoRA",
    "LayerReport",
    "Merged",
    "ModelNotFoundError",
    "NullSpaceError",
    "NullSpaceOptimizer",
    "NullSpaceWarning",
    "NumericalRank",
    "OptionError",
    "ParameterReport",
    "Policy",
    "PruneReport",
    "PruningError",
    "RankBudget",
    "ShapeError",
    "SketchedCovariance",
    "Spectrum",
    "SplitLoRA",
    "StaleAnchorError",
    "Status",
    "TailEnergy",
    "Trainable",
    "VerifyReport",
    "alignment_loss",
    "begin_lora",
    "clip_forward",
    "consolidate_classes",
    "declare_prompt",
    "declare_rows",
    "declare_tokens",
    "distillation_loss",
    "inflora_rows",
    "keeplora_rows",
    "lora_rows",
    "shared_directions",
    "stand_in",
    "trust_regions",
    "unwrap",
]
__version__ = "0.1.0"

MODES["igsp"] = IGSP
