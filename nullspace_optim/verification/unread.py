"""Parameters that change outputs although no operator was seen to read them.

NumPy arrays and addresses that were taken before the forward pass, and compiled code that is not registered with torch,
read a parameter where neither operators nor autograd tell of it. So the parameters that nothing was seen to read are
disturbed, all at once, and the same samples are run again: unchanged outputs clear them all. Otherwise halves of them
are disturbed until those that matter are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..distributed.collectives import all_gather_object
from ..distributed.group import local_tensor
from ..model.batches import tensors_in
from ..model.restore import fixed_seed
from ..model.storage import plain_parts

NOT_REPEATABLE = (
    "outputs for the same samples differ from run to run, so it is unknown whether parameters that no operator read "
    "('{}', ...) reach them by another path"
)


@torch.no_grad()
def reaching_parameters(parameters: Mapping[str, Tensor], run: Callable[[], Any]) -> list[str] | None:
    """Return which `parameters` the outputs of `run()` depend on; `None` if outputs differ from run to run.

    Parameters are as before, bit for bit, on exit. All ranks must ask with the same names.
    """
    names = [name for name, parameter in parameters.items() if parameter.numel()]
    if not names:
        return []
    before = _outcome(run)

    def matters(part: Sequence[str]) -> bool:
        with _disturbed([local_tensor(parameters[name]) for name in part]):
            try:
                after: list[Any] | None = _outcome(run)
            except Exception:  # values that the forward pass cannot work with: it has read them
                after = None
        return any(all_gather_object(not _equal(before, after)))

    if not matters(names):
        return []
    if any(all_gather_object(not _equal(before, _outcome(run)))):
        return None
    return _narrowed(names, matters)


def _narrowed(names: Sequence[str], matters: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return which of `names`, that matter together, matter; all of them where neither half does alone."""
    if len(names) == 1:
        return list(names)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    found = [name for half in halves if matters(half) for name in _narrowed(half, matters)]
    return found or list(names)


@contextmanager
def _disturbed(blocks: Sequence[Tensor]) -> Iterator[None]:
    """Add noise of the size of the values, and of 1, to all `blocks`; give every bit back on exit."""
    saved = [block.clone() for block in blocks]
    generator = torch.Generator().manual_seed(0)
    try:
        for block in blocks:
            dtype = torch.complex64 if block.is_complex() else torch.float32
            noise = torch.randn(block.shape, generator=generator, dtype=dtype).to(block)
            block.add_(noise * (1 + block.abs().mean()))
        yield
    finally:
        for block, value in zip(blocks, saved, strict=True):
            block.copy_(value)


def _outcome(run: Callable[[], Any]) -> list[Any]:
    """Return all tensors and plain values of the outputs; every run draws the same random numbers."""
    with fixed_seed():
        outputs = run()
    values = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, (bool, int, float, str, bytes))]
    return [part.detach().clone() for tensor in tensors_in(outputs) for part in plain_parts(tensor)] + values


def _equal(before: list[Any], after: list[Any] | None) -> bool:
    """Return whether two outcomes are the same, bit for bit (NaN equals NaN); `None` is that of a run that failed."""
    if after is None or len(before) != len(after):
        return False
    return all(_same(one, other) for one, other in zip(before, after, strict=True))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
