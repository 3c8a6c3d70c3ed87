"""KeepLoRA: LoRAs from the new task's gradient outside what is known already (Luo et al. 2026, arXiv 2601.19659)."""

from __future__ import annotations

from dataclasses import dataclass

from .energy import Energy


@dataclass(frozen=True)
class KeepLoRA(Energy):
    """GPM's rule on features with `threshold` 0.99; a new LoRA's `A` are the gradient's directions outside them.

    `A` are the leading right singular vectors of `G (I - M M^T)`, with `G` the gradient of the frozen weight on the new
    task and `M` the stored directions and the leading input directions of the pretrained weight itself (energy 0.85 for
    vision, 0.2 for text): `keeplora_rows`, then `begin_lora`. Old inputs within the stored directions do not see the
    new LoRA, exactly, whatever `B` becomes. Paper: rank 16.

    The released code takes the weight's *output* directions on the input side, which goes unnoticed because its weights
    are square; here it is the input side. It "accumulates" features as an element-wise average of whole token matrices,
    which mixes unrelated tokens; here second moments are summed.
    """

    threshold: float = 0.99
