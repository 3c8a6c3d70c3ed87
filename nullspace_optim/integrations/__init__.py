"""Training frameworks: callbacks that consolidate at the end of a task, and the way back to us through their wrappers.

`integrations.lightning` and `integrations.transformers` each hold a `ConsolidateCallback`. They import their framework,
so import them by name; nothing here needs one.
"""

from __future__ import annotations

from .unwrap import unwrap

__all__ = ["unwrap"]
