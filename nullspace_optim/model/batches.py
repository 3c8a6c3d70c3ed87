"""Batches: fed to the model, cut into samples, detached."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import BatchError
from .storage import is_plain

Forward = Callable[[Any], Any]
PLAIN = (str, bytes, int, float, complex)


def feeder(model: nn.Module, forward: Forward | None = None) -> Forward:
    """Return a callable that runs `model` on one batch.

    With `forward` given it decides alone. Otherwise: a tensor is the only argument; a mapping (or dataclass) gives
    the keys that `model.forward` accepts; a tuple or list gives its first item, or as many leading items as `forward`
    has required positional parameters. NumPy arrays become tensors, floats in the type of the model's first parameter;
    tensors are moved to that parameter's device.
    """
    if forward is not None:
        return forward
    accepted = inspect.signature(model.forward).parameters
    first = next(model.parameters(), torch.empty(0))

    def run(batch: Any) -> Any:
        args, kwargs = _arguments(batch, accepted)
        args, kwargs = pytree.tree_map_only(np.ndarray, lambda a: _as_tensor(a, first.dtype), (args, kwargs))
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(first.device), (args, kwargs))
        return model(*args, **kwargs)

    return run


def _as_tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Any:
    """Return numbers as a tensor, floats in `dtype`; arrays of strings or objects as they are."""
    if array.dtype.kind not in "biufc":
        return array
    return torch.as_tensor(array, dtype=dtype if array.dtype.kind == "f" else None)


def _arguments(batch: Any, accepted: Mapping[str, inspect.Parameter]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split `batch` into positional and keyword arguments of a forward with parameters `accepted`."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return (batch,), {}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        return (), _keywords(batch, accepted)
    leaves = pytree.tree_leaves(batch) if isinstance(batch, (list, tuple)) else []
    if leaves and all(isinstance(leaf, PLAIN) for leaf in leaves):
        raise BatchError(
            f"a batch of {len(batch)} plain values ({type(leaves[0]).__name__}) holds no tensor; "
            "make it one, or pass forward=, a callable that takes the batch and runs the model"
        )
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch):
        required = [
            p
            for p in accepted.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        leading = tuple(batch[: max(1, len(required))])
        if len(required) <= 1 and isinstance(leading[0], (Mapping, tuple, list)) and not _with_targets(batch):
            return _arguments(leading[0], accepted)
        return leading, {}
    raise BatchError(
        f"cannot feed a batch of type {type(batch).__name__} to the model; "
        "pass forward=, a callable that takes the batch and runs the model"
    )


def _with_targets(batch: Sequence[Any]) -> bool:
    """Return whether `batch` is a list of images and a list of as many targets, each a mapping (detection)."""
    if len(batch) != 2 or not all(isinstance(part, (tuple, list)) for part in batch):
        return False
    images, targets = batch
    pairs = 0 < len(images) == len(targets) and all(isinstance(target, Mapping) for target in targets)
    return pairs and all(isinstance(image, Tensor) for image in images)


def describe_feed(model: nn.Module, forward: Forward | None, batch: Any) -> tuple[str, str | None]:
    """Return how `batch` was read, and, where that was a guess, a note that says so.

    A guess: elements of a tuple that were left out beyond one (labels follow inputs), or taken for something that may
    be labels, and a list of tensors of which the first alone was fed.
    """
    if forward is not None:
        return "the whole batch, to forward=", None
    args, kwargs = _arguments(batch, inspect.signature(model.forward).parameters)
    fed = ", ".join([*map(_describe, args), *(f"{key}={_describe(value)}" for key, value in kwargs.items())])
    if not isinstance(batch, (tuple, list)) or hasattr(batch, "_fields"):
        return fed, None
    left, first = len(batch) - len(args), batch[0]
    views = isinstance(first, (tuple, list)) and len(first) > 1 and all(isinstance(t, Tensor) for t in first)
    shape = first.shape[1:] if isinstance(first, Tensor) else ()
    alike = [t for t in batch if isinstance(t, Tensor) and t.ndim > 1 and t.shape[1:] == shape]
    if views and args[0] is not first:
        guess = f"the first of {len(first)} tensors in the batch's first item was fed"
    elif len(args) == 1 and len(alike) > 1:
        guess = f"the first of {len(batch)} tensors of the batch was fed, of which {len(alike)} look like inputs"
    elif left and len(batch) > 2:
        guess = f"{len(args)} of {len(batch)} items of the batch were fed, in their order"
    else:
        return fed, None
    return fed, f"how the batch is read is a guess: {guess}; pass forward= to decide"


def _describe(value: Any) -> str:
    """Return the kind of one argument: `float32 [64, 3, 32, 32]` for a tensor."""
    if isinstance(value, Tensor):
        shape = list(value.shape) if is_plain(value) else "nested" if value.is_nested else "sparse"
        return f"{str(value.dtype).removeprefix('torch.')} {shape}"
    return type(value).__name__


def _keywords(batch: Mapping[Any, Any], accepted: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    every = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    chosen = {str(key): value for key, value in batch.items() if every or key in accepted}
    named = (p for p in accepted.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    lacking = sorted(p.name for p in named if p.default is p.empty and p.name not in chosen)
    if lacking or not chosen:
        verb = f"needs {lacking}" if lacking else f"accepts {sorted(accepted)}"
        raise BatchError(
            f"the batch has the keys {sorted(map(str, batch))}, the model's forward {verb}; "
            "pass forward=, a callable that takes the batch and runs the model"
        )
    return chosen


SAMPLES = 32


def samples_in(batch: Any) -> int | None:
    """Return the common first dimension of all tensors of `batch`, None if there is none.

    Sparse and nested tensors cannot be cut into samples by slices, so they have none; nor have a list of images and
    their targets, whose first axes are channels and boxes.
    """
    if isinstance(batch, (tuple, list)) and _with_targets(batch):
        return None
    leaves = pytree.tree_leaves(batch)
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor) or not is_plain(leaf)]
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in leaves if isinstance(leaf, Tensor) and is_plain(leaf)}
    return sizes.pop() if len(sizes) == 1 and -1 not in sizes and not others else None


def first_samples(batch: Any) -> Any:
    """Return the first 32 samples of `batch` (the whole batch if its tensors have no common first axis)."""
    if samples_in(batch) is None:
        return batch

    def leading(tensor: Tensor) -> Tensor:
        return tensor[:SAMPLES]

    return pytree.tree_map_only(Tensor, leading, batch)


def leading_outputs(outputs: Any) -> list[Tensor]:
    """Return copies of the first 32 entries of every floating tensor of `outputs` that has an axis."""
    floating = (t for t in tensors_in(outputs) if is_plain(t) and (t.is_floating_point() or t.is_complex()))
    return [t.detach()[:SAMPLES].clone() for t in floating if t.ndim]


def outputs_agree(within: Sequence[Tensor], alone: Sequence[Tensor]) -> bool:
    """Return whether outputs of samples alone are those of the same samples within a batch, as far as both go.

    A relative difference of 1e-2 is the rounding of half precision.
    """
    if [t.ndim for t in within] != [t.ndim for t in alone]:
        return False
    for one, other in zip(within, alone):
        common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape))
        then, now = (torch.nan_to_num(t[common].to(torch.promote_types(t.dtype, torch.float64))) for t in (one, other))
        if not float((now - then).norm()) <= 1e-2 * float(then.norm()):
            return False
    return True


def tensors_in(tree: Any, seen: dict[int, Any] | None = None) -> Iterator[Tensor]:
    """Yield the tensors of a tree of mappings, sequences, sets, dataclasses and plain objects, in order.

    Of a container that occurs twice, or holds itself, the tensors come once. Modules and functions are no containers.
    """
    seen = {} if seen is None else seen
    if isinstance(tree, Tensor):
        yield tree
    elif id(tree) not in seen:
        seen[id(tree)] = tree  # kept alive: an id stands for one object
        for child in _children(tree):
            yield from tensors_in(child, seen)


def _children(node: Any) -> Iterable[Any]:
    """Return what a container holds; nothing for anything else."""
    if isinstance(node, (str, bytes, int, float, type, nn.Module)) or callable(node):
        return ()
    if hasattr(node, "items") and callable(node.items):
        return (value for _, value in node.items())
    if isinstance(node, (list, tuple, set, frozenset)):
        return node
    if dataclasses.is_dataclass(node):
        return (getattr(node, field.name) for field in dataclasses.fields(node))
    return vars(node).values() if hasattr(node, "__dict__") else ()


def detach(tree: Any) -> Any:
    """Return the same tree with detached tensors; objects of unknown type are returned as they are."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(detach(v) for v in tree))
    if type(tree) in (list, tuple, set):
        return type(tree)(detach(v) for v in tree)
    if isinstance(tree, dict):
        twin = copy.copy(tree)
        for key, value in tree.items():
            twin[key] = detach(value)
        return twin
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        record: Any = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(record, field.name, detach(getattr(tree, field.name)))
        return record
    return tree
