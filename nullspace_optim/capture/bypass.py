"""Parameters that reach an output past the operators: through NumPy, an address, or code that autograd alone knows.

`BypassMode` sees calls of torch's Python interface that hand memory to somebody else (`numpy`, `data_ptr`), and runs
the bodies of higher-order operators (`cond`, `scan`, `flex_attention`) eagerly, where their operators are seen.
`graph_leaves` walks the autograd graph of the outputs down to every parameter that they depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..model.batches import tensors_in
from .aliases import Kind
from .dispatch import CaptureMode

UNSEEN = "reached the output by a path that capture cannot see"
_HANDED_OUT = {
    getattr(Tensor, name): name
    for name in ("numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__")
}
_HANDED_OUT[Tensor.__cuda_array_interface__.__get__] = "__cuda_array_interface__"
_PASSING_ON = frozenset(
    f"{name}Backward0"
    for name in (
        "T Transpose Permute View UnsafeView ReshapeAlias Alias Slice Select Split Expand Squeeze Unsqueeze AsStrided "
        "Clone ToCopy"
    ).split()
)


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
        if func in _HANDED_OUT and args and isinstance(args[0], Tensor) and self.watch.recording:
            self._refuse(args[0], f"its memory was handed out by Tensor.{_HANDED_OUT[func]}")
        return func(*args, **kwargs)

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


def graph_leaves(outputs: Any) -> Iterator[tuple[Tensor, str]]:
    """Yield every leaf that the autograd graph of `outputs` leads to, with the name of the node that uses it.

    Views and copies between the two are passed over.
    """
    stack: list[tuple[Any, str]] = [(tensor.grad_fn, "") for tensor in tensors_in(outputs)]
    visited = set()
    while stack:
        node, user = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable, user
            continue
        user = user if node.name() in _PASSING_ON and user else node.name()
        stack.extend((following, user) for following, _ in node.next_functions)
