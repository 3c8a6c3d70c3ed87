"""Forward scaling of TRGP (Lin et al. 2022) and CODE-CL (Apolinario et al. 2025): a task re-weights old directions.

A related old task's directions `S` `[g, d, k]` are frozen in the weight `W` `[g, m, d]`; the new task may still
combine them anew, by `W + W S (Q - I) S^T` in its own forward pass, with a learnt `Q` `[g, k, k]`. That needs the
task's name at evaluation, and `k^2` parameters a task, weight and related task. Other tasks run `W` alone, so nothing
is forgotten by it.

The gradient reaches `Q`, and `W` as if it were unscaled (`W S` counts as constant): what the published codes add to the
gradient of `W` lies in the span of `S`, which a hard projection removes again (a conceptor leaves the share `1 - c`).

`W S` alone takes `m d k` products. An `nn.Linear` that meets few rows `x` gives the same output with fewer: its own
product with `W` and one with the scaled rows `x S (Q - I)^T S^T` beside it (`Beside`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..capture.declare import capturing, stand_in
from ..covariance.second_moment import SecondMoment
from ..errors import OptionError
from ..model.names import named_parameters
from ..optimizer.optimizer import NullSpaceOptimizer
from ..policies.code_cl import CODECL
from ..subspace.basis import Basis, Subspace
from ..subspace.conceptors import odds_of
from ..subspace.layout import Layout
from ..subspace.linalg import eigh

Directions = Mapping[str, Mapping[str, Tensor]]


class Scaled(nn.Module):
    """The parametrization of one weight: directions and mixing matrices by task, and the task in force.

    While `plain` is true the weight is read as it is: its module scales its rows instead, by `beside`.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.task: str | None = None
        self.plain = False
        self.beside: Beside | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight of the task in force."""
        pairs = list(self.pairs(self.task))
        if not pairs or self.plain:
            return weight
        return stand_in(weight, lambda: self._scaled(weight, pairs))

    def _scaled(self, weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        matrix = self.layout.to_matrix(weight)
        fixed = matrix.detach()
        for span, mix in pairs:
            eye = torch.eye(mix.shape[-1], dtype=mix.dtype, device=mix.device)
            matrix = matrix + ((fixed @ span.to(fixed.dtype)) @ (mix - eye).to(fixed.dtype)) @ span.mT.to(fixed.dtype)
        return self.layout.from_matrix(matrix, weight.shape)

    def add(self, task: str, span: Tensor, mix: nn.Parameter) -> None:
        """Add directions `S` `[g, d, k]` and their mixing `Q` `[g, k, k]` for one task."""
        number = len(list(self.pairs(task)))
        self.register_buffer(f"span_{_key(task)}_{number}", span)
        self.register_parameter(f"mix_{_key(task)}_{number}", mix)

    def pairs(self, task: str | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `S` and `Q` of one task."""
        number = 0
        while task is not None and hasattr(self, f"span_{_key(task)}_{number}"):
            yield getattr(self, f"span_{_key(task)}_{number}"), getattr(self, f"mix_{_key(task)}_{number}")
            number += 1

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Add parameters for every task of a checkpoint."""
        for key, value in state.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name.startswith(("span_", "mix_")) and not hasattr(self, name):
                if name.startswith("span_"):
                    self.register_buffer(name, torch.empty_like(value))
                else:
                    self.register_parameter(name, nn.Parameter(torch.empty_like(value), requires_grad=False))
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]


class Beside:
    """Scales the rows of an `nn.Linear` in place of its weight `[m, d]` where that takes fewer products.

    Captures, and code that reads the weight itself, go on meeting the scaled weight.

    Two hooks around the module's forward: the first has it read the plain weight, the second adds to its output.
    """

    def __init__(self, module: nn.Linear, scaled: Scaled) -> None:
        """Attach to `module`; `remove` gives it back."""
        self.module, self.scaled = module, scaled
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, prepend=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take both hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs = list(self.scaled.pairs(self.scaled.task))
        read = capturing() or getattr(parametrize, "_cache_enabled", False)  # others are to meet the scaled weight
        self.scaled.plain = bool(pairs and inputs) and not read and self._cheaper(inputs[0], pairs)

    def _cheaper(self, rows: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> bool:
        """Compare the products of both ways, forward; backward passes have about twice as many in both."""
        m, d = self.module.out_features, self.module.in_features
        widths = [mix.shape[-1] for _, mix in pairs]
        weight = sum(2 * m * d * k + m * k * k for k in widths)
        beside = m * d + sum(2 * d * k + k * k for k in widths)
        return rows.numel() // d * beside < weight

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None) -> Tensor | None:
        if not self.scaled.plain:
            return None
        try:
            return None if output is None else output + self._added(inputs[0])
        finally:
            self.scaled.plain = False

    def _added(self, rows: Tensor) -> Tensor:
        """Return `x S (Q - I)^T S^T W^T`, summed over pairs, with `W` constant."""
        changed = torch.zeros_like(rows)
        for span, mix in self.scaled.pairs(self.scaled.task):
            s, q = span[0].to(rows.dtype), mix[0]
            eye = torch.eye(len(q), dtype=q.dtype, device=q.device)
            changed = changed + (rows @ s @ (q - eye).mT.to(rows.dtype)) @ s.mT
        return functional.linear(changed, self.module.weight.detach())


class ForwardScaling:
    """The scalings of all weights of one model, one set of mixing matrices a task.

    >>> opt = NullSpaceOptimizer(base, model, policy=TRGP(), project="update")   # doctest: +SKIP
    >>> scaling = ForwardScaling(opt)                                            # doctest: +SKIP
    >>> loss.backward()                                          # the first mini-batch of the new task
    >>> new = scaling.begin("task 3", trust_regions(opt))                        # doctest: +SKIP
    >>> opt.add_param_group({"params": new, "weight_decay": 0.0})                # doctest: +SKIP
    >>> ...                                                                      # train, consolidate
    >>> with scaling.task("task 1"): accuracy = evaluate(model)                  # doctest: +SKIP

    To go on from a checkpoint, give its weights to a new one before the model loads them:

    >>> opt.load_state_dict(checkpoint["optimizer"])                             # doctest: +SKIP
    >>> scaling = ForwardScaling(opt, saved=checkpoint["model"])                 # doctest: +SKIP
    >>> model.load_state_dict(checkpoint["model"])                               # doctest: +SKIP
    """

    def __init__(self, optimizer: NullSpaceOptimizer, saved: Iterable[str] | None = None) -> None:
        """Attach to every protected matrix of the model; `detach` gives plain weights back.

        With `saved`, the keys of a model's `state_dict`, attach to the weights that are parametrized there instead:
        matrices that were protected later, such as new heads, are not among them.

        Raises:
            OptionError: `saved` has parametrized weights, and the optimizer protects nothing: its state is not loaded.
        """
        self.model, self._optimizer = optimizer.model, optimizer
        self._scaled: dict[str, Scaled] = {}
        protected = [name for name, basis in optimizer.bases.items() if "right" in basis.subspaces]
        names = protected if saved is None else list(_parametrized(saved))
        if names and not optimizer.bases:
            raise OptionError(
                f"saved: '{names[0]}' is scaled there, but the optimizer protects nothing yet; load its state first "
                "(load_state_dict or load): the bases say how a weight is read as a matrix"
            )
        self._attach(names)

    def begin(
        self, task: str, directions: Directions, start: Callable[[Tensor], object] | None = None
    ) -> list[nn.Parameter]:
        """Put `task` in force with `directions`, by weight and origin, and return its mixing matrices to train.

        Mixing starts as the identity (TRGP), or as `start` fills it in place. Those of other tasks no longer train.

        Raises:
            OptionError: the task has begun before, or a weight is unknown.
        """
        if any(True for scaled in self._scaled.values() for _ in scaled.pairs(task)):
            raise OptionError(f"begin('{task}'): this task has its scaling already; give the new one another name")
        parameters = named_parameters(self.model)
        self._attach(name for name in directions if name not in self._scaled)
        for scaled in self._scaled.values():
            scaled.requires_grad_(False)
        mixing = []
        for name, origins in directions.items():
            for span in origins.values():
                mix = torch.eye(span.shape[-1], dtype=torch.float32, device=span.device).repeat(len(span), 1, 1)
                if start is not None:
                    start(mix)
                mixing.append(nn.Parameter(mix))
                self._scaled[name].add(task, span.detach().clone().to(parameters[name].device), mixing[-1])
        self.use(task)
        return mixing

    def use(self, task: str | None) -> None:
        """Put `task` in force; `None`, or a task without scaling, is the plain weight."""
        for scaled in self._scaled.values():
            scaled.task = task

    @contextmanager
    def task(self, name: str | None) -> Iterator[None]:
        """Put a task in force for the body of a `with` statement."""
        before = {key: scaled.task for key, scaled in self._scaled.items()}
        self.use(name)
        try:
            yield
        finally:
            for key, scaled in self._scaled.items():
                scaled.task = before.get(key)

    def detach(self) -> None:
        """Remove every parametrization; the weights stay as they are without scaling."""
        self.use(None)
        for name, scaled in self._scaled.items():
            if scaled.beside is not None:
                scaled.beside.remove()
            module, leaf = self._owner(name)
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
        self._scaled.clear()

    def _attach(self, names: Iterable[str]) -> None:
        for name in names:
            module, leaf = self._owner(name)
            layout = self._optimizer.bases[name].layout if name in self._optimizer.bases else Layout()
            present = parametrize.is_parametrized(module, leaf)
            found = [p for p in module.parametrizations[leaf] if isinstance(p, Scaled)] if present else []  # type: ignore
            self._scaled[name] = found[0] if found else Scaled(layout)
            if not found:
                parametrize.register_parametrization(module, leaf, self._scaled[name], unsafe=True)
                if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                    self._scaled[name].beside = Beside(module, self._scaled[name])

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that holds the parameter `name`, and its name there."""
        path, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(path)
            getattr(module, leaf)
        except AttributeError:
            known = ", ".join(list(named_parameters(self.model))[:5])
            raise OptionError(f"no parameter '{name}' in {type(self.model).__name__}; it has {known}, ...") from None
        return module, leaf


