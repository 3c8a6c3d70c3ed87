"""What reads a parameter, operator by operator of the table: the rows it met, or why it cannot be protected.

`OperatorHandlers` keeps the uses of the current batch where they must wait (relevance is known after the pass, joint
biases after the addition that follows a product); otherwise rows are handed to the tally at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..covariance.accumulator import StatisticsAccumulator
from ..covariance.rows import Kernel, Patches, Rows, convolution_kept
from ..model.storage import as_plain, is_plain, storage_pointer
from .aliases import AliasTracker, Kind, Origin
from .operators import CONVOLUTIONS, EMBEDDINGS, PRODUCTS, ContractionRule, Operator, locate_block
from .relevance.reach import Reach, storage_identity, storage_reference
from .relevance.relevance import Relevance

BUILDS = "used to build another weight"
QUEUE = 4

# What can be done where an operator hides which rows met which weight.
WAYS_OUT = {"_grouped_mm": ", all experts at once: consolidate with model.set_experts_implementation('eager')"}


@dataclass(eq=False)
class _Use:
    """Rows that met a weight in step `step` of the pass, and how elements of its output tell which of them count.

    `output` is the storage that the output was written to; `None` if it has none.
    """

    name: str
    rows: Rows | Patches
    output: StorageWeakRef | None
    shape: torch.Size
    step: int | None
    kept: Callable[[Tensor], Tensor]
    operator: str
    bias: str | None = None


@dataclass(eq=False)
class _LookUp:
    """Rows `index` of an embedding of `number` rows that were looked up by samples of the numbers `sample`."""

    name: str
    index: Tensor
    number: int
    sample: Tensor
    shape: torch.Size
    step: int | None

    def kept(self, reached: Tensor) -> Tensor:
        """Return which of the looked-up rows were reached."""
        return reached.any(-1)


class OperatorHandlers:
    """The uses of parameters in one forward pass; `relevance` is `None` where all rows count."""

    def __init__(
        self,
        memory: AliasTracker,
        tally: StatisticsAccumulator,
        relevance: Relevance | None,
        *,
        joint: bool,
        observe: Callable[[str, Tensor], None] | None,
        samples: int | None = None,
    ) -> None:
        """Hand what meets the parameters of `memory` to `tally`; the batch has so many `samples` (`None`: unknown)."""
        self._samples = samples
        self._memory, self._tally, self._joint, self._observe = memory, tally, joint, observe
        self._relevance = relevance
        self._uses: list[_Use | _LookUp] = []

    def settle(self, reached: Callable[[int], Reach] | None) -> None:
        """Hand the rows of the batch to the tally; `reached` says which elements of a step's output count, `None`:
        all.
        """
        for use in self._uses:
            mask = None if reached is None or use.step is None else _row_mask(use, reached(use.step))
            if isinstance(use, _LookUp):
                self._tally.look_up(use.name, use.index, use.number, use.sample, mask)
                continue
            if self._joint and use.rows.place.side == "right":
                self._tally.pair(use.name, use.bias, use.operator)
            self._tally.push(use.name, use.rows, mask, shape=self._memory.parameters[use.name].shape)
        self._uses.clear()

    def held(self) -> list[Tensor]:
        """Return the tensors that the capture keeps alive."""
        return [*self._memory.held, *(use.rows.source for use in self._uses if isinstance(use, _Use))]

    def read(self, operator: Operator, bound: list[Any], by_id: dict[int, Origin], results: list[Tensor]) -> None:
        """Note the rows that met each parameter, or that the parameter was read in another way."""
        handled: set[int] = set()
        written = {id(bound[i]) for i in operator.overwrites}  # FSDP2 fills parameters so
        if operator.name == "embedding_renorm_":
            return  # max_norm: rows that were looked up are within it already and stay as they are
        if operator.name in PRODUCTS:
            handled = self._read_product(operator, bound, by_id, results[0])
        elif operator.name in CONVOLUTIONS:
            handled = self._read_convolution(operator, bound, by_id, results[0])
        elif operator.name in EMBEDDINGS:
            handled = self._read_embedding(operator, bound, by_id, results[0])
        elif operator.name in ("add", "add_") and self._joint:
            handled = self._read_added_bias(bound, by_id, results[0])
        for identity, origin in by_id.items():
            if origin.kind is Kind.ALIAS and identity not in handled | written:
                self._tally.refuse(origin.names, f"read by {operator.label}{WAYS_OUT.get(operator.name, '')}")

    def _read_product(self, operator: Operator, bound: list[Any], by_id: dict[int, Origin], output: Tensor) -> set[int]:
        """Take the rows of a product; return the operands that are accounted for."""
        handled: set[int] = set()
        use: _Use | None = None
        for meeting in PRODUCTS[operator.name]:
            weight, rows = bound[meeting.weight], bound[meeting.rows]
            origin, other = by_id[id(weight)], by_id[id(rows)]
            if origin.kind is not Kind.ALIAS:
                continue
            handled.add(id(weight))
            if other.kind in (Kind.ALIAS, Kind.DERIVED):
                self._tally.refuse(origin.names, BUILDS)
            else:
                use = self._meet(operator, meeting, origin, rows, output) or use
        position = PRODUCTS[operator.name][0].bias
        if position is not None and isinstance(bound[position], Tensor):
            scaled = any(value != 1 for value in bound[3:5])  # beta and alpha: the bias's input is not the constant 1
            handled |= self._read_bias(operator, None if scaled else use, bound[position], by_id)
        return handled

    def _meet(
        self, operator: Operator, meeting: ContractionRule, origin: Origin, rows: Tensor, output: Tensor
    ) -> _Use | None:
        """Record one product of rows and a parameter, if strides say which side they met."""
        if origin.geometry is None:
            self._tally.refuse(origin.names, f"read by {operator.label} through a view that strides cannot describe")
            return None
        name = origin.names[0]
        shape = self._memory.parameters[name].shape
        where = locate_block(origin.geometry, meeting.dims, shape)
        if where is None:
            self._tally.refuse([name], f"read by {operator.label} through a view that is no block of rows or columns")
            return None
        _, m, d = where.layout.matrix_shape(shape)
        one = self._joint and where.side == "right" and where.layout.kind == "matrix"
        taken = Rows(meeting.view(as_plain(rows)), where, (d if where.side == "right" else m) + one, one)
        return self._record(operator, name, taken, output, lambda g: meeting.kept(g).ne(0).any(-1))

    def _record(
        self, operator: Operator, name: str, rows: Rows | Patches, output: Tensor, kept: Callable[[Tensor], Tensor]
    ) -> _Use | None:
        """Keep the rows until the batch ends (relevance, joint biases), or hand them on at once."""
        known = self._tally.meet(name, rows.place.layout)
        if self._observe is not None:
            self._observe(name, output)
        if not known:
            return None
        if self._relevance is not None:
            rows.source = rows.source.detach()  # a tensor of our own, told from those that others keep
        step = None if self._relevance is None else self._relevance.start()
        storage, label = storage_reference(output) if is_plain(output) else None, operator.label.split(".")[1]
        shape = torch.Size() if storage is None else output.shape
        use = _Use(name, rows, storage, shape, None if storage is None else step, kept, label)
        if self._relevance is not None or self._joint:
            self._uses.append(use)
        else:
            self._tally.push(name, rows, None, shape=self._memory.parameters[name].shape)
            self._tally.flush(QUEUE)
        return use

    def _read_convolution(
        self, operator: Operator, bound: list[Any], by_id: dict[int, Origin], output: Tensor
    ) -> set[int]:
        """Take the patches of a convolution whose kernel is a whole parameter."""
        inputs, weight, bias = bound[0], bound[1], bound[2]
        origin, other = by_id[id(weight)], by_id[id(inputs)]
        handled: set[int] = set()
        use: _Use | None = None
        if origin.kind is Kind.ALIAS:
            handled.add(id(weight))
            kernel = Kernel.of(weight.shape, bound[3:9])
            if other.kind in (Kind.ALIAS, Kind.DERIVED):
                self._tally.refuse(origin.names, BUILDS)
            elif not self._is_whole(origin, kernel):
                self._tally.refuse(
                    origin.names, f"read by {operator.label} through a view that is not the whole kernel"
                )
            else:
                name = origin.names[0]
                size = kernel.layout.matrix_shape(weight.shape)[2] + self._joint
                spatial = len(kernel.size)
                rows = Patches(inputs, kernel, size, self._joint)
                use = self._record(operator, name, rows, output, lambda g: convolution_kept(g, spatial))
        if isinstance(bias, Tensor):
            handled |= self._read_bias(operator, use, bias, by_id)
        return handled

    def _is_whole(self, origin: Origin, kernel: Kernel) -> bool:
        """Return whether an alias holds its parameter in row-major order, with the same matrices for this kernel."""
        geometry = origin.geometry
        if geometry is None or geometry.offset:
            return False
        shape = self._memory.parameters[origin.names[0]].shape
        step = 1
        for size, stride in zip(reversed(geometry.size), reversed(geometry.stride), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        if kernel.transposed:
            return tuple(shape) == geometry.size
        return step == shape.numel() and shape[0] == geometry.size[0]

    def _read_embedding(
        self, operator: Operator, bound: list[Any], by_id: dict[int, Origin], output: Tensor
    ) -> set[int]:
        """Take the rows that were looked up in an embedding."""
        origin, index = by_id[id(bound[0])], bound[1]
        geometry = origin.geometry
        if origin.kind is not Kind.ALIAS:
            return set()
        shape = self._memory.parameters[origin.names[0]].shape
        row = shape[1:].numel()
        if geometry is None or geometry.stride[0] != row or geometry.offset % row + geometry.size[1] > row:
            return set()
        name = origin.names[0]
        self._tally.order.setdefault(name)
        self._tally.meet_rows(name)
        if self._observe is not None:
            self._observe(name, output)
        simple = operator.name == "embedding" and index.device == output.device and is_plain(index)
        step = self._relevance.start() if self._relevance is not None else None
        index, sample = self._look_ups(operator, bound)
        index = index + geometry.offset // row
        use = _LookUp(name, index, shape[0], sample, output.shape if simple else torch.Size(), step if simple else None)
        if self._relevance is not None:
            self._uses.append(use)
        else:
            self._tally.look_up(name, use.index, use.number, use.sample)
        return {id(bound[0])}

    def _look_ups(self, operator: Operator, bound: list[Any]) -> tuple[Tensor, Tensor]:
        """Return the rows that an embedding looks up and the number of the sample, or of the bag, each is for."""
        index = as_plain(bound[1]).detach()
        if operator.name == "embedding":
            return index.clone(), _sample_numbers(index, self._samples)
        named = dict(zip(operator.arguments, bound))
        places = torch.arange(len(index), device=index.device)
        bag = torch.bucketize(places, as_plain(named["offsets"]).detach().to(places), right=True)
        padding = named.get("padding_idx")  # is left out of its bag
        if padding is None or padding < 0 or index.is_meta:
            return index.clone(), bag
        return index[index != padding], bag[index != padding]

    def _read_bias(self, operator: Operator, use: _Use | None, bias: Tensor, by_id: dict[int, Origin]) -> set[int]:
        """Pair a bias with the weight whose product it was added to, or give the reason why it is frozen."""
        origin = by_id[id(bias)]
        if origin.kind is not Kind.ALIAS:
            return set()
        if not (self._joint and use is not None and self._fits(use, origin)):
            self._tally.refuse(origin.names, f"read by {operator.label} as bias")
        elif use is not None:
            use.bias = origin.names[0]
        return {id(bias)}

    def _read_added_bias(self, bound: list[Any], by_id: dict[int, Origin], output: Tensor) -> set[int]:
        """Pair a bias that is added to (a view of) a product's output after the product."""
        for bias, other in ((bound[0], bound[1]), (bound[1], bound[0])):
            if not isinstance(bias, Tensor) or not isinstance(other, Tensor):
                continue
            origin = by_id[id(bias)]
            if origin.kind is not Kind.ALIAS or bias.ndim != 1 or other.shape[-1:] != bias.shape or bound[2] != 1:
                continue
            for use in reversed(self._uses):
                if not isinstance(use, _Use) or use.output is None or use.output.cdata != storage_identity(other):
                    continue
                if use.bias is None and isinstance(use.rows, Rows) and self._fits(use, origin):
                    use.bias = origin.names[0]
                    return {id(bias)}
        return set()

    def _fits(self, use: _Use, bias: Origin) -> bool:
        """Return whether the elements of a bias stand beside the rows of the weight that the product used."""
        if self._memory.sharing(use.name):
            return False  # of several parameters on one memory each would have its own bias
        where, geometry = use.rows.place, bias.geometry
        if geometry is None or len(geometry.size) != 1 or where.side != "right" or where.layout.kind == "batched":
            return False
        length = self._memory.parameters[bias.names[0]].shape
        groups, m, _ = where.layout.matrix_shape(self._memory.parameters[use.name].shape)
        start, number = where.outputs
        if tuple(length) != (groups * m,) or geometry.stride[0] != 1:
            return False
        return (geometry.offset, geometry.size[0]) == (start, groups * m if number == -1 else number)

    def before_writing(self, operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Save rows that are about to be written."""
        for target in operator.written(args, kwargs):
            pointer = storage_pointer(target)
            if not pointer:
                continue
            self._tally.flush_storage(pointer)
            for use in self._uses:
                if isinstance(use, _Use) and storage_pointer(use.rows.source) == pointer:
                    use.rows.clone_source()


def _sample_numbers(index: Tensor, samples: int | None) -> Tensor:
    """Return the number of the sample that each lookup of `index` is for, in a shape that expands to that of `index`.

    Samples stand along the axis that has `samples` entries, or one after the other along a first axis with a multiple
    of them (flattened tokens). Otherwise all samples share the lookups (positions, distances). Where their number is
    unknown they stand along the first axis.
    """
    shape = index.shape
    axis = shape.index(samples) if samples in shape else 0
    entries = shape[axis] if shape else 1
    known = samples or entries
    each = entries // known if known and entries % known == 0 else entries
    numbers = torch.arange(entries, device=index.device) // max(1, each)
    return numbers.reshape(-1, *(1 for _ in shape[axis + 1 :])) if shape else numbers[0]


def _row_mask(use: _Use | _LookUp, reach: Reach) -> Tensor | None:
    """Return which rows of a use reach the output, or `None` for all."""
    if isinstance(reach, bool):
        if reach:
            return None
        source = use.index if isinstance(use, _LookUp) else use.rows.source
        reach = torch.zeros(use.shape, dtype=torch.bool, device=source.device)
    mask = use.kept(reach)
    return None if bool(mask.all()) else mask
