"""Consolidate a task class by class (CGP): labels split its batches, each group of classes is one consolidation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..distributed.group import world_size
from ..errors import BatchError, OptionError
from ..model.batches import Forward, feeder
from ..model.restore import restored_model
from ..optimizer.optimizer import NullSpaceOptimizer
from ..policies.cgp import CGP
from ..report import ConsolidationReport


def consolidate_classes(
    optimizer: NullSpaceOptimizer,
    loader: Iterable[Any],
    labels: Callable[[Any], Tensor],
    *,
    name: str,
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[tuple[int, ...], ConsolidationReport]:
    """Protect every class of a task by itself; return the reports by the classes that were joined.

    `labels(batch)` returns the labels `[n]` of a batch, whose tensors have `n` samples along their first dimension. The
    model's outputs `[n, c]` tell which samples are right (only those count; all of a class where none is) and how alike
    classes are: those whose mean outputs have a cosine above `policy.similarity` are joined. Tasks are named
    ``"<name>/<class>+<class>"``; each is all or nothing by itself. The batches are held in memory until the end.

    Raises:
        OptionError: the optimizer's policy is not `CGP`, or there are several processes.
        BatchError: labels or outputs do not fit the batches.
    """
    policy = optimizer.policy
    if not isinstance(policy, CGP):
        raise OptionError(f"consolidate_classes needs policy=CGP(...), which joins like classes; not {policy!r}")
    if world_size() > 1:
        raise OptionError(
            "consolidate_classes sees the classes of one process only; consolidate class by class yourself, the same "
            "classes in the same order on every rank (a rank may give an empty loader)"
        )
    parts, prototypes = _split(optimizer, loader, labels, forward)
    reports = {}
    for group in _joined(prototypes, policy.similarity):
        batches = [batch for label in group for batch in parts[label]]
        task = f"{name}/{'+'.join(map(str, group))}"
        reports[group] = optimizer.consolidate(batches, name=task, forward=forward, progress=progress)
    return reports


def _split(
    optimizer: NullSpaceOptimizer, loader: Iterable[Any], labels: Callable[[Any], Tensor], forward: Forward | None
) -> tuple[dict[int, list[Any]], dict[int, Tensor]]:
    """Return the batches and the prototype of every class."""
    parts: dict[int, list[tuple[Any, Tensor, Tensor]]] = {}
    model = optimizer.model
    with restored_model(model, loader), torch.no_grad():
        run = feeder(model, forward)
        for batch in loader:
            wanted, outputs = labels(batch), run(batch)
            if not isinstance(outputs, Tensor) or outputs.ndim != 2 or wanted.shape != outputs.shape[:1]:
                shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise BatchError(f"labels {tuple(wanted.shape)} do not fit outputs {shape}: expected [n] and [n, c]")
            for label in sorted(set(wanted.tolist())):
                mine = (wanted == label).nonzero().flatten()
                right = outputs[mine].argmax(1) == wanted[mine].to(outputs.device)
                parts.setdefault(int(label), []).append((_taken(batch, mine, len(wanted)), outputs[mine], right.cpu()))
    batches: dict[int, list[Any]] = {}
    prototypes: dict[int, Tensor] = {}
    for label, found in sorted(parts.items()):
        known = any(bool(right.any()) for _, _, right in found)
        keep = [right if known else torch.ones_like(right) for _, _, right in found]
        chosen = [(b, o[k.to(o.device)], k) for (b, o, _), k in zip(found, keep, strict=True) if k.any()]
        batches[label] = [_taken(batch, k.nonzero().flatten(), len(k)) for batch, _, k in chosen]
        prototypes[label] = torch.cat([outputs for _, outputs, _ in chosen]).float().mean(0)
    return batches, prototypes


def _taken(batch: Any, index: Tensor, number: int) -> Any:
    """Return the samples `index` of every tensor in `batch` that has `number` of them."""

    def take(tensor: Tensor) -> Tensor:
        return tensor[index.to(tensor.device)] if tensor.ndim and len(tensor) == number else tensor

    return pytree.tree_map_only(Tensor, take, batch)


def _joined(prototypes: dict[int, Tensor], similarity: float) -> list[tuple[int, ...]]:
    """Join each class to the first group whose first class has a cosine above `similarity` with it."""
    groups: list[list[int]] = []
    for label, prototype in prototypes.items():
        alike = (group for group in groups if _cosine(prototypes[group[0]], prototype) > similarity)
        found: list[int] | None = next(alike, None)
        if found is None:
            groups.append([label])
        else:
            found.append(label)
    return [tuple(group) for group in groups]


def _cosine(one: Tensor, two: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0))