def trust_regions(optimizer: NullSpaceOptimizer, threshold: float = 0.5, most: int = 2) -> dict[str, dict[str, Tensor]]:
    """Return the subspaces `S` `[g, d, k]` of related old tasks, by weight and task (TRGP, eq. 5).

    Reads the gradients `G` of the new task's first mini-batch: an old task is related where `||G S||_F / ||G||_F` is
    above `threshold`; at most `most` of them are taken, the most related first. Paper: 0.5 (0.2 on permuted MNIST), 2.
    Weights whose policy keeps no `members` (any but `TRGP`) have none.

    Raises:
        OptionError: the optimizer has ``project="both"``, which takes stored subspaces out of the gradient.
    """
    if optimizer._core.options.project == "both":
        raise OptionError(
            'trust_regions(): project="both" has taken the stored subspaces out of the gradients already; make the '
            'optimizer with project="update"'
        )
    parameters, found = named_parameters(optimizer.model), {}
    for name, basis in optimizer.bases.items():
        gradient, subspace = parameters[name].grad if name in parameters else None, basis.subspaces.get("right")
        if gradient is None or subspace is None or subspace.members is None or basis.bias is not None:
            continue
        regions = _regions(basis, subspace, gradient.detach().float(), threshold)
        if regions:
            found[name] = {task: span for _, task, span in sorted(regions, key=lambda item: -item[0])[:most]}
    return found


