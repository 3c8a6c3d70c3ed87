"""Continual fine-tuning that does not forget: wrap any torch optimizer, protect what earlier tasks used.

>>> from torch.optim import AdamW
>>> opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-5))   # doctest: +SKIP
>>> report = opt.consolidate(task_loader)                          # doctest: +SKIP
"""

from __future__ import annotations

from .capture.declare import declare_rows, stand_in
from .clip import alignment_loss, clip_forward, distillation_loss
from .consolidation.prune import PruneReport
from .covariance.sketch import SketchedCovariance
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
from .igsp import IGSP, ExpertReport, LayerReport, PhaseStatus, TrainableCount
from .integrations import unwrap
from .methods.class_wise import consolidate_classes
from .methods.forward_scaling import ForwardScaling, shared_directions, trust_regions
from .methods.lora import begin_lora, inflora_rows, keeplora_rows, lora_rows
from .methods.prompts import declare_prompt, declare_tokens
from .optimizer.optimizer import NullSpaceOptimizer
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
from .report import ConsolidationReport, ParameterReport, VerifyReport
from .subspace.basis import Basis, Fate

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
    "ModelNotFoundError",
    "NullSpaceError",
    "NullSpaceOptimizer",
    "NullSpaceWarning",
    "NumericalRank",
    "OptionError",
    "ParameterReport",
    "PhaseStatus",
    "Policy",
    "PruneReport",
    "PruningError",
    "RankBudget",
    "ShapeError",
    "SketchedCovariance",
    "Spectrum",
    "SplitLoRA",
    "StaleAnchorError",
    "TailEnergy",
    "TrainableCount",
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
