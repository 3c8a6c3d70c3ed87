"""iGSP (arXiv 2605.19301): low-rank experts beside a frozen backbone, found in one phase and trained in another.

Only the paper's abstract could be read (2026-11): the two phases, basis pre-expansion, subspace-constrained
regularization and pruning by routing probability are its words; every formula and constant here is ours. The authors
renamed the method iASP in 2026-07 ("projection in the expert-induced alignment function space").

>>> opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-5), model, mode="igsp")   # doctest: +SKIP
"""

from __future__ import annotations

from ..optimizer.mode import register_mode
from .adapter import save_peft_adapter
from .mode import IgspMode
from .options import IGSP
from .report import ExpertReport, LayerReport, PhaseStatus, TrainableCount

__all__ = ["IGSP", "ExpertReport", "LayerReport", "PhaseStatus", "TrainableCount", "save_peft_adapter"]

register_mode("igsp", IGSP, IgspMode)