def _regions(basis: Basis, subspace: Subspace, gradient: Tensor, threshold: float) -> list[tuple[float, str, Tensor]]:
    """Return score, task and subspace of every old task that is related."""
    matrix, found = basis.layout.to_matrix(gradient), []
    norm = float(matrix.norm())
    for task, mask in zip(basis.tasks, subspace.members if subspace.members is not None else []):
        span = (subspace.basis * mask[:, None, :])[:, :, mask.any(0)]
        score = float((matrix @ span.to(matrix.dtype)).norm()) / norm if norm else 0.0
        if span.shape[2] and score > threshold:
            found.append((score, task, span))
    return found


@torch.no_grad()
def shared_directions(
    optimizer: NullSpaceOptimizer, moments: Mapping[str, SecondMoment], threshold: float = 0.5, most: int = 80
) -> dict[str, dict[str, Tensor]]:
    """Return the leading directions of `C and C_new` `[g, d, k]` of weights where the new task is related (CODE-CL).

    `moments` are `optimizer.measure(loader)` of the new task before it is trained. A weight is related where
    `tr(C and C_new) / tr C > threshold`. In odds `a`, `b` of two conceptors, those of their AND are the parallel sum
    `a (a + b)^+ b`. Paper: 0.5, `most` 80.

    Raises:
        OptionError: the optimizer's policy is not `CODECL`.
    """
    policy, found = optimizer.policy, {}
    if not isinstance(policy, CODECL):
        raise OptionError(f"shared_directions needs conceptors: policy=CODECL(...), not {policy!r}")
    for name, moment in moments.items():
        subspace = optimizer.bases[name].subspaces.get("right") if name in optimizer.bases else None
        if subspace is None or subspace.scale is None or subspace.basis.shape[:2] != moment.matrix.shape[:2]:
            continue
        old, new = odds_of(subspace.basis, subspace.scale), policy.odds(moment.matrix, moment.rows)
        new = _floored(new, policy.floor)
        both = old @ torch.linalg.pinv(old + new, rtol=1e-10, hermitian=True) @ new
        values, vectors = eigh((both + both.mT) / 2, name=name, scale=float(old.abs().max()))
        shares = values / (1 + values)
        if float(shares.sum()) > threshold * float(subspace.scale.sum()):
            found[name] = {"shared": vectors[:, :, :most].float()}
    return found


def _floored(odds: Tensor, floor: float) -> Tensor:
    """Return the odds of a conceptor whose singular values below `floor` are zero."""
    values, vectors = eigh(odds)
    values = torch.where(values / (1 + values) < floor, 0.0, values)
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


def _parametrized(keys: Iterable[str]) -> Iterator[str]:
    """Yield the names of the parametrized parameters among the keys of a `state_dict`."""
    for key in keys:
        path, found, rest = key.rpartition("parametrizations.")
        if found and rest.endswith(".original"):
            yield path + rest.removesuffix(".original")


def _key(task: str) -> str:
    """Return a task's name as an attribute name (hexadecimal, so that any text will do)."""
    return task.encode().hex()
