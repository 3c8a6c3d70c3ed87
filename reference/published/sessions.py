"""Parts of a method around a task besides training: forward scaling (TRGP, CODE-CL), a penalty (Adam-NSCL).

A session is begun before each task, ended after its training, told when the task is protected and asked for the
context in which a task is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from nullspace_optim import Basis, NullSpaceOptimizer
from nullspace_optim.methods import ForwardScaling, shared_directions, trust_regions
from reference.published.data import Labelled


class Session:
    """Nothing besides training; `saved` names attributes of tensors that a stopped run needs to go on."""

    saved: ClassVar[tuple[str, ...]] = ()

    def begin(self, task: int, first: Labelled, samples: Labelled) -> None:
        """Prepare for `task`; `first` is its first batch, `samples` the draw whose inputs will be protected."""

    def end(self) -> None:
        """Stop what trains for this task alone."""

    def protected(self) -> None:
        """Take note that the bases hold the task's directions now."""

    def scoring(self, task: int) -> AbstractContextManager[Any]:
        """The context in which `task` is scored."""
        return nullcontext()

    def penalty(self) -> Tensor | float:
        """Term that is added to the loss of a batch."""
        return 0.0

    def state(self) -> dict[str, Any]:
        """The attributes `saved`."""
        return {name: getattr(self, name) for name in self.saved}

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take up `state` and prepare the model to load `weights`; the optimizer's bases are loaded already."""
        for name in self.saved:
            setattr(self, name, state[name])


class KeptNorms(Session):
    """Adam-NSCL: scales and shifts of normalisation layers are held by EWC's penalty instead of a projection.

    `weight * sum_t F_t (p - p_t)^2`; `F_t` is the mean over batches of 32 of the task's images of 32 times the squared
    gradient of the mean loss against the predicted classes, in evaluation mode, as in the released code.
    """

    weight, batch = 100.0, 32
    saved = ("terms",)

    def __init__(self, optimizer: NullSpaceOptimizer, model: nn.Module) -> None:
        self.model = model
        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        self.norms = {f"{name}.{kind}": p for name, norm in norms.items() for kind, p in norm.named_parameters()}
        self.terms: list[dict[str, tuple[Tensor, Tensor]]] = []

    def begin(self, task: int, first: Labelled, samples: Labelled) -> None:
        """Remember the images whose importance is taken after training."""
        self.task, self.samples = task, samples[0]

    def penalty(self) -> Tensor | float:
        """The penalty of all finished tasks."""
        return sum(
            (self.weight * (importance * (self.norms[name] - centre).square()).sum())
            for term in self.terms
            for name, (importance, centre) in term.items()
        )

    def end(self) -> None:
        """Add the term of the finished task."""
        self.model.eval()
        importance = {name: torch.zeros_like(parameter) for name, parameter in self.norms.items()}
        batches = self.samples.split(self.batch)
        for images in batches:
            logits = self.model(images, self.task)
            loss = functional.cross_entropy(logits, logits.argmax(1))
            for share, gradient in zip(importance.values(), torch.autograd.grad(loss, list(self.norms.values()))):
                share += gradient.square() * len(images) / len(batches)
        self.terms.append({name: (share, self.norms[name].detach().clone()) for name, share in importance.items()})


