"""Batches: fed to the model, cut into samples, detached."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import BatchError

Forward = Callable[[Any], Any]


def feeder(model: nn.Module, forward: Forward | None = None) -> Forward:
    """Return a callable that runs `model` on one batch.

    With `forward` given it decides alone. Otherwise: a tensor is the only argument; a mapping (or dataclass) gives
    the keys that `model.forward` accepts; a tuple or list gives its first item, or as many leading items as `forward`
    has required positional parameters. Tensors are moved to the device of the model's first parameter.
    """
    if forward is not None:
        return forward
    accepted = inspect.signature(model.forward).parameters
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run(batch: Any) -> Any:
        args, kwargs = _arguments(batch, accepted)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        return model(*args, **kwargs)

    return run


def _arguments(batch: Any, accepted: Mapping[str, inspect.Parameter]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split `batch` into positional and keyword arguments of a forward with parameters `accepted`."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        return (), _keywords(batch, accepted)
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch):
        required = [
            p
            for p in accepted.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        leading = tuple(batch[: max(1, len(required))])
        if len(required) <= 1 and isinstance(leading[0], (Mapping, tuple, list)):
            return _arguments(leading[0], accepted)
        return leading, {}
    raise BatchError(
        f"cannot feed a batch of type {type(batch).__name__} to the model; "
        "pass forward=, a callable that takes the batch and runs the model"
    )


def _keywords(batch: Mapping[Any, Any], accepted: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return {str(key): value for key, value in batch.items()}
    chosen = {str(key): value for key, value in batch.items() if key in accepted}
    if not chosen:
        raise BatchError(
            f"the batch has the keys {sorted(map(str, batch))}, the model's forward accepts {sorted(accepted)}; "
            "pass forward=, a callable that takes the batch and runs the model"
        )
    return chosen


SAMPLES = 32


def samples_in(batch: Any) -> int | None:
    """Return the common first dimension of all tensors of `batch`, None if there is none."""
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)}
    others = [leaf for leaf in pytree.tree_leaves(batch) if not isinstance(leaf, Tensor)]
    return sizes.pop() if len(sizes) == 1 and -1 not in sizes and not others else None


def first_samples(batch: Any) -> Any:
    """Return the first 32 samples of `batch` (the whole batch if its tensors have no common first axis)."""
    if samples_in(batch) is None:
        return batch

    def leading(tensor: Tensor) -> Tensor:
        return tensor[:SAMPLES]

    return pytree.tree_map_only(Tensor, leading, batch)


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
