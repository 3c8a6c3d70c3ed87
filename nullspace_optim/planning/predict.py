"""Cost of protection in bytes and operations, from the shapes of a model's weights alone.

A `Survey` lists the weights that meet rows, by side (see `survey`); `predict` multiplies it out for one rule of rank
and a number of devices. Weights are stacks of matrices `[g, m, d]` (see `layout`); a basis of rank `k` is `[g, s, k]`
with `s = d` for side "right" and `s = m` for side "left", its anchor `[g, m, k]` or `[g, k, d]`. One multiplication
and one addition are two FLOPs, as `torch.utils.flop_counter` counts them.

Several devices stand for FSDP2 with `Shard(0)`: each holds a block of rows of every weight. A right basis is
replicated and its anchor sharded; a left basis meets all rows, so its anchor is replicated. With DDP every device
carries the figures of one device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace

from ..errors import OptionError
from ..model.batches import SAMPLES
from ..options import check_choice
from ..protection.step_hooks import EXACT_EVERY
from ..protection.weight_stack import FEWEST, LARGEST
from ..settings import CHOICES, Precision, Project
from ..subspace.layout import MatrixSide
from .shapes import FLOAT, Moment, Survey, Weight

INDEX = 8  # bytes of an int64
AGAIN = 3  # passes over the first samples: one for the probe, two for the drift that is allowed

Rank = Callable[[int], int]


@dataclass(frozen=True)
class Conditions:
    """Conditions of a prediction.

    `devices` share the weights by rows (FSDP2). `precise` and `accumulate` are those of the policy: second moments
    in float64, second moments kept between tasks, and so is `joint`: the eigenvectors of all weights are held at once;
    with `soft` directions have a scale and take the anchor form at any rank. `samples` are consolidated. `rows_used` is
    the number of rows of each embedding that tasks look up: one number for all, one by name, or `None` for a quarter of
    each.
    """

    devices: int = 1
    precision: Precision = "exact"
    project: Project = "update"
    precise: bool = False
    accumulate: bool = False
    joint: bool = False
    soft: bool = False
    batch_frobenius: bool = False
    samples: int = 1000
    rows_used: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "samples"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: expected a whole number in [1, inf)")
        if isinstance(self.rows_used, int) and self.rows_used < 1:
            raise OptionError(f"rows_used={self.rows_used}: expected a whole number in [1, inf)")
        for name in ("precision", "project"):
            check_choice(name, getattr(self, name), CHOICES[name])

    @property
    def entry(self) -> int:
        """Bytes of an entry of a second moment."""
        return 2 * FLOAT if self.precise else FLOAT

    def looked_up(self, weight: Weight) -> int:
        """Return how many rows of an embedding are used."""
        rows = weight.matrix[1]
        used = self.rows_used.get(weight.name) if isinstance(self.rows_used, Mapping) else self.rows_used
        return min(rows, -(-rows // 4) if used is None else used)


@dataclass(frozen=True)
class MemoryCost:
    """Bytes that protection holds on one device.

    `bases` and `anchors` are stored; `kept` are the values of frozen and full parameters and the buffers;
    `covariances` are second moments kept between tasks (accumulating policies only). `copies` is the transient copy
    of the weights before the base step, `workspaces` are complements and one residual, made at the first step, and
    bases and anchors of small weights a second time, in stacks.
    """

    bases: int = 0
    anchors: int = 0
    kept: int = 0
    covariances: int = 0
    copies: int = 0
    workspaces: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: MemoryCost) -> MemoryCost:
        return MemoryCost(**{part.name: getattr(self, part.name) + getattr(other, part.name) for part in fields(self)})


@dataclass(frozen=True)
class Prediction:
    """The cost of one rank rule.

    `share` is the part of all directions that is protected, 0..1; `full` counts parameters without a free direction
    left (frozen from then on); `memory` is that of one process holding everything (or of each DDP rank),
    `per_device` that of one FSDP2 rank; `step_flops` is the correction of one step over all devices, averaged over 16
    steps. A consolidation holds `solving_bytes` beside second moments and activations, where it finds directions, and
    makes bases orthonormal in `polish_flops`, half of them in float64.
    """

    share: float
    full: int
    memory: MemoryCost
    per_device: MemoryCost
    step_flops: int
    step_flops_per_device: int
    polish_flops: int = 0
    solving_bytes: int = 0


@dataclass(frozen=True)
class ConsolidationCost:
    """The cost of one consolidation, so far as it does not depend on the rank.

    FLOPs of the forward passes (of all samples, and three times of the few that are remembered by digest), of the
    second moments (as whole products; a CPU does 9/16 of wide ones) and of the eigenvectors, which on top read
    `eigh_bytes` at the rate of memory; `moments` are the bytes of all second moments, held by every device until the
    pass ends; `largest` is the largest eigenproblem; `later` bytes are those that solving it takes at most in tasks
    after the first. All are upper bounds for weights with fewer rows than half their width.
    """

    samples: int
    forward_flops: int
    moment_flops: int
    eigh_flops: int
    eigh_bytes: int
    moments: int
    eigenproblems: int
    largest: int
    later: int


def by_fraction(fraction: float) -> Rank:
    """Return the rule that protects a share `fraction` (0..1) of the directions of every side, at least one."""
    if not 0 < fraction <= 1:
        raise OptionError(f"rank fraction {fraction}: expected a number in (0, 1]")
    return lambda size: max(1, round(fraction * size))


def by_rank(k: int) -> Rank:
    """Return the rule of `FixedRank(k)`: `k` directions of every side, or all if it has fewer."""
    return lambda size: min(k, size)


def predict(survey: Survey, rank: Rank, conditions: Conditions | None = None) -> Prediction:
    """Return what protection costs if `rank(s)` directions of every side of size `s` are protected in each group."""
    conditions = conditions or Conditions()
    costs = [_Cost(weight, rank, conditions) for weight in survey.weights]
    _stack(costs)
    used = sum(cost.directions for cost in costs)
    everything = sum(size * weight.matrix[0] for weight in survey.weights for _, size in _sides(weight))
    return Prediction(
        share=used / everything if everything else 0.0,
        full=sum(cost.full for cost in costs),
        memory=_memory(survey, costs, conditions, 1),
        per_device=_memory(survey, costs, conditions, conditions.devices),
        step_flops=sum(cost.flops(1) for cost in costs),
        step_flops_per_device=sum(cost.flops(conditions.devices) for cost in costs),
        polish_flops=sum(4 * m.groups * m.size * min(rank(m.size), m.size) ** 2 for m in survey.moments),
        solving_bytes=_solving(survey, rank, conditions),
    )


def consolidation(survey: Survey, conditions: Conditions | None = None) -> ConsolidationCost:
    """Return what one consolidation of `conditions.samples` samples costs."""
    conditions = conditions or Conditions()
    entry = conditions.entry
    copies = 2 if conditions.batch_frobenius else 1
    batches = conditions.samples / survey.batch
    extra = AGAIN * min(SAMPLES, survey.batch, conditions.samples)
    return ConsolidationCost(
        samples=conditions.samples,
        forward_flops=round(survey.forward_flops * (conditions.samples + extra) / survey.batch),
        moment_flops=round(sum(moment.flops for moment in survey.moments) * batches),
        eigh_flops=sum(moment.solving for moment in survey.moments),
        eigh_bytes=sum(moment.read(entry) for moment in survey.moments),
        moments=copies * sum(moment.bytes(entry) for moment in survey.moments),
        eigenproblems=sum(moment.groups for moment in survey.moments),
        largest=max((moment.size for moment in survey.moments), default=0),
        later=max((5 * entry * m.size**2 for m in survey.moments if not m.sketched), default=0),
    )


def _solving(survey: Survey, rank: Rank, conditions: Conditions) -> int:
    """Return the bytes that finding directions takes: of one second moment at a time, or of all at once."""
    entry, together, alone = conditions.entry, 0, [0]
    for moment in survey.moments:
        vectors = moment.vectors(entry) if conditions.joint else 0
        alone.append(moment.solving_bytes(entry, min(rank(moment.size), moment.size)) - vectors)
        together += vectors
    return together + max(alone)


def on_both_sides(survey: Survey) -> Survey:
    """Return the survey for a policy that decomposes the weights instead of their rows (OSF): both sides are protected,
    and no two weights share a second moment.
    """
    weights: list[Weight] = []
    moments: list[Moment] = []
    for weight in survey.weights:
        g, m, d = weight.matrix
        sides: dict[MatrixSide, int] = {}
        if weight.sides:
            sides = {"right": len(moments), "left": len(moments) + 1}
            moments += [Moment(g, d, 0), Moment(g, m, 0)]
        weights.append(replace(weight, sides=sides))
    return replace(survey, weights=tuple(weights), moments=tuple(moments))


def _sides(weight: Weight) -> list[tuple[MatrixSide, int]]:
    """Return each side with its size `s`."""
    _, m, d = weight.matrix
    return [(side, d if side == "right" else m) for side in weight.sides]


@dataclass
class _Cost:
    """One weight under one rank rule."""

    weight: Weight
    rank: Rank
    conditions: Conditions
    ranks: dict[MatrixSide, int] = field(init=False)
    stack: int = 1

    def __post_init__(self) -> None:
        self.ranks = {side: min(self.rank(size), size) for side, size in _sides(self.weight)}

    @property
    def directions(self) -> int:
        return self.weight.matrix[0] * sum(self.ranks.values())

    @property
    def rows(self) -> int:
        return self.conditions.looked_up(self.weight) if self.weight.lookup else 0

    @property
    def full(self) -> bool:
        none_left = any(self.ranks[side] >= size for side, size in _sides(self.weight))
        return (none_left and not self.conditions.soft) or (self.weight.lookup and self.rows >= self.weight.matrix[1])

    @property
    def immovable(self) -> bool:
        """True where the whole weight is kept; with its bias it is corrected even where both are full."""
        return self.full and not self.weight.joint

    def difference(self, devices: int) -> bool:
        """Return whether the difference form runs; not where coordinates are sums over devices."""
        weight, conditions = self.weight, self.conditions
        if self.immovable or weight.joint or conditions.soft or conditions.project == "gradient" or not self.ranks:
            return False
        if devices > 1 and (weight.padded or any(weight.crosses(side) for side in weight.sides)):
            return False
        if self.stacked(devices) > 1:
            return False
        beyond = any(2 * self.ranks[side] > size for side, size in _sides(weight))
        return beyond or conditions.precision == "fast"

    @property
    def stackable(self) -> bool:
        """True for a weight that is corrected with others of its like, if there are enough (see `weight_stack`)."""
        weight, conditions = self.weight, self.conditions
        if self.immovable or conditions.soft or conditions.project == "gradient" or weight.lookup:
            return False
        return any(self.ranks.values()) and weight.kind != "transposed" and math.prod(weight.shape) <= LARGEST

    @property
    def kind(self) -> Hashable:
        """Facts that weights of one stack have in common (their ranks follow from their shape)."""
        weight = self.weight
        return weight.shape, weight.matrix, weight.kind, weight.itemsize, weight.joint, tuple(weight.sides)

    def stacked(self, devices: int) -> int:
        """Return how many weights are corrected together; shards are corrected one by one."""
        return self.stack if devices == 1 else 1

    def flops(self, devices: int) -> int:
        """Return the operations of one step's correction on one of `devices`."""
        if self.immovable:
            return 0
        g, m, d = self.weight.matrix
        anchor = 4 * g * m * d * sum(self.ranks.values())
        shorter = 4 * g * m * d * sum(self._shorter(side, size) for side, size in _sides(self.weight))
        projected = shorter if self.conditions.project == "both" and not self.weight.joint else 0
        if self.conditions.project == "gradient":
            amount = shorter
        else:
            amount = projected + (shorter + anchor // EXACT_EVERY if self.difference(devices) else anchor)
        return amount if self.weight.padded else self.part(amount, devices)

    def _shorter(self, side: MatrixSide, size: int) -> int:
        """Return the columns of the basis or, where more than half of all directions are kept, of its complement."""
        k = self.ranks[side]
        return k if self.conditions.soft or 2 * k <= size else size - k

    def part(self, amount: int, devices: int) -> int:
        """Return what the largest shard has of `amount`."""
        return _part(amount, self.weight.shape, devices)

    def _anchor(self, side: MatrixSide, devices: int) -> int:
        """Return the bytes of the anchor of one side on one device."""
        g, m, d = self.weight.matrix
        anchor = g * self.ranks[side] * (m if side == "right" else d) * max(FLOAT, self.weight.itemsize)
        return anchor if self._crosses(side, devices) or self.weight.padded else self.part(anchor, devices)

    def _crosses(self, side: MatrixSide, devices: int) -> bool:
        return devices > 1 and self.weight.crosses(side)

    def residual(self, devices: int) -> int:
        """Return the bytes of the largest residual of a correction on one device; all weights share one buffer."""
        if self.immovable or self.conditions.project == "gradient" or self.conditions.soft:
            return 0
        sides = (side for side in self.ranks if not self._crosses(side, devices))
        return max((self._anchor(side, devices) * self.stacked(devices) for side in sides), default=0)

    def memory(self, devices: int, bases: dict[tuple[int, int], int]) -> MemoryCost:
        """Return the bytes on one device; bases of weights that share rows are entered in `bases` once."""
        weight, conditions = self.weight, self.conditions
        g, _, d = weight.matrix
        anchors = complements = doubles = 0
        for side, size in _sides(weight):
            k = self.ranks[side]
            bases[weight.sides[side], size] = g * size * k * FLOAT + (g * k * FLOAT if conditions.soft else 0)
            anchors += self._anchor(side, devices)
            complements += g * size * (size - k) * FLOAT if self._shorter(side, size) < k else 0
            if self.stacked(devices) > 1:
                doubles += g * size * k * max(FLOAT, weight.itemsize) + self._anchor(side, devices)
        lookup, difference = self.rows * d * max(FLOAT, weight.itemsize), self.difference(devices)
        gradients = conditions.project == "gradient" or (conditions.project == "both" and not weight.joint)
        complemented = difference or (gradients and not self.immovable)
        return MemoryCost(
            bases=self.rows * INDEX,
            anchors=anchors + self.part(lookup, devices),
            kept=self.part(weight.bytes, devices) if self.immovable else 0,
            copies=self.part(weight.bytes, devices) if difference else 0,
            workspaces=doubles + (complements if complemented else 0),
        )


def _stack(costs: list[_Cost]) -> None:
    """Note at each cost how many weights are corrected together with its own."""
    alike = Counter(cost.kind for cost in costs if cost.stackable)
    for cost in costs:
        if cost.stackable and alike[cost.kind] >= FEWEST:
            cost.stack = alike[cost.kind]


def _memory(survey: Survey, costs: list[_Cost], conditions: Conditions, devices: int) -> MemoryCost:
    shared: dict[tuple[int, int], int] = {}
    memory = MemoryCost()
    for cost in costs:
        memory += cost.memory(devices, shared)
    frozen = sum(_part(item.bytes, item.shape, devices) for item in survey.frozen)
    residual = max((cost.residual(devices) for cost in costs), default=0)
    memory += MemoryCost(workspaces=residual)
    entry = conditions.entry
    kept = sum(moment.groups * moment.size**2 * entry for moment in survey.moments) if conditions.accumulate else 0
    return memory + MemoryCost(bases=sum(shared.values()), kept=frozen + survey.buffers, covariances=kept)


def _part(amount: int, shape: tuple[int, ...], devices: int) -> int:
    """Return what the largest of `devices` shards of a parameter of `shape` has of `amount`: whole first entries."""
    rows = shape[0] if shape else 1
    return amount * -(-rows // devices) // rows if rows else 0