class Scaling(Session):
    """A task may re-weight directions of related earlier tasks; the mixing matrices are its own and stay."""

    def __init__(self, optimizer: NullSpaceOptimizer, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model
        self.scaling: ForwardScaling | None = None
        self.start: Callable[[Tensor], object] | None = None

    def directions(self, task: int, first: Labelled, samples: Labelled) -> Mapping[str, Mapping[str, Tensor]]:
        """Directions that `task` may re-weight, by weight and origin."""
        raise NotImplementedError

    def begin(self, task: int, first: Labelled, samples: Labelled) -> None:
        """Find related tasks and give the mixing matrices to the optimizer, at the rate of the weights."""
        if task == 0:
            return
        self.scaling = self.scaling or ForwardScaling(self.optimizer)
        self.scaling.use(None)
        mixing = self.scaling.begin(_name(task), self.directions(task, first, samples), self.start)
        if mixing:
            self.optimizer.add_param_group({"params": mixing})

    def end(self) -> None:
        """Take the mixing matrices out of the optimizer."""
        self.optimizer.param_groups = self.optimizer.param_groups[:1]

    def scoring(self, task: int) -> AbstractContextManager[Any]:
        """The weights as `task` mixes them."""
        return nullcontext() if self.scaling is None else self.scaling.task(_name(task))

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Make room for the mixing matrices of a saved model that has them."""
        super().restore(weights, state)
        if any(".parametrizations." in name for name in weights):
            self.scaling = ForwardScaling(self.optimizer, saved=weights)


class TrustRegions(Scaling):
    """TRGP: subspaces of at most two earlier tasks that hold much of the gradient of the first batch."""

    def __init__(self, optimizer: NullSpaceOptimizer, model: nn.Module, threshold: float) -> None:
        super().__init__(optimizer, model)
        self.threshold = threshold

    def directions(self, task: int, first: Labelled, samples: Labelled) -> Mapping[str, Mapping[str, Tensor]]:
        """Related tasks by the gradient of the first batch."""
        self.model.train()
        self.gradients(task, first)
        found = trust_regions(self.optimizer, self.threshold)
        self.optimizer.zero_grad()
        return found

    def gradients(self, task: int, data: Labelled) -> None:
        """Leave the gradients of the mean loss on `data` in the model, in the mode that it is in."""
        images, labels = data
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(images, task), labels).backward()


class ReleasedTrustRegions(TrustRegions):
    """TRGP as its code runs it.

    The memory misses what an index `> r` of those after the `r` stored ones leaves out: the strongest new direction of
    each weight, which belongs to the task's subspace all the same. Of the first task it misses the weakest, as GPM's.
    Inputs are captured without the task's scaling, although the task is scored with it. The gradient of a weight passes
    through its scaling. Related tasks are found by the gradient of as many images as are protected, without dropout;
    with `third_alone`, as on permuted MNIST, the third task has the second alone.
    """

    saved = ("spans",)

    def __init__(self, optimizer: NullSpaceOptimizer, model: nn.Module, threshold: float, *, third_alone: bool) -> None:
        super().__init__(optimizer, model, threshold)
        self.third_alone = third_alone
        self.spans: dict[str, dict[str, Tensor]] = {}
        self.related: dict[str, dict[str, Tensor]] = {}
        self.hooks: list[RemovableHandle] = []

    def begin(self, task: int, first: Labelled, samples: Labelled) -> None:
        """Let the gradient of each scaled weight pass through its scaling as well."""
        self.name = _name(task)
        super().begin(task, first, samples)
        mixing = iter(self.optimizer.param_groups[-1]["params"])
        weights = named_weights(self.model)
        for name, spans in self.related.items():
            pairs = [(span, next(mixing)) for span in spans.values()]
            hook = partial(through_scaling, basis=self.optimizer.bases[name], pairs=pairs)
            self.hooks.append(weights[name].register_hook(hook))

    def directions(self, task: int, first: Labelled, samples: Labelled) -> Mapping[str, Mapping[str, Tensor]]:
        """Related tasks by the gradient of `samples`, along whole subspaces, of the memory or not."""
        self.model.eval()
        self.gradients(task, samples)
        self.related = {}
        for name, weight in named_weights(self.model).items():
            if name not in self.spans or weight.grad is None:
                continue
            gradient = self.optimizer.bases[name].layout.to_matrix(weight.grad)
            alone = self.third_alone and task == 2
            spans = {old: span for old, span in self.spans[name].items() if not alone or old == _name(1)}
            share = {old: float((gradient @ span).norm() / gradient.norm()) for old, span in spans.items()}
            related = sorted((old for old in spans if share[old] > self.threshold), key=lambda old: -share[old])
            if related:
                self.related[name] = {old: spans[old] for old in related[:2]}
        self.optimizer.zero_grad()
        return self.related

    def end(self) -> None:
        """Count the stored directions as well, and take the scaling off before inputs are captured."""
        super().end()
        self.stored = {name: basis.rank for name, basis in self.optimizer.bases.items()}
        if self.scaling is not None:
            self.scaling.use(None)
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def protected(self) -> None:
        """Note the task's subspaces; take one direction of each weight out of the memory."""
        for name, basis in self.optimizer.bases.items():
            space, first = basis.subspaces.get("right"), self.stored.get(name, 0)
            if space is None or space.members is None or basis.tasks[-1] != self.name:
                continue
            missing = first or space.rank - 1  # none where the task has no new direction
            kept = [column for column in range(space.rank) if column != missing]
            own = space.members[-1].any(0).tolist()
            taken = [column for column in range(space.rank) if own[column] and (first or column != missing)]
            self.spans.setdefault(name, {})[self.name] = space.basis[:, :, taken]
            parts = {part: getattr(space, part)[:, :, kept] for part in ("basis", "anchor", "members")}
            basis.subspaces["right"] = replace(space, **parts, ranks=(len(kept),))
        self.optimizer.load_state_dict(self.optimizer.state_dict())


class SharedConceptors(Scaling):
    """CODE-CL: the leading 80 directions of what the conceptors of old and new tasks have in common."""

    def directions(self, task: int, first: Labelled, samples: Labelled) -> Mapping[str, Mapping[str, Tensor]]:
        """Shared directions by the inputs of the new task, before it is trained."""
        self.model.eval()
        moments = self.optimizer.measure([samples[0]], forward=lambda x: self.model(x, task), progress=False)
        with torch.no_grad():
            return shared_directions(self.optimizer, moments)


class ReleasedConceptors(SharedConceptors):
    """CODE-CL as its code runs it: mixing begins at random, as a linear layer's weight, and small layers have none.

    Small: linear layers of at most 50 inputs, convolutions whose patches have at most 80 values.
    """

    def begin(self, task: int, first: Labelled, samples: Labelled) -> None:
        """Mix at random at first."""
        draw = torch.Generator().manual_seed(task)
        self.start = lambda mix: mix.uniform_(-(mix.shape[-1] ** -0.5), mix.shape[-1] ** -0.5, generator=draw)
        super().begin(task, first, samples)

    def directions(self, task: int, first: Labelled, samples: Labelled) -> Mapping[str, Mapping[str, Tensor]]:
        """Shared directions of the larger layers."""
        found, weights = super().directions(task, first, samples), named_weights(self.model)
        sizes = {name: next(iter(spans.values())).shape[1] for name, spans in found.items()}
        return {name: found[name] for name, size in sizes.items() if size > (80 if weights[name].ndim == 4 else 50)}


def through_scaling(gradient: Tensor, basis: Basis, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of `W`, given that of `W + sum W S (Q - I) S^T`, for the pairs `S`, `Q` of a task."""
    matrix = basis.layout.to_matrix(gradient)
    added = torch.zeros_like(matrix)
    for span, mix in pairs:
        along = matrix @ span
        added += (along @ mix.detach().mT - along) @ span.mT
    return gradient + basis.layout.from_matrix(added, gradient.shape)


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by the names they have without scaling."""
    named = model.named_parameters()
    return {name.replace("parametrizations.", "").removesuffix(".original"): weight for name, weight in named}


def _name(task: int) -> str:
    return f"task {task + 1}"
