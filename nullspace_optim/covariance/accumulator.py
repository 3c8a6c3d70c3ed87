"""Statistics accumulated over all batches of one capture: second moments, used rows, reasons, biases.

Weights whose rows are the same tensors in every batch share one `SecondMoment`; the sum is cloned when a later
batch tells them apart. Rows wait in a short queue before they are added, so that the query, key and value
weights of one attention find each other; the queue is what keeps activations alive, nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CaptureError
from ..model.storage import storage_pointer
from ..subspace.layout import Layout
from .rows import Patches, Rows
from .second_moment import SecondMoment
from .sketch import FrequentDirections, SketchedCovariance

Moment = SecondMoment | FrequentDirections
WeightSide = Literal["right", "left"]
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


@dataclass
class ParameterStatistics:
    """Statistics of one parameter: its layout, the second moment of each side, the embedding rows used, or the reasons
    against it.

    `sides` maps "right" or "left" to the rows' second moment (size `d + 1` if `bias` names a bias that is
    protected jointly); `row_counts` `[n]` counts the samples that looked each row of an embedding up; `reasons` name
    the operators that read the parameter in a way that cannot be protected; `met`: something read it.
    """

    layout: Layout | None = None
    sides: dict[WeightSide, Moment] = field(default_factory=dict)
    row_counts: Tensor | None = None
    reasons: tuple[str, ...] = ()
    bias: str | None = None
    met: bool = False

    @property
    def row_index(self) -> Tensor | None:
        """Rows of an embedding that were looked up, `int64` `[k]`, sorted; none on the meta device."""
        if self.row_counts is None or self.row_counts.is_meta:
            return self.row_counts if self.row_counts is None else torch.zeros(0, dtype=torch.int64)
        return self.row_counts.nonzero().reshape(-1).cpu()


@dataclass
class _Waiting:
    """Rows in the queue and the weights that met them."""

    rows: Rows | Patches
    mask: Tensor | None
    shapes: dict[str, Sequence[int]]


class StatisticsAccumulator:
    """Sums over all batches of one capture."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        batch_frobenius: bool,
        statistics: bool,
        sketch: SketchedCovariance | None = None,
    ) -> None:
        """Accumulate in `dtype`; without `statistics` no second moments are kept; `sketch` is that of wide ones."""
        self._sketch = sketch
        self.order: dict[str, None] = {}
        self.cast: set[str] = set()
        self._dtype, self._batch_frobenius, self._statistics = dtype, batch_frobenius, statistics
        self._reasons: dict[str, dict[str, None]] = {}
        self._layouts: dict[str, Layout] = {}
        self._moments: dict[tuple[str, WeightSide], Moment] = {}
        self._looked_up: dict[str, Tensor] = {}
        self._met: dict[str, list[Tensor]] = {}
        self._partners: dict[str, dict[str | None, str]] = {}
        self._queue: dict[Any, _Waiting] = {}
        self._touched: dict[int, tuple[str, Moment]] = {}
        self._stripped: dict[int, Moment] = {}
        self._declared: set[str] = set()

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Note a reason against protecting `names`."""
        for name in names:
            self.order.setdefault(name)
            self._reasons.setdefault(name, {}).setdefault(reason)

    def meet(self, name: str, layout: Layout) -> bool:
        """Note that rows met the weight `name`, read by `layout`; return whether it was always read by this layout."""
        self.order.setdefault(name)
        known = self._layouts.setdefault(name, layout)
        if known != layout and name not in self._declared:
            self.refuse([name], f"used with two layouts ({known.kind} and {layout.kind})")
        return known == layout

    def meet_rows(self, name: str) -> None:
        """Note that rows of the embedding `name` were looked up; its layout is the plain matrix."""
        self.meet(name, Layout())

    def pair(self, weight: str, bias: str | None, operator: str) -> None:
        """Note that one use of `weight` added `bias` (`None`: no bias)."""
        self._partners.setdefault(weight, {})[bias] = operator
        if bias is not None:
            self.order.setdefault(bias)

    def declare(self, name: str, rows: Tensor, side: WeightSide, *, batched: bool) -> None:
        """Add rows `[g, n, s]` that `name` is declared to meet; they replace all that was observed."""
        self.order.setdefault(name)
        if name not in self._declared:
            self.flush()
            self._declared.add(name)
            for key in [key for key in self._moments if key[0] == name]:
                del self._moments[key]
        self._layouts[name] = Layout("batched") if batched else Layout()
        if not self._statistics:
            return
        if (name, side) not in self._moments:
            self._moments[name, side] = SecondMoment(
                *(rows.shape[0], rows.shape[2]),
                dtype=self._dtype,
                device=rows.device,
                batch_frobenius=self._batch_frobenius,
            )
        moment = self._moments[name, side]
        moment.update(rows)
        self._touched.setdefault(id(moment), (name, moment))

    def look_up(self, name: str, index: Tensor, number: int, sample: Tensor, mask: Tensor | None = None) -> None:
        """Note that the samples numbered `sample` looked up rows `index` of the embedding `name` with `number` rows.

        `mask` marks the lookups that count; all three have the shape of `index`, or one that expands to it. In a batch
        a row counts once a sample, however often it is looked up, so that padding does not outweigh words.
        """
        if name not in self._looked_up:
            self._looked_up[name] = torch.zeros(number, dtype=torch.int64, device=index.device)
        if not index.is_meta:
            pairs = sample * number + index
            self._met.setdefault(name, []).append(torch.unique(pairs if mask is None else pairs[mask]))

    def push(self, name: str, rows: Rows | Patches, mask: Tensor | None, *, shape: Sequence[int]) -> None:
        """Queue rows of the weight `name`, of `shape`; `mask` `[B, n]` or `[N, *O]` marks those that count."""
        if name in self._declared:
            return
        key = (rows.key, None if mask is None else mask.cpu().numpy().tobytes())
        self._queue.setdefault(key, _Waiting(rows, mask, {})).shapes[name] = shape

    def flush(self, keep: int = 0) -> None:
        """Add queued rows to the sums until `keep` distinct ones are left."""
        while len(self._queue) > keep:
            self._add(self._queue.pop(next(iter(self._queue))))

    def flush_storage(self, pointer: int) -> None:
        """Add the rows that lie in a storage which is about to be written."""
        for key, waiting in list(self._queue.items()):
            if storage_pointer(waiting.rows.source) == pointer:
                self._add(self._queue.pop(key))

    def end_batch(self, number: int) -> None:
        """Close batch `number`.

        Raises:
            CaptureError: a row was not finite, or a parameter was cast but nothing was seen to read the copy.
        """
        self.flush()
        self._count_look_ups()
        for name, moment in self._touched.values():
            if moment.device.type != "meta" and not bool(torch.isfinite(moment.diagonal()).all()):
                raise CaptureError(
                    f"batch {number}: non-finite input rows of '{name}' (NaN, infinity or overflow of {moment.dtype}). "
                    "Remove the sample, or run the forward pass in float32"
                )
            moment.end_batch()
        self._touched.clear()
        for name in sorted(self.cast - set(self.order)):
            raise CaptureError(
                f"batch {number}: '{name}' was cast to another type, but nothing was seen to read the copy. "
                "Make sure that the forward pass itself uses the weights (no cache of cast weights), or report this"
            )

    def drop_queue(self) -> None:
        """Forget queued rows (the batch failed or is run again)."""
        self._queue.clear()
        self._touched.clear()
        self._met.clear()

    def captured(self, name: str, shape: Sequence[int]) -> ParameterStatistics:
        """Return the statistics of one parameter of `shape`."""
        if name in self._declared:
            declared = {side: moment for (owner, side), moment in self._moments.items() if owner == name}
            return ParameterStatistics(layout=self._layouts[name], sides=declared, met=True)
        bias = self._joint_bias(name)
        sides: dict[WeightSide, Moment] = {}
        known: tuple[WeightSide, ...] = ("right", "left")
        for side in known:
            if (name, side) in self._moments:
                size = self._size(name, side, shape)
                sides[side] = self._sized(self._moments[name, side], size, joint=bias is not None)
        reasons = dict(self._reasons.get(name, {}))
        for weight, partners in self._partners.items():
            if name in partners and self._joint_bias(weight) != name:
                reasons.setdefault(f"read by aten.{partners[name]} as bias")
        return ParameterStatistics(
            layout=self._layouts.get(name),
            sides=sides,
            row_counts=self._looked_up.get(name),
            reasons=tuple(reasons),
            bias=bias,
            met=name in self.order,
        )

    def state(self) -> dict[str, Any]:
        """Return all statistics so far, for `replace` on this or another rank."""
        return {
            "order": self.order,
            "reasons": self._reasons,
            "layouts": self._layouts,
            "partners": self._partners,
            "looked_up": self._looked_up,
            "moments": self._moments,
            "declared": self._declared,
        }

    def replace(
        self,
        *,
        order: Iterable[str],
        reasons: dict[str, dict[str, None]],
        layouts: dict[str, Layout],
        partners: dict[str, dict[str | None, str]],
        looked_up: dict[str, Tensor],
        moments: dict[tuple[str, WeightSide], Moment],
        declared: set[str],
    ) -> None:
        """Take over the statistics of all ranks together."""
        self.order = dict.fromkeys(order)
        self._reasons, self._layouts, self._partners = reasons, layouts, partners
        self._looked_up, self._moments, self._declared = looked_up, moments, declared
        self._stripped.clear()

    def _count_look_ups(self) -> None:
        """Count the samples of the batch that looked each row up."""
        for name, pairs in self._met.items():
            counts = self._looked_up[name]
            met = torch.unique(torch.cat(pairs)) % len(counts)
            counts += torch.bincount(met, minlength=len(counts))
        self._met.clear()

    def _add(self, waiting: _Waiting) -> None:
        """Add rows to the sums of all weights that met them, once a shared sum."""
        side, layout = waiting.rows.place.side, waiting.rows.place.layout
        new: dict[int, Moment] = {}
        targets: dict[int, list[str]] = {}
        for name, shape in waiting.shapes.items():
            groups = layout.matrix_shape(shape)[0]
            if (name, side) not in self._moments:
                if groups not in new:
                    new[groups] = self._fresh(name, waiting.rows, groups)
                self._moments[name, side] = new[groups]
            targets.setdefault(id(self._moments[name, side]), []).append(name)
        sums: list[Moment] = []
        for names in targets.values():
            moment = self._moments[names[0], side]
            if sum(other is moment for other in self._moments.values()) > len(names):
                moment = moment.clone()
            for name in names:
                self._moments[name, side] = moment
            self._touched.setdefault(id(moment), (names[0], moment))
            sums.append(moment)
        self._stripped.clear()
        if self._statistics:
            self._sum(waiting, sums)

    def _sum(self, waiting: _Waiting, sums: Sequence[Moment]) -> None:
        """Stream the blocks of rows into `sums`."""
        dtype, name = torch.promote_types(sums[0].dtype, waiting.rows.source.dtype), next(iter(waiting.shapes))
        for block, count in waiting.rows.blocks(waiting.mask, dtype):
            for moment in sums:
                with _enough_memory(name, moment.groups, moment.size, moment.dtype, moment.device):
                    moment.update(block, waiting.rows.place.groups, count)

    def _fresh(self, name: str, rows: Rows | Patches, groups: int) -> Moment:
        """Return an empty sum for the `rows` that met `name`; without statistics it has no features."""
        size = rows.size if self._statistics else 0
        dtype = _COMPLEX[self._dtype] if rows.source.is_complex() else self._dtype
        device = rows.source.device
        with _enough_memory(name, groups, size, dtype, device):
            if self._sketch is not None and size > self._sketch.above and not dtype.is_complex:
                return FrequentDirections(groups, size, self._sketch.size, dtype=dtype, device=device)
            return SecondMoment(groups, size, dtype=dtype, device=device, batch_frobenius=self._batch_frobenius)

    def _size(self, name: str, side: str, shape: Sequence[int]) -> int:
        _, m, d = self._layouts[name].matrix_shape(shape)
        return d if side == "right" else m

    def _sized(self, moment: Moment, size: int, *, joint: bool) -> Moment:
        """Return `moment`, without the constant input of the bias unless a bias is protected jointly."""
        if joint or moment.size <= size:
            return moment
        return self._stripped.setdefault(id(moment), moment.leading(size))

    def _joint_bias(self, weight: str) -> str | None:
        """Return the bias that is added in every use of `weight`, and nowhere else; `None` if there is none."""
        partners = self._partners.get(weight, {})
        if len(partners) != 1 or self._reasons.get(weight):
            return None
        bias = next(iter(partners))
        others = [name for name, names in self._partners.items() if bias in names]
        sides = [side for name, side in self._moments if name == weight]
        alone = others == [weight] and sides == ["right"] and weight not in self._looked_up
        return bias if bias is not None and alone and not self._reasons.get(bias) else None


@contextmanager
def _enough_memory(name: str, groups: int, size: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Name the parameter, the bytes and the way out where memory for a second moment is short."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        raise CaptureError(
            f"'{name}': no memory on {device} for its second moment {[groups, size, size]}, "
            f"{groups * size * size * dtype.itemsize} bytes. Free some, consolidate on the CPU "
            "(model.cpu() for the pass), or give this parameter requires_grad=False"
        ) from error
