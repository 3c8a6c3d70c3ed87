"""`NullSpaceOptimizer`: wrap any optimizer, consolidate after each task, verify, save.

Step hooks on the base protect, so `opt.step()`, `base.step()` and `scaler.step(base)` are alike. Sources: GNSP (arXiv
2507.19839), GPM, Adam-NSCL; the anchor correction `W <- W - (W U - A) U^H` after the step is this library's own.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..consolidation.consolidate import consolidate, measure
from ..consolidation.preview import THRESHOLDS, Preview, preview
from ..consolidation.prune import PruneReport, check_loaders, prune_store
from ..covariance.second_moment import SecondMoment
from ..covariance.sketch import SketchedCovariance
from ..distributed.collectives import check_equal_on_all_ranks
from ..distributed.communicator import communicator
from ..distributed.failures import raise_on_all_ranks
from ..distributed.fsdp import reshard
from ..errors import NullSpaceWarning, OptionError
from ..model.batches import Forward
from ..model.find import unwrap
from ..model.loader import LoaderPass
from ..model.names import named_parameters
from ..options import check_number
from ..policies.base import Policy
from ..policies.energy import Energy
from ..protection.sharded import drifts
from ..report import ConsolidationReport, VerifyReport
from ..settings import Bias, NormStats, OnFull, Precision, Project, Rows, Settings, Uncovered
from ..subspace.basis import Basis, Capacity
from ..verification.verify import rounding_limits, verify
from .anchors import accept_anchors, blend_weights, restore_anchors
from .bases import check_bases, forget_curvature, warn_adaptive_rate
from .checks import facts_of
from .engine import Engine
from .mode import Mode, build_mode
from .ownership import check_ownership, refuse_protected, refuse_without_experts, take_over
from .torch_optimizer import WrappedOptimizer


class NullSpaceOptimizer(WrappedOptimizer):
    """Wrap `base` so that directions which consolidated tasks used keep their values exactly.

    Args:
        base: any torch optimizer, or a list of them (one store, one consolidation).
        model: the module that owns the parameters; found among live modules when needed if not given (a mode needs
            it at once).
        mode: ``"null-space"``; ``"igsp"`` or `IGSP(...)` for experts beside a frozen backbone.
        policy: which directions to protect; `Energy(0.99)` by default.
        project: ``"both"``: the gradient as it accumulates, so that adaptive steps fit the free directions, and the
            anchor correction after the step, which is exact; ``"update"``: the correction alone, learns more slowly;
            ``"gradient"``: as published methods do, leaks.
        precision: ``"exact"``, or ``"fast"`` (low-precision products, exact every 16th step and before evaluation).
        uncovered: what happens to parameters that were used but cannot be protected: ``"freeze"`` or ``"train"``.
        bias: ``"freeze"``, or ``"joint"`` to protect `[W b]` on `[x; 1]`.
        norm_stats: ``"frozen"`` keeps running statistics that a past task used, ``"train"`` lets them move.
        rows: ``"relevant"`` protects only rows that can reach the model's output, ``"all"`` every row.
        on_full: ``"warn"`` or ``"raise"`` when a parameter has no free direction left.
        covariance: ``"exact"``, or `SketchedCovariance(size, above)` for weights so wide that `[d, d]` does not fit.

    Raises:
        OptionError: `base` is not an optimizer, is wrapped already, is differentiable, or an option is unknown.

    Example:
        >>> opt = NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-5))   # doctest: +SKIP
        >>> report = opt.consolidate(task_loader)                                      # doctest: +SKIP
    """

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        model: nn.Module | None = None,
        *,
        mode: object = "null-space",
        policy: Policy | None = None,
        project: Project = "both",
        precision: Precision = "exact",
        uncovered: Uncovered = "freeze",
        bias: Bias = "freeze",
        norm_stats: NormStats = "frozen",
        rows: Rows = "relevant",
        on_full: OnFull = "warn",
        covariance: Literal["exact"] | SketchedCovariance = "exact",
    ) -> None:
        bases: list[Any] = list(base) if isinstance(base, (list, tuple)) else [base]
        check_bases(bases)
        chosen = build_mode(mode, model)
        options = Settings(
            policy=Energy() if policy is None else policy,
            project=project,
            precision=precision,
            uncovered=uncovered,
            bias=bias,
            norm_stats=norm_stats,
            rows=rows,
            on_full=on_full,
            covariance=covariance,
        )
        warn_adaptive_rate(bases, options)
        refuse_protected(bases, chosen)
        core = Engine(bases, options, chosen)
        if model is not None:
            core.model = weakref.ref(unwrap(model))
        self._attach(core)
        take_over(core)

    @property
    def bases(self) -> Mapping[str, Basis]:
        """`Basis` by parameter name: `U`, `spectrum`, `rank`, `tasks`, `fate`."""
        return self._core.store

    @property
    def policy(self) -> Policy:
        """The policy that decides what is protected."""
        return self._core.options.policy

    @property
    def model(self) -> nn.Module:
        """The module that owns the wrapped parameters.

        Raises:
            ModelNotFoundError: it was not given and cannot be found.
        """
        return self._core.owner()

    @property
    def mode(self) -> Mode:
        """The mode and its methods: `task`, `status`, `regularization`.

        Raises:
            OptionError: the optimizer has none, it protects the null space of the weights themselves.
        """
        if self._core.mode is None:
            raise OptionError("this needs a mode with experts: NullSpaceOptimizer(base, model, mode='igsp')")
        return self._core.mode

    def consolidate(
        self,
        loader: Iterable[Any],
        *,
        name: str | None = None,
        forward: Forward | None = None,
        max_batches: int | None = None,
        progress: bool = True,
    ) -> ConsolidationReport:
        """Protect what this task used: run `loader` through the model once and grow the bases.

        All or nothing: on any error model, optimizer, bases and random state are bitwise as before. Leaves no trace
        on the model. What a forward does to other objects (a memory bank in a Python list, a counter) cannot be
        undone: give a `forward` without such side effects.

        Args:
            loader: batches of the task (a tensor, tuple, list, mapping, named tuple or dataclass each).
            name: the task's name; ``"task 1"``, ``"task 2"``, ... by default.
            forward: `forward(batch)` runs the model if the default reading of a batch does not fit (`clip_forward`
                for CLIP).
            max_batches: stop after so many batches.
            progress: show a progress bar.

        Raises:
            ConsolidationError: no batches, a name used twice, no free direction left with ``on_full="raise"``.
            CaptureError: non-finite inputs of a weight; the message names the parameter and the batch.
            StaleAnchorError: a protected weight was edited outside the optimizer.

        Of several processes (DDP, FSDP2) all must call it, each with its own share of the data; loaders may differ in
        length. If one fails, all do.
        """
        core = self._core
        task = name if name is not None else f"task {len(core.store.tasks) + 1}"
        with raise_on_all_ranks():
            parameters = core.trainable()
        check_equal_on_all_ranks(facts_of(core.options, parameters, core.store, task=task), parameters)
        work = LoaderPass(
            self.model, parameters, loader, task, forward, max_batches, progress, core.outside(self.model)
        )
        if core.mode is not None:
            return self._announced(core.mode.consolidate(work))
        lasting = torch.inference_mode(False)  # bases outlive a mode
        with lasting, core.protection.exactly(), core.kept_statistics(), core.evaluated() as moment:
            grown, report = consolidate(work, core.store, core.options, core.recent, communicator())
            core.take(grown, parameters)
            core.align()
            forget_curvature(core.bases)
            moment.keep_changes = True
        core.protection.mark()
        return self._announced(report)

    def _announced(self, report: ConsolidationReport) -> ConsolidationReport:
        """Warn of what `report` warns of, and return it."""
        for text in report.warnings:
            warnings.warn(text, NullSpaceWarning, stacklevel=3)
        return report

    def task(self, name: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
        """Run the model as for the finished task `name` inside this context, in modes with routers.

        A task that has no router runs the plain backbone. A sequence names the task of each sample of a batch, as a
        classifier of your own finds it, None for the plain backbone. None alone: no task is named, every sample is
        routed by the shared router, or for the task that the frozen backbone finds for it.

        Raises:
            OptionError: the optimizer has no mode; in a forward pass: not one name a sample.
        """
        return self.mode.task(name)

    def status(self) -> Any:
        """Return the phase of the mode, the step it is at and why it changed last (prints as text).

        Raises:
            OptionError: the optimizer has no mode.
        """
        return self.mode.status()

    def regularization(self) -> Tensor:
        """Return the mode's penalty on the forward passes since the last step, a scalar to add to the loss.

        Where it is not called the step adds the gradient of the penalty itself.

        Raises:
            OptionError: the optimizer has no mode.
        """
        return self.mode.regularization()

    def measure(
        self,
        loader: Iterable[Any],
        *,
        forward: Forward | None = None,
        max_batches: int | None = None,
        progress: bool = True,
    ) -> Mapping[str, SecondMoment]:
        """Return the second moments `[g, s, s]` of the rows that met each trained weight, by parameter name.

        The pass of `consolidate`, whose arguments these are, without protection: for CODE-CL, InfLoRA and figures.
        """
        core = self._core
        work = LoaderPass(self.model, core.trainable(), loader, "measured", forward, max_batches, progress)
        return measure(work, core.options, communicator())

    def preview(
        self,
        loader: Iterable[Any],
        policies: Policy | Sequence[Policy] = THRESHOLDS,
        *,
        loss: Callable[[], Tensor] | None = None,
        forward: Forward | None = None,
        max_batches: int | None = None,
        progress: bool = True,
    ) -> Preview:
        """Return what `consolidate(loader)` would keep with each policy, and how much a new task could still learn.

        Nothing is kept. `loss()` runs the model on a batch of the new task; other arguments are as in `consolidate`.
        """
        self._refuse_mode("preview", "has experts and no policy")
        core = self._core
        work = LoaderPass(self.model, core.trainable(), loader, "preview", forward, max_batches, progress)
        with core.protection.exactly(), core.evaluated():
            return preview(work, core.store, core.options, communicator(), policies, loss)

    def prune(
        self,
        loaders: Mapping[str, Iterable[Any]],
        *,
        bound: float = 1e-3,
        forward: Forward | Mapping[str, Forward] | None = None,
        max_batches: int | None = None,
        progress: bool = True,
    ) -> PruneReport:
        """Give back protected directions that hardly any row of the consolidated tasks uses.

        All or nothing. Directions with the least energy go first, for as long as no task loses more than the share
        `bound` of its energy at any parameter; old outputs may move by what was given up.

        Args:
            loaders: the data of every consolidated task by name.
            bound: share of energy, 0..1.
            forward: as in `consolidate`, one for all tasks or one for each, like `max_batches` and `progress`.

        Raises:
            OptionError: a task is missing or unknown, `bound` is out of range, or a mode prunes its experts itself.
        """
        check_number(self, "bound", bound, 0.0, 1.0, closed="low")
        self._refuse_mode("prune", "prunes its experts itself, within its tasks")
        core, known = self._core, check_loaders(loaders, self._core.store)
        forwards = forward if isinstance(forward, Mapping) else dict.fromkeys(known, forward)
        with core.protection.exactly(), core.evaluated():
            moments = {}
            for name in known:
                feed = (forwards.get(name), max_batches, progress)
                work = LoaderPass(self.model, core.trainable(), loaders[name], name, *feed)
                moments[name] = measure(work, core.options, communicator())
            rest, report = prune_store(core.store, moments, bound)
            core.rebuild(rest)
            forget_curvature(core.bases)
        core.protection.mark()
        return report

    def verify(
        self,
        loader: Iterable[Any] | None = None,
        *,
        forward: Forward | None = None,
        max_batches: int | None = None,
        tolerance: float | None = None,
    ) -> VerifyReport:
        """Check that everything kept is still what it was.

        Without a loader: the invariant `||W U - A|| / ||A||` per parameter, every buffer that moved, and in mode "igsp"
        the backbone. With the loader of a consolidated task (any order, no augmentation; read once): also the output
        drift per layer on the samples that `consolidate` remembered, and the first layer that breaks. `tolerance`:
        1e-5, or what half precision rounds (2^-8 for bfloat16, 2^-11 for float16, times the weight's growth).
        """
        core = self._core
        refuse_without_experts(core)
        core.follow_replaced()
        core.protection.make_exact()
        core.protection.restore_across()
        reshard(self.model)  # a forward pass without a backward pass leaves parameters gathered
        data = () if loader is None else loader
        work = LoaderPass(self.model, named_parameters(self.model), data, "verified", forward, max_batches)
        with core.evaluated():
            with torch.no_grad():
                kept = drifts(core.protection.guards)
            beside = {} if core.mode is None else core.mode.drifts()
            report = verify(work, core.store, core.parameters, core.recent, self._routed, beside, loader is not None)
        if tolerance is None:
            tolerance, limits = core.protection.tolerance, rounding_limits(core.store, work.parameters)
            report = replace(report, limits={**report.limits, **limits})
        return replace(report, kept={**report.kept, **kept}, tolerance=tolerance)

    def _refuse_mode(self, method: str, why: str) -> None:
        if self._core.mode is not None:
            raise OptionError(f"{method}() is for null-space protection; a mode {why}")

    def _routed(self, task: str) -> AbstractContextManager[None]:
        return nullcontext() if self._core.mode is None else self._core.mode.task(task)

    def capacity(self) -> Capacity:
        """Return the share of directions still free, by parameter name (0 for frozen and full, 1 for free
        parameters); its `mean` counts weights with a basis only.
        """
        return Capacity(self._core.store)

    def reanchor(self) -> None:
        """Accept the present weights and buffers as the values to keep (after a deliberate load, EMA swap or merge)."""
        accept_anchors(self._core)

    def blend(self, before: Mapping[str, Tensor], share: float) -> None:
        """Go back from the present weights to those of an earlier time by `share`: less learned, less forgotten.

        `W <- W + share (W_before - W)`, as WiSE-FT does (arXiv 2109.01903), of everything that is not kept; what is
        kept stays exactly. A dial to turn after training: evaluate a few shares and keep the one you like.

        Args:
            before: parameters (and buffers) by name, as `state_dict()` gave them before the task; make copies.
            share: 0..1; 0 changes nothing.

        Raises:
            OptionError: `share` is out of range, `before` is no copy of an earlier `state_dict()` of the model, a
                weight is under `begin_turn` or `begin_low_rank`, or the optimizer has a mode.
            ShapeError: a tensor of `before` has another shape.
            StaleAnchorError: a protected weight was edited outside the optimizer.
        """
        self._refuse_mode("blend", "keeps all but the experts at work")
        blend_weights(self._core, before, share)

    def restore(self) -> None:
        """Put every kept direction, frozen parameter and protected buffer back to its anchor, after an edit by mistake.

        The rest stays; a step that was interrupted is put back without it. All ranks must call it.

        Raises:
            StaleAnchorError: a weight is not finite; nothing was changed.
        """
        restore_anchors(self._core)

    def release(self, name: str) -> None:
        """Give up the protection of one parameter: it is free until a later consolidation meets it."""
        if name not in self._core.store:
            known = ", ".join(sorted(self._core.store)[:8])
            raise OptionError(f"release('{name}'): no such basis; known names begin with: {known}")
        check_ownership(self._core)
        self._core.protection.finish_interrupted()
        self._core.store.remove(name)
        self._core.rebuild()

    def detach(self) -> Optimizer | list[Optimizer]:
        """Remove every hook from base and model and return the base (the list of bases if several were given)."""
        self._core.detach()
        return self._core.bases[0] if len(self._core.bases) == 1 else self._core.bases
