"""No method at all: the pretrained model as it is, and continual fine-tuning."""

from __future__ import annotations

from reference.methods.base import Method


class ZeroShot(Method):
    """The pretrained model, never trained: every row of its accuracy matrix is the pretrained row."""

    name = "zero-shot"
    trains = False


class FineTune(Method):
    """Plain continual fine-tuning: AdamW on everything except `logit_scale`, both towers."""

    name = "finetune"
