"""iGSP (arXiv 2605.19301): low-rank experts beside a frozen backbone, found in one phase and trained in another.

>>> opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-5), model, mode="igsp")   # doctest: +SKIP
"""

from __future__ import annotations

from .options import IGSP
from .report import ExpertReport, LayerReport, PhaseStatus, TrainableCount

__all__ = ["IGSP", "ExpertReport", "LayerReport", "PhaseStatus", "TrainableCount"]
