"""Functions that single papers need beside a policy, and declarations of rows that no product shows."""

from __future__ import annotations

from ..capture.declare import declare_rows, stand_in
from .class_wise import consolidate_classes
from .forward_scaling import ForwardScaling, shared_directions, trust_regions
from .lora import begin_lora, inflora_rows, keeplora_rows, lora_rows
from .low_rank import begin_low_rank, leading_entries, leading_heads, merge_low_rank, summed_gradients
from .prompts import declare_prompt, declare_tokens
from .turn import begin_turn, merge_turn

__all__ = [
    "ForwardScaling",
    "begin_lora",
    "begin_low_rank",
    "begin_turn",
    "consolidate_classes",
    "declare_prompt",
    "declare_rows",
    "declare_tokens",
    "inflora_rows",
    "keeplora_rows",
    "leading_entries",
    "leading_heads",
    "lora_rows",
    "merge_low_rank",
    "merge_turn",
    "shared_directions",
    "stand_in",
    "summed_gradients",
    "trust_regions",
]
