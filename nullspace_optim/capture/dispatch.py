"""The dispatch mode that sees every operator of a forward pass.

What reads a parameter is a view or a copy, whose result is followed, or it is one of the `uses` (a product, or
a reason why the parameter cannot be protected).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..covariance.accumulator import StatisticsAccumulator
from ..model.storage import is_plain, storage_pointer
from .aliases import CONSTANT, DATA, DERIVED, AliasTracker, Geometry, Kind, Origin
from .operators import COPIES, VIEWS_OF_COPIES, WITHOUT_READING, Operator, tensors_among
from .relevance.relevance import Relevance
from .uses import OperatorHandlers


class CaptureMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees one forward pass at a time; `relevance` is `None` where all rows count."""

    def __init__(
        self,
        memory: AliasTracker,
        tally: StatisticsAccumulator,
        relevance: Relevance | None,
        uses: OperatorHandlers,
    ) -> None:
        """Sort what reads the parameters of `memory` into `uses` and `tally`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.relevance = relevance
        self.uses = uses
        self.memory, self.tally = memory, tally
        self._paused = False
        self._operators: dict[Any, Operator] = {}

    supports_higher_order_operators = True

    @property
    def recording(self) -> bool:
        """Whether what runs now belongs to the forward pass."""
        return not self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing of what runs inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and note what it read."""
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, types, args, kwargs or {})

    def _dispatch(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self._paused:
            self.memory.promise(tensors_among([*args, *kwargs.values()]))
            return func(*args, **kwargs)
        if any(hasattr(kind, "__tensor_flatten__") and kind.__name__ != "DTensor" for kind in types):
            return NotImplemented  # a subclass made of plain tensors (jagged) runs on them, where they are seen
        if isinstance(func, HigherOrderOperator):
            return self._run_unopened(func, args, kwargs)
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = Operator.of(func)
        if operator.moves_shards:  # a parameter may get the address back that it had before
            if self.relevance is not None:
                self.relevance.receive_shards(tensors_among([*args, *kwargs.values()]))
            return func(*args, **kwargs)
        if operator.composite and all(map(is_plain, tensors_among([*args, *kwargs.values()]))):
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        return self._run(operator, func, args, kwargs)

    def _run_unopened(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a higher-order operator whose body is not seen: what it reads cannot be protected."""
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origins = [self.memory.origin(t) for t in operands if self.memory.knows(t)]
        for origin in origins:
            self.tally.refuse(origin.names, f"read by the higher-order operator {func.name()}")
        if self.relevance is not None:
            self.relevance.refuse(f"the higher-order operator {func.name()} reads activations")
        return func(*args, **kwargs)

    def _run(self, operator: Operator, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one forward operator; look closer if it reads anything that is known."""
        operands = tensors_among([*args, *kwargs.values()])
        if operator.writes:
            self.uses.before_writing(operator, args, kwargs)
        known = not operands or any([self.memory.knows(t) for t in operands])  # each is asked: reads are noted
        origins = [self.memory.origin(t) for t in operands] if known else [DATA] * len(operands)
        output = func(*args, **kwargs)
        if known:
            self._sort(operator, operator.bind(args, kwargs), operands, origins, output)
        if self.relevance is not None:
            self.relevance.follow(operator, func, args, kwargs, output)
        return output

    def _sort(
        self, operator: Operator, bound: list[Any], operands: list[Tensor], origins: list[Origin], output: Any
    ) -> None:
        """Note what the operator did with the parameters among its operands, and what its outputs are."""
        kinds = {origin.kind for origin in origins}
        results = tensors_among([output])
        if Kind.ALIAS in kinds and operator.name not in WITHOUT_READING:
            by_id = {id(t): origin for t, origin in zip(operands, origins, strict=True)}
            if self._follow(operator, bound, by_id, results):
                return
            self.uses.read(operator, bound, by_id, results)
        if operator.is_view and not operator.writes and Kind.ALIAS not in kinds:
            return
        joint = CONSTANT if operator.name in WITHOUT_READING else _joined(kinds)
        for tensor in (*results, *(bound[i] for i, _ in operator.writes if isinstance(bound[i], Tensor))):
            self.memory.learn(tensor, joint)

    def _follow(self, operator: Operator, bound: list[Any], by_id: dict[int, Origin], results: list[Tensor]) -> bool:
        """Follow a parameter through a view or a copy; return whether the operator was one and could be followed."""
        source = bound[0]
        origin = by_id.get(id(source), DATA) if isinstance(source, Tensor) else DATA
        if operator.writes or origin.kind is not Kind.ALIAS or len(by_id) != 1:
            return False
        if operator.is_view and all(storage_pointer(t) in self.memory.owned for t in results):
            return True
        if origin.geometry is None or not (operator.is_view or operator.name in COPIES):
            return False
        if operator.name in COPIES:
            views: list[Geometry] | None = [origin.geometry]
            if operator.name == "_to_copy":
                self.tally.cast.update(origin.names)
        else:
            views = _viewed(operator, bound, origin.geometry, results)
        if views is None:
            self.tally.refuse(origin.names, f"read by {operator.label} of a copied transpose")
            for tensor in results:
                self.memory.learn(tensor, DERIVED)
            return True
        for tensor, geometry in zip(results, views, strict=True):
            self.memory.learn(tensor, Origin(Kind.ALIAS, origin.names, geometry))
        return True


def _joined(kinds: set[Kind]) -> Origin:
    """Return what a result computed from operands of `kinds` is."""
    if Kind.DATA in kinds:
        return DATA
    return DERIVED if kinds & {Kind.ALIAS, Kind.DERIVED} else CONSTANT


def _viewed(operator: Operator, bound: list[Any], geometry: Geometry, results: list[Tensor]) -> list[Geometry] | None:
    """Run a view operator on the geometry of a copied parameter; `None` if strides cannot describe the result."""
    source = geometry.as_meta()
    if operator.name == "as_strided" or any(t.dtype != bound[0].dtype for t in results):
        return None
    try:
        if operator.name in VIEWS_OF_COPIES:
            return [Geometry.of(source.view(results[0].shape))]
        packet = getattr(torch.ops.aten, operator.name)
        rest = dict(zip(operator.arguments[1:], bound[1:], strict=True))  # some arguments are keywords only
        return [Geometry.of(t) for t in tensors_among([packet(source, **rest)])]
    except RuntimeError:
        return None
