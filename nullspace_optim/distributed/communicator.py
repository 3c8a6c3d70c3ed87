"""One communicator for a whole consolidation: `Alone` in one process, `Ranks` in several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

from . import collectives, group

T = TypeVar("T")


class Communicator(Protocol):
    """Exchange of plain objects and of results between the processes of one run."""

    rank: int
    size: int

    def all_gather_object(self, value: T) -> list[T]:
        """Return the `value` of every rank, in order."""

    def broadcast_object(self, source: int, value: T) -> T:
        """Return the `value` of rank `source` on every rank."""

    def broadcast_from_owners(self, values: Sequence[T | None], owners: Sequence[int], device: torch.device) -> list[T]:
        """Return all `values` on every rank; the i-th is known to rank `owners[i]` only."""


class Alone:
    """One process: every value is its own."""

    rank, size = 0, 1

    def all_gather_object(self, value: T) -> list[T]:
        """Return `[value]`."""
        return [value]

    def broadcast_object(self, source: int, value: T) -> T:
        """Return `value`."""
        return value

    def broadcast_from_owners(self, values: Sequence[T | None], owners: Sequence[int], device: torch.device) -> list[T]:
        """Return `values`, all of which are known."""
        return [value for value in values if value is not None]


class Ranks:
    """All ranks of the default process group; every rank makes the same calls in the same order."""

    def __init__(self) -> None:
        self.rank, self.size = group.rank(), group.world_size()

    def all_gather_object(self, value: T) -> list[T]:
        """Return the `value` of every rank, in order."""
        return collectives.all_gather_object(value)

    def broadcast_object(self, source: int, value: T) -> T:
        """Return the `value` of rank `source` on every rank; tensors in it arrive on the same kind of device."""
        return collectives.broadcast_object(source, value)

    def broadcast_from_owners(self, values: Sequence[T | None], owners: Sequence[int], device: torch.device) -> list[T]:
        """Return all `values`, flat dataclasses, on every rank; their tensors arrive on `device`."""
        return collectives.broadcast_from_owners(values, owners, device)


def communicator() -> Communicator:
    """Return the communicator of this process at this moment."""
    return Ranks() if group.world_size() > 1 else Alone()
