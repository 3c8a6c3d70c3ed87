"""Gradients of parameters that no wrapper reduces, averaged over the ranks as DDP does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from .collectives import sum_over_ranks
from .group import world_size


class GradientAverage:
    """Averages gradients over the ranks at the end of every backward pass, before clipping and gradient scalers.

    A mean is linear, so gradients that were averaged already and gradients that accumulate on top of them come out
    right: parameters may also be inside `DistributedDataParallel`.
    """

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self._handles: list[Any] = []
        self._pass = -1

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of `parameters`, in the order that all ranks share, and of no others."""
        for handle in self._handles:
            handle.remove()
        self.parameters = list(parameters)
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in self.parameters]  # type: ignore[no-untyped-call]

    def _note(self, parameter: Tensor) -> None:
        """Ask autograd to call `_average` once this backward pass ends."""
        current = torch._C._current_graph_task_id()
        if world_size() > 1 and current != self._pass:
            self._pass = current
            Variable._execution_engine.queue_callback(self._average)  # type: ignore[attr-defined]

    def _average(self) -> None:
        self._pass = -1
        found = mean_over_ranks([p.grad for p in self.parameters], self.parameters)
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient


@torch.no_grad()
def mean_over_ranks(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the mean of each of `values` over the ranks, as `sum_over_ranks` sums them."""
    summed = sum_over_ranks(values, like)
    return summed if world_size() == 1 else [None if value is None else value.div_(world_size()) for value in summed]


@torch.no_grad()
def mean_over_holders(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the mean of each of `values` over the ranks that have it."""
    if world_size() == 1:
        return list(values)
    ones = [None if value is None else value.new_ones(()) for value in values]
    summed = sum_over_ranks([*values, *ones], [*like, *(one.new_empty(()) for one in like)])
    pairs = zip(summed[: len(values)], summed[len(values) :], strict=True)
    return [None if value is None or count is None else value.div_(count) for value, count in pairs]
