"""Training frameworks: callbacks that consolidate, figures for loggers, and the way back to us through their wrappers.

`integrations.transformers` holds `NullSpaceCallback`, `integrations.lightning` `ConsolidateCallback`,
`integrations.axolotl` `NullSpacePlugin`, `integrations.avalanche` `ConsolidatePlugin`. They import their framework, so
import them by name; nothing here needs one. `integrations.hub` saves weights and bases together.
"""

from __future__ import annotations

from .metrics import metrics
from .unwrap import unwrap

__all__ = ["metrics", "unwrap"]
