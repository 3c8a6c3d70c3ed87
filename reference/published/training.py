"""Training and evaluation on one task, with everything in memory: batches of ten leave no time for a data loader.

The order of the images is drawn from (seed, task, epoch), so all methods of one seed see the same batches and a
resumed run sees those of an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from reference.errors import ExperimentError
from reference.published.data import Labelled
from reference.published.protocols import Protocol


def train(
    model: nn.Module,
    optimizer: Optimizer,
    data: Labelled,
    validation: Labelled,
    protocol: Protocol,
    task: int,
    seed: int,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> list[float]:
    """Train on one task as `protocol` says; return the mean training loss of each epoch.

    `penalty()` is added to the cross entropy of every batch.

    Raises:
        ExperimentError: the loss is not finite.
    """
    torch.manual_seed(1000 * seed + task)  # dropout
    plan = Patience(protocol, optimizer)
    steps = protocol.epochs * math.ceil(len(data[1]) / protocol.batch)
    falling = CosineAnnealingLR(optimizer, steps) if protocol.cosine else None
    losses = []
    for epoch in range(protocol.epochs):
        order = order_of(seed, task, epoch, len(data[1]))
        if epoch in protocol.halvings:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        losses.append(train_epoch(model, optimizer, data, order, protocol, task, penalty, falling))
        if not math.isfinite(losses[-1]):
            raise ExperimentError(f"task {task + 1}, epoch {epoch + 1}: the training loss is not finite; lower --rate")
        if protocol.patience:
            seen = order_of(seed, task, epoch, len(validation[1]), 1)
            shown = validation[0][seen], validation[1][seen]
            if plan.exhausted(model, loss_on(model, shown, protocol.test_batch, task)):
                break
    plan.restore(model)
    return losses


def order_of(seed: int, task: int, epoch: int, count: int, *stream: int) -> Tensor:
    """The order of `count` images in one epoch, `[count]`; that of validation images has a stream of its own, 1."""
    return torch.from_numpy(np.random.RandomState([seed, task, epoch, *stream]).permutation(count))


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data: Labelled,
    order: Tensor,
    protocol: Protocol,
    task: int,
    penalty: Callable[[], Tensor | float],
    falling: LRScheduler | None = None,
) -> float:
    """One pass over `data` in `order` `[n]`, `falling` a step after each batch; return the mean loss of the batches."""
    model.train()
    images, labels = (part[order].split(protocol.batch) for part in data)
    total = torch.zeros(())
    for some, their_labels in zip(images, labels):
        optimizer.zero_grad()
        seen = augmented(some) if protocol.augment else some
        with torch.autocast("cpu", enabled=protocol.precision == "bfloat16"):
            logits = model(seen, task)
        loss = functional.cross_entropy(logits.float(), their_labels) + penalty()
        loss.backward()
        optimizer.step()
        if falling is not None:
            falling.step()
        total += loss.detach()
    return float(total) / len(images)


def augmented(images: Tensor, padding: int = 4) -> Tensor:
    """A random crop of each image `[n, c, h, w]` after padding with zeros, mirrored half of the time."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    down, right = torch.randint(2 * padding + 1, (2, n, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.rand(n, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    cropped = padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


class Patience:
    """The schedule of GPM's CIFAR script: halve the rate when validation stalls, keep the best weights."""

    def __init__(self, protocol: Protocol, optimizer: Optimizer) -> None:
        self.protocol, self.optimizer = protocol, optimizer
        self.left = protocol.patience or 0
        self.best = math.inf
        self.weights: dict[str, Tensor] | None = None

    def exhausted(self, model: nn.Module, loss: float) -> bool:
        """Take note of one epoch's validation loss; True when training is to end."""
        if loss < self.best:
            self.best, self.left = loss, self.protocol.patience or 0
            self.weights = copy.deepcopy(model.state_dict())
            return False
        self.left -= 1
        if self.left > 0:
            return False
        rates = [group["lr"] / 2 for group in self.optimizer.param_groups]
        if max(rates) < self.protocol.least_rate:
            return True
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self.left = self.protocol.patience or 0
        return False

    def restore(self, model: nn.Module) -> None:
        """Put the best epoch's weights back, if any were kept."""
        if self.weights is not None:
            model.load_state_dict(self.weights)


@torch.no_grad()
def outputs(model: nn.Module, data: Labelled, batch: int, task: int) -> list[tuple[Tensor, Tensor]]:
    """Logits and labels of all images, in batches of `batch` in their order."""
    model.eval()
    return [(model(images, task), labels) for images, labels in zip(*(part.split(batch) for part in data))]


def loss_on(model: nn.Module, data: Labelled, batch: int, task: int) -> float:
    """Mean cross entropy over all images."""
    found = outputs(model, data, batch, task)
    return sum(float(functional.cross_entropy(*pair, reduction="sum")) for pair in found) / len(data[1])


def accuracy(model: nn.Module, data: Labelled, batch: int, task: int) -> float:
    """Share of right answers in percent."""
    right = sum(int((logits.argmax(1) == labels).sum()) for logits, labels in outputs(model, data, batch, task))
    return 100 * right / len(data[1])
