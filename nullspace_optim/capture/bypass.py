"""Memory that is read past the operators: through NumPy, an address, or the body of a higher-order operator.

`BypassMode` sees calls of torch's Python interface that hand memory to somebody else (`numpy`, `data_ptr`), and runs
the bodies of higher-order operators (`cond`, `scan`, `flex_attention`) eagerly, where their operators are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .aliases import Kind
from .dispatch import CaptureMode

UNSEEN = "reached the output by a path that capture cannot see"
# Methods by which the bytes of a tensor leave the sight of the dispatcher.
_EXITS = frozenset(
    "numpy __array__ tolist data_ptr __dlpack__ untyped_storage storage _typed_storage __deepcopy__ __reduce_ex__ "
    "apply_ map_ map2_ __get__".split()
)
# Also used to look at a parameter's memory without reading it.
_INSPECTED = frozenset(("untyped_storage", "storage", "_typed_storage"))


class BypassMode(TorchFunctionMode):
    """Sees what leaves the operators that `watch` sees; enter it around the forward pass, inside `watch`."""

    def __init__(self, watch: CaptureMode) -> None:
        """Report to the tally of `watch`."""
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one function of torch's interface."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._run_body(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _EXITS and args and isinstance(args[0], Tensor) and self.watch.recording:
            with torch._C.DisableTorchFunction():
                self._leave(args[0], func, name)
        return func(*args, **kwargs)

    def _leave(self, tensor: Tensor, func: Any, name: str) -> None:
        """Note that somebody may read the bytes of `tensor`."""
        if name == "__get__":
            if func != Tensor.__cuda_array_interface__.__get__:  # type: ignore[attr-defined]
                return
            name = "__cuda_array_interface__"
        if name not in _INSPECTED:
            self._refuse(tensor, f"its memory was handed out by Tensor.{name}")
        if self.watch.relevance is not None:
            self.watch.relevance.leave(tensor, name)

    def _refuse(self, tensor: Tensor, reason: str) -> None:
        if self.watch.memory.knows(tensor):
            origin = self.watch.memory.origin(tensor)
            if origin.kind is Kind.ALIAS:
                self.watch.tally.refuse(origin.names, reason)

    def _run_body(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a higher-order operator by its own eager kernel, the functions that it was given under both modes."""
        bodies = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_body(leaf)]
        kernel = operator.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if not bodies or kernel is None or not self.watch.recording:
            return operator(*args, **kwargs)
        if self.watch.relevance is not None:
            self.watch.relevance.refuse(f"the higher-order operator {operator.name()} reads activations")
        args, kwargs = pytree.tree_map(lambda leaf: self._watched(leaf) if _is_body(leaf) else leaf, (args, kwargs))
        with _disable_current_modes():
            return kernel(*args, **kwargs)

    def _watched(self, body: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                stack.enter_context(self.watch)
                stack.enter_context(self)
                return body(*args, **kwargs)

        return run


def _is_body(leaf: Any) -> bool:
    return callable(leaf) and not isinstance(leaf, (Tensor, OpOverload, type))
