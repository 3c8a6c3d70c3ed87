"""InfLoRA: a threshold that rises with the tasks, and LoRAs designed for the next one (Liang and Li 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError
from ..options import check_number
from .base import Spectrum
from .energy import Energy


@dataclass(frozen=True)
class InfLoRA(Energy):
    """GPM's rule with `threshold` rising linearly to `last` over `tasks` tasks (arXiv 2404.00228).

    A new task's LoRA gets `A` from that task's inputs outside the stored directions and is trained from `B = 0`
    (`inflora_rows`, `begin_lora`): old inputs within the stored directions do not see it, exactly, whatever `B` becomes
    and under any optimizer. Old outputs move by what the threshold cut off. Paper: 0.95 to 1 (split CIFAR-100), 0.98 to
    1 (ImageNet-R), 10 to 20 tasks, rank 10; our `last` is 0.999, since all of the energy is `NumericalRank`.

    The released code applies its thresholds to fourth powers of singular values, which keeps far less at the same
    number, and its "retain" branch of the first task stores the wrong side; here it is energy, and one stored form.
    """

    threshold: float = 0.95
    last: float = 0.999
    tasks: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "last", self.last, self.threshold, 1, closed="low", way_out="1 itself is NumericalRank()")
        if isinstance(self.tasks, bool) or not isinstance(self.tasks, int) or self.tasks < 1:
            raise OptionError(f"InfLoRA(tasks={self.tasks!r}): expected a whole number in [1, inf)")

    def rank(self, spectrum: Spectrum) -> int:
        """Return GPM's number of directions at this task's threshold."""
        progress = min(spectrum.tasks / self.tasks, 1.0)
        threshold = self.threshold + (self.last - self.threshold) * progress
        return Energy(threshold, paper_code=self.paper_code).rank(spectrum)
