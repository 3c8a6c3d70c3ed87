"""CGP: every class has directions of its own (Chen et al. 2022, class gradient projection)."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import check_number
from .energy import Energy


@dataclass(frozen=True)
class CGP(Energy):
    """GPM's rule class by class: `threshold` of the energy of *each* class is kept, not of a task on average.

    `consolidate_classes` splits a task by its labels, leaves out what the model gets wrong, and joins classes whose
    prototypes (mean outputs) have a cosine above `similarity`; each group is then consolidated by itself. Paper:
    thresholds as in GPM, `similarity` 0.5. Exact for the kept directions, at least `threshold` of every group.

    Ours where the paper leaves room or goes further: prototypes are mean outputs (the paper's are mean activations of
    a layer), so that all weights agree on the groups; classes are joined within one call, not with classes of earlier
    tasks; a joined group pools its samples and adds what the stored basis lacks of them, where the paper selects the
    columns of the earlier class's basis again, and so may drop some. The released code joins where the *absolute*
    cosine of a layer's mean activations is above the threshold, with classes of all earlier tasks as well; mean outputs
    have signs, and opposite ones are not alike. Its contrastive loss is not part of a policy.

    The published update subtracts one projection after the other for bases that are not orthogonal to each other, which
    is no projection, and its residual removes the last basis only; here a class adds what lies outside all others, so
    one orthonormal basis holds them together.
    """

    threshold: float = 0.97
    similarity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "similarity", self.similarity, -1, 1, closed="lowhigh")
