"""The dispatch mode that sees every operator of a forward pass and sorts what reads a parameter.

A parameter is read by a product (its rows are taken), by a view or a copy (the result is followed), or by anything else (a reason
why it cannot be protected). During the probe's backward pass nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .operators import (
    CONVOLUTIONS,
    COPIES,
    EMBEDDINGS,
    PRODUCTS,
    VIEWS_OF_COPIES,
    WITHOUT_READING,
    Kernel,
    Meeting,
    Patches,
    Rows,
    convolution_kept,
    place,
)
from .recognise import CONSTANT, DATA, DERIVED, Geometry, Kind, Memory, Origin, storage_pointer
from .relevance import Relevance
from .tally import Tally

BUILDS = "used to build another weight"
QUEUE = 4
# Writing to a product's output row by row leaves it that row's output.
_ROWWISE_WRITES = frozenset(
    f"{name}_"
    for name in (
        *(
            "add",
            "sub",
            "mul",
            "div",
            "relu",
            "gelu",
            "silu",
            "sigmoid",
            "tanh",
            "hardtanh",
            "hardswish",
            "hardsigmoid",
        ),
        *("leaky_relu", "elu", "masked_fill", "neg", "threshold", "mish", "celu", "exp", "pow", "clamp", "clamp_min"),
    )
)


@dataclass(frozen=True)
class _Operator:
    """What the schema of one operator says."""

    name: str
    label: str
    is_view: bool
    writes: tuple[tuple[int, str], ...]
    composite: bool
    defaults: tuple[Any, ...]
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, func: Any) -> _Operator:
        """Read the schema of `func`."""
        schema = func._schema
        space, name = schema.name.split("::")
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        returned = [r.alias_info for r in schema.returns if r.alias_info is not None]
        return cls(
            name=name if space == "aten" else f"{space}.{name}",
            label=f"{space}.{name}",
            is_view=(bool(returned) and not any(info.is_write for info in returned)) or name == "_unsafe_view",
            writes=tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write),
            composite=composite and name not in PRODUCTS and name not in EMBEDDINGS and name not in CONVOLUTIONS,
            defaults=tuple(a.default_value for a in schema.arguments),
            arguments=tuple(a.name for a in schema.arguments),
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return all arguments in the order of the schema."""
        bound = [*args, *self.defaults[len(args) :]]
        for key, value in kwargs.items():
            bound[self.arguments.index(key)] = value
        return bound

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors that the operator writes to."""
        values = [args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes]
        return _tensors(values)


@dataclass(eq=False)
class _Use:
    """Rows that met a weight, and the output whose gradient tells which of them count."""

    name: str
    rows: Rows | Patches
    output: Tensor
    kept: Callable[[Tensor], Tensor]
    operator: str
    bias: str | None = None
    all_rows: bool = False


@dataclass(eq=False)
class _LookUp:
    """Embedding rows that were looked up."""

    name: str
    index: Tensor
    number: int
    output: Tensor
    all_rows: bool = False

    def kept(self, gradient: Tensor) -> Tensor:
        """Return which of the looked-up rows have a gradient."""
        return gradient.ne(0).any(-1)


class Watch(TorchDispatchMode):
    """Sees one forward pass at a time; `relevance` is `None` where all rows count."""

    def __init__(
        self,
        memory: Memory,
        tally: Tally,
        relevance: Relevance | None,
        *,
        joint: bool,
        observe: Callable[[str, Tensor], None] | None,
    ) -> None:
        """Sort what reads the parameters of `memory` into `tally`."""
        super().__init__()
        self._memory, self._tally, self._joint, self._observe = memory, tally, joint, observe
        self.relevance = relevance
        self.probing = False
        self._uses: list[_Use | _LookUp] = []
        self._operators: dict[Any, _Operator] = {}
        self._checked: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and note what it read."""
        kwargs = kwargs or {}
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = _Operator.of(func)
        if self.probing and self.relevance is not None:
            return self.relevance.backward(operator.name, func, args, kwargs)
        if operator.composite:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        return self._run(operator, func, args, kwargs)

    def settle(self, gradients: Sequence[Tensor | None] | None) -> None:
        """Hand the rows of the batch to the tally; `gradients` of `wanted()` say which count, `None`: all."""
        wanted = {id(use): i for i, use in enumerate(self._wanting())}
        for use in self._uses:
            mask: Tensor | None = None
            if gradients is not None and id(use) in wanted:
                gradient = gradients[wanted[id(use)]]
                mask = use.kept(torch.zeros_like(use.output) if gradient is None else gradient)
                mask = None if bool(mask.all()) else mask
            if isinstance(use, _LookUp):
                self._tally.use_rows(use.name, use.index if mask is None else use.index[mask], use.number)
                continue
            if self._joint and use.rows.place.side == "right":
                self._tally.pair(use.name, use.bias, use.operator)
            self._tally.push(use.name, use.rows, mask, shape=self._memory.parameters[use.name].shape)
        self._uses.clear()

    def wanted(self) -> list[Tensor]:
        """Return the outputs whose gradients tell which rows count."""
        return [use.output for use in self._wanting()]

    def drop(self) -> None:
        """Forget the batch."""
        self._uses.clear()

    def _wanting(self) -> list[_Use | _LookUp]:
        return [use for use in self._uses if use.output.requires_grad and not use.all_rows]

    def _run(self, operator: _Operator, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one forward operator; look closer if it reads anything that is known."""
        operands = _tensors([*args, *kwargs.values()])
        if operator.writes:
            self._before_writing(operator, args, kwargs)
        known = not operands or any(self._memory.knows(t) for t in operands)
        origins = [self._memory.origin(t) for t in operands] if known else [DATA] * len(operands)
        output = func(*args, **kwargs)
        if self.relevance is not None and self.relevance.note is None:
            activations = [t for t, o in zip(operands, origins, strict=True) if o.kind is Kind.DATA]
            if activations:
                self.relevance.watch(operator.name, args, activations, output)
        if known:
            self._sort(operator, operator.bind(args, kwargs), operands, origins, output)
        return output

    def _sort(
        self, operator: _Operator, bound: list[Any], operands: list[Tensor], origins: list[Origin], output: Any
    ) -> None:
        """Note what the operator did with the parameters among its operands, and what its outputs are."""
        kinds = {origin.kind for origin in origins}
        results = _tensors([output])
        if Kind.ALIAS in kinds and operator.name not in WITHOUT_READING:
            by_id = {id(t): origin for t, origin in zip(operands, origins, strict=True)}
            if self._follow(operator, bound, by_id, results):
                return
            self._read(operator, bound, by_id, results)
        if operator.is_view and not operator.writes and Kind.ALIAS not in kinds:
            return
        joint = CONSTANT if operator.name in WITHOUT_READING else _joined(kinds)
        for tensor in (*results, *(bound[i] for i, _ in operator.writes if isinstance(bound[i], Tensor))):
            self._memory.learn(tensor, joint)

    def _follow(self, operator: _Operator, bound: list[Any], by_id: dict[int, Origin], results: list[Tensor]) -> bool:
        """Follow a parameter through a view or a copy; return whether the operator was one and could be followed."""
        source = bound[0]
        origin = by_id.get(id(source), DATA) if isinstance(source, Tensor) else DATA
        if operator.writes or origin.kind is not Kind.ALIAS or len(by_id) != 1:
            return False
        if operator.is_view and all(storage_pointer(t) in self._memory.owned for t in results):
            return True
        if origin.geometry is None or not (operator.is_view or operator.name in COPIES):
            return False
        if operator.name in COPIES:
            views: list[Geometry] | None = [origin.geometry]
            if operator.name == "_to_copy":
                self._tally.cast.update(origin.names)
        else:
            views = _viewed(operator, bound, origin.geometry, results)
        if views is None:
            self._tally.refuse(origin.names, f"read by {operator.label} of a copied transpose")
            for tensor in results:
                self._memory.learn(tensor, DERIVED)
            return True
        for tensor, geometry in zip(results, views, strict=True):
            self._memory.learn(tensor, Origin(Kind.ALIAS, origin.names, geometry))
        return True

    def _read(self, operator: _Operator, bound: list[Any], by_id: dict[int, Origin], results: list[Tensor]) -> None:
        """Note the rows that met each parameter, or that the parameter was read in another way."""
        handled: set[int] = set()
        if operator.name in PRODUCTS:
            handled = self._read_product(operator, bound, by_id, results[0])
        elif operator.name in CONVOLUTIONS:
            handled = self._read_convolution(operator, bound, by_id, results[0])
        elif operator.name in EMBEDDINGS:
            handled = self._read_embedding(operator, bound, by_id, results[0])
        elif operator.name in ("add", "add_") and self._joint:
            handled = self._read_added_bias(bound, by_id, results[0])
        for identity, origin in by_id.items():
            if origin.kind is Kind.ALIAS and identity not in handled:
                self._tally.refuse(origin.names, f"read by {operator.label}")

    def _read_product(
        self, operator: _Operator, bound: list[Any], by_id: dict[int, Origin], output: Tensor
    ) -> set[int]:
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
            handled |= self._read_bias(operator, use, bound[position], by_id)
        return handled

    def _meet(self, operator: _Operator, meeting: Meeting, origin: Origin, rows: Tensor, output: Tensor) -> _Use | None:
        """Record one product of rows and a parameter, if strides say which side they met."""
        if origin.geometry is None:
            self._tally.refuse(origin.names, f"read by {operator.label} through a view that strides cannot describe")
            return None
        name = origin.names[0]
        shape = self._memory.parameters[name].shape
        where = place(origin.geometry, meeting.dims, shape)
        if where is None:
            self._tally.refuse([name], f"read by {operator.label} through a view that is no block of rows or columns")
            return None
        _, m, d = where.layout.matrix_shape(shape)
        one = self._joint and where.side == "right" and where.layout.kind == "matrix"
        taken = Rows(meeting.view(rows), where, (d if where.side == "right" else m) + one, one)
        return self._record(operator, name, taken, output, lambda g: meeting.kept(g).ne(0).any(-1))

    def _record(
        self, operator: _Operator, name: str, rows: Rows | Patches, output: Tensor, kept: Callable[[Tensor], Tensor]
    ) -> _Use:
        """Keep the rows until the batch ends (relevance, joint biases), or hand them on at once."""
        self._tally.meet(name, rows.place.layout)
        if self._observe is not None:
            self._observe(name, output)
        use = _Use(name, rows, output, kept, operator.label.split(".")[1])
        self._check_weight(name, rows)
        if self.relevance is not None or self._joint:
            self._uses.append(use)
        else:
            self._tally.push(name, rows, None, shape=self._memory.parameters[name].shape)
            self._tally.flush(QUEUE)
        return use

    def _check_weight(self, name: str, rows: Rows | Patches) -> None:
        """A weight that is exactly zero hides from the probe what earlier weights do; it will not stay zero."""
        if self.relevance is None or self.relevance.note is not None:
            return
        if name in self._checked:
            return
        self._checked.add(name)
        if not bool(self._memory.parameters[name].detach().any()):
            self.relevance.refuse(f"'{name}' is all zero, so no gradient passes through it")

    def _read_convolution(
        self, operator: _Operator, bound: list[Any], by_id: dict[int, Origin], output: Tensor
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
        self, operator: _Operator, bound: list[Any], by_id: dict[int, Origin], output: Tensor
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
        simple = operator.name == "embedding" and index.device == output.device
        use = _LookUp(name, index.detach().clone() + geometry.offset // row, shape[0], output, all_rows=not simple)
        if self.relevance is not None:
            self._uses.append(use)
        else:
            self._tally.use_rows(name, use.index, use.number)
        return {id(bound[0])}

    def _read_bias(self, operator: _Operator, use: _Use | None, bias: Tensor, by_id: dict[int, Origin]) -> set[int]:
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
                if not isinstance(use, _Use) or storage_pointer(use.output) != storage_pointer(other):
                    continue
                if use.bias is None and isinstance(use.rows, Rows) and self._fits(use, origin):
                    use.bias = origin.names[0]
                    return {id(bias)}
        return set()

    def _fits(self, use: _Use, bias: Origin) -> bool:
        """Return whether the elements of a bias stand beside the rows of the weight that the product used."""
        where, geometry = use.rows.place, bias.geometry
        if geometry is None or len(geometry.size) != 1 or where.side != "right" or where.layout.kind == "batched":
            return False
        if len(self._memory.parameters[bias.names[0]].shape) != 1:
            return False
        start, number = where.outputs
        rows = self._memory.parameters[use.name].shape[0]
        whole = (
            number == -1 and geometry.offset == 0 and self._memory.parameters[bias.names[0]].numel() == geometry.size[0]
        )
        aligned = geometry.offset == start and geometry.size[0] == number
        same_length = isinstance(use.rows, Patches) or self._memory.parameters[bias.names[0]].numel() == rows
        return (whole or aligned) and same_length and geometry.stride[0] == 1

    def _before_writing(self, operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Save rows that are about to be overwritten; outputs overwritten out of row order no longer tell their rows."""
        for target in operator.written(args, kwargs):
            pointer = storage_pointer(target)
            if not pointer:
                continue
            self._tally.flush_storage(pointer)
            for use in self._uses:
                if isinstance(use, _Use) and storage_pointer(use.rows.source) == pointer:
                    use.rows.clone_source()
                if storage_pointer(use.output) == pointer and operator.name not in _ROWWISE_WRITES:
                    use.all_rows = True


def _joined(kinds: set[Kind]) -> Origin:
    """Return what a result computed from operands of `kinds` is."""
    if Kind.DATA in kinds:
        return DATA
    return DERIVED if kinds & {Kind.ALIAS, Kind.DERIVED} else CONSTANT


def _viewed(operator: _Operator, bound: list[Any], geometry: Geometry, results: list[Tensor]) -> list[Geometry] | None:
    """Run a view operator on the geometry of a copied parameter; `None` if strides cannot describe the result."""
    source = geometry.as_meta()
    if operator.name == "as_strided" or any(t.dtype != bound[0].dtype for t in results):
        return None
    try:
        if operator.name in VIEWS_OF_COPIES:
            return [Geometry.of(source.view(results[0].shape))]
        packet = getattr(torch.ops.aten, operator.name)
        return [Geometry.of(t) for t in _tensors([packet(source, *bound[1:])])]
    except RuntimeError:
        return None


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among `values`, lists and tuples opened."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors(value))
    return found
