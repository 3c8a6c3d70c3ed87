"""Recognition of a sample's task where none is named: once for all layers of a tower, by the frozen backbone.

A tower is a chain of blocks, such as one encoder of a CLIP, or the model. It runs once without experts; what its last
layer with experts reads then decides, and the tower runs again with the router of that task, or without experts. No
sample's result depends on its batch.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...errors import NullSpaceWarning, OptionError
from .context import Routing, RoutingContext
from .experts import Stateless
from .router import tokens_of

SIZE = 64  # numbers by which a sample is recognised
PRIOR, DEVIATION = 16, 0.25  # samples at distance 1 with this deviation that a task's own are mixed with
ALONE, FARTHEST = 3.0, 6.0  # deviations above a task's mean distance: its limit without a pool, the largest with one
CLOSE = 0.05  # of the mean distance of a task's own samples: two tasks this near are not told apart
QUANTILE = 0.05  # share of the pool that may lie within the limit of a task
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")  # arguments that a call fills
KNOWN = ("centres", "owners", "spreads", "limits", "scatter", "count")


class TaskRecognition(Stateless):
    """The finished tasks of one tower as Gaussians whose covariances are multiples of a common one, or as lists.

    A task whose samples came again and again, as a CLIP's prompts do in every batch, is the list of these samples: a
    prompt is of the task that has the nearest one. Features are seeded random projections of the mean token and the
    first one. Buffers: `centres` `[M, p]`, means or listed samples, and the task of each, `owners` `[M]`; `spreads`
    `[T, 2]`, the mean distance of a task's own samples times the common variance of then, and their deviation over
    that mean (1 and 0 for a list); `limits` `[T]`, multiples of the mean beyond which a sample is not of the task (-1:
    never); `scatter` `[p, p]` and `count` `[]`, sums about the tasks' means.
    """

    centres: Tensor
    owners: Tensor
    spreads: Tensor
    limits: Tensor
    scatter: Tensor
    count: Tensor
    draw: Tensor
    whiten: Tensor

    def __init__(self, scope: RoutingContext, width: int, number: int, device: torch.device) -> None:
        super().__init__()
        size, self.scope = min(SIZE, 2 * width), scope
        draw = torch.randn(2 * width, size, generator=torch.Generator().manual_seed(number)) / (2 * width) ** 0.5
        tasks = (torch.zeros(0, size), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0))
        sums = (torch.zeros(size, size), torch.zeros(()))
        for name, value in (*zip(KNOWN, (*tasks, *sums)), ("draw", draw), ("whiten", torch.eye(size))):
            self.register_buffer(name, value.to(device))
        self.rows: list[Tensor] = []
        self.batches = 0  # of the pass in which rows were collected, if a single call stands for all of them
        self.alike = (-1, 0.0)  # the task that most samples of the one finished last are as near to, and their share
        self.found: Tensor | None = None
        self.chosen: Tensor | None = None

    @property
    def known(self) -> dict[str, Tensor]:
        """All that a file must hold."""
        return {name: getattr(self, name) for name in KNOWN}

    @known.setter
    def known(self, known: dict[str, Tensor]) -> None:
        for name, value in known.items():
            setattr(self, name, value)
        self.rows, self.batches = [], 0
        self._refresh()

    def _refresh(self) -> None:
        """Set `whiten` `[p, p]`, `W W^T` being the inverse covariance, drawn towards a sphere where samples are few."""
        scatter, count = self.scatter.double(), float(self.count)
        size = len(scatter)
        if not count or not float(scatter.trace()):
            return
        share, covariance = size / (count + size), scatter / count
        sphere = torch.eye(size, dtype=scatter.dtype, device=scatter.device) * (covariance.trace() / size)
        inverse = torch.linalg.inv((1 - share) * covariance + share * sphere)
        self.whiten = torch.linalg.cholesky((inverse + inverse.mT) / 2).to(self.whiten)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the model to a device, but stay in float32: sums overflow in half precision."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call]

    def see(self, x: Tensor) -> None:
        """Note the features `[n, p]` of the samples `x` `[n, ..., d]`."""
        tokens = tokens_of(x.detach()).to(self.draw.dtype)
        with torch.autocast(x.device.type, enabled=False):
            self.found = torch.cat([tokens.mean(dim=1), tokens[:, 0]], dim=1) @ self.draw

    def distances(self, features: Tensor) -> Tensor:
        """Return the mean squared distance `[n, T]` of `features` `[n, p]` from every task's nearest centre, in the
        covariance.
        """
        origin = self.centres.mean(dim=0)
        with torch.autocast(features.device.type, enabled=False):
            here, there = ((rows - origin) @ self.whiten for rows in (features, self.centres))
            each = torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist").square() / len(origin)
        tasks = each.new_full((len(each), int(self.owners.max()) + 1), float("inf"))
        return tasks.scatter_reduce(1, self.owners.expand(len(each), -1), each, "amin")

    @property
    def scales(self) -> Tensor:
        """Mean distance `[T]` of each task's own samples; it falls as the common variance grows. 1 for lists."""
        mean, deviation = self.spreads.unbind(dim=1)
        return torch.where(deviation > 0, mean / self._variance, torch.ones_like(mean))

    @property
    def _variance(self) -> Tensor:
        variance = self.scatter.trace() / self.count
        return torch.where(variance > 0, variance, torch.ones_like(variance))

    def choose(self, features: Tensor) -> Tensor:
        """Return the number of the likeliest task of `features` `[n, p]`, -1 beyond its limit: `[n]`, int64.

        The nearest list, unless the centre of the likeliest Gaussian is nearer.
        """
        if not len(self.centres):
            return torch.full((len(features),), -1, device=features.device)
        scales, lists = self.scales, self.spreads[:, 1] == 0
        distances = self.distances(features).masked_fill(self.limits < 0, float("inf"))
        multiples = distances / scales
        likeliest = (multiples + scales.log()).masked_fill(lists, float("inf")).argmin(dim=1)
        nearest = distances.masked_fill(~lists, float("inf")).min(dim=1)
        chosen = torch.where(
            nearest.values <= distances.gather(1, likeliest[:, None])[:, 0], nearest.indices, likeliest
        )
        return torch.where(multiples.gather(1, chosen[:, None])[:, 0] <= self.limits[chosen], chosen, -1)

    def collect(self) -> Tensor:
        """Return and forget the features `[n, p]` that were collected, with a warning without those not finite.

        Samples of a single call stand for those of every batch of a `forward` that gives some once a pass (prompts).
        """
        rows = self.rows * self.batches if len(self.rows) == 1 and self.batches else self.rows
        self.rows, self.batches = [], 0
        found = torch.cat(rows) if rows else self.draw.new_zeros(0, self.draw.shape[1])
        finite = torch.isfinite(found).all(dim=1)
        if not bool(finite.all()):
            text = f"{int((~finite).sum())} of {len(found)} samples are not finite and tell nothing about their task"
            warnings.warn(text, NullSpaceWarning, stacklevel=2)
        return found[finite]

    def finish(self, features: Tensor) -> None:
        """Add the task with these `features` `[n, p]`; one that never reached the tower is not found again."""
        rows = features.double()
        count, centre = len(rows), rows.sum(dim=0) / max(1, len(rows))
        scatter = rows.mT @ rows - count * centre.outer(centre)
        self.scatter, self.count = self.scatter + scatter.to(self.scatter), self.count + count
        self._refresh()
        listed: Tensor = torch.unique(features, dim=0)  # type: ignore[no-untyped-call]
        lists = 0 < len(listed) <= count // 2
        centres = listed if lists else centre[None]
        self.centres = torch.cat([self.centres, centres.to(self.centres)])
        self.owners = torch.cat([self.owners, self.owners.new_full((len(centres),), len(self.limits))])
        own = self.distances(features)[:, -1]
        found = torch.stack([own.mean(), own.std(correction=0)]) if count else own.new_zeros(2)
        mean, deviation = (count * found + PRIOR * own.new_tensor([1.0, DEVIATION])) / (count + PRIOR)
        spread = mean.new_tensor([1.0, 0.0]) if lists else torch.stack([mean * self._variance, deviation / mean])
        limit = 1 + ALONE * spread[1] if count else -torch.ones_like(mean)
        self.spreads, self.limits = torch.cat([self.spreads, spread[None]]), torch.cat([self.limits, limit[None]])
        if count and len(self.limits) > 1:
            scores = self.distances(features) / self.scales + self.scales.log()
            shares = (scores[:, :-1] < scores[:, -1:] + CLOSE).to(scores).mean(dim=0)
            self.alike = (int(shares.argmax()), float(shares.max()))

    def calibrate(self, features: Tensor) -> None:
        """Set the limits of all tasks so that `QUANTILE` of the `features` `[n, p]` of a pool lie within each.

        The limit of a Gaussian stays at or above the mean distance of its own samples.
        """
        if len(features) and len(self.centres):
            least = torch.quantile(self.distances(features) / self.scales, QUANTILE, dim=0)
            limits = least.clamp((self.spreads[:, 1] > 0).to(least), 1 + FARTHEST * self.spreads[:, 1])
            self.limits = torch.where(self.limits < 0, self.limits, limits)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the tower: let the backbone look at the samples, and route them for their tasks."""
        scope = self.scope
        if scope.looking is not None or not (scope.collecting or scope.routing is Routing.NEAREST):
            return
        held = [key for key in CACHES if kwargs.get(key) is not None]
        if held:
            raise OptionError(
                f"task(None) runs the model twice, which would fill {held[0]}= twice: name the task, opt.task(name), "
                "or generate with use_cache=False"
            )
        self._look(module, args, kwargs)
        found, self.found = self.found, None
        if found is None:
            return
        if scope.collecting:
            self.rows.append(found)
        else:
            self.chosen = scope.of_samples = self.choose(found)
            scope.routing = Routing.SAMPLES

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the tower without experts, on copies and in evaluation mode: no trace stays but `found`."""
        scope, training = self.scope, [one for one in module.modules() if one.training]
        routing, scope.routing, scope.looking = scope.routing, Routing.BACKBONE, self
        try:
            for one in training:
                one.training = False
            with torch.no_grad():
                args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
                module.forward(*args, **kwargs)
        finally:
            scope.routing, scope.looking = routing, None
            for one in training:
                one.training = True

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the tower: what follows chooses anew."""
        if self.chosen is not None and self.scope.of_samples is self.chosen:
            self.scope.routing, self.scope.of_samples = Routing.NEAREST, None
        self.chosen = None


def tower_of(name: str, model: nn.Module) -> str:
    """Return the name of the tower of the layer `name`: the first chain of blocks on its path, or the whole model.

    A `ModuleList` is never called, so the module that holds it stands for it.
    """
    parts = name.split(".")
    depth = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    while depth and isinstance(model.get_submodule(".".join(parts[:depth])), (nn.ModuleList, nn.ModuleDict)):
        depth -= 1
    return ".".join(parts[:depth])
