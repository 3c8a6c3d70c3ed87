"""`NullSpaceOptimizer`: the torch.optim contract around any optimizer; everything else is handed on.

The protection itself lives in step hooks on the base optimizer, so `opt.step()`, `base.step()` and
`scaler.step(base)` are protected alike,
and a framework that unwraps the base keeps it. Sources: GNSP (arXiv 2507.19839) and the gradient-projection family
(GPM, Adam-NSCL); the anchor
correction `W <- W - (W U - A) U^H` after the step is this library's own.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from . import persistence
from .basis import BasisStore, Fate
from .checkpoints import join_states, pop_protection, split_states
from .consolidation import ConsolidationOptions, Pass, consolidate, record_probe
from .diagnostics import moved_buffers
from .discovery import Forward, find_model, unwrap
from .displacement import Displacement
from .errors import BasisFileError, ModelNotFoundError, OptionError, ShapeError
from .names import named_buffers, named_parameters
from .norm_stats import freeze_statistics
from .policies import Energy, Policy
from .probes import Probe, compare, find_samples
from .projection import anchor
from .protection import Precision, Project, Protection, ProtectionOptions, matrix_of
from .report import ConsolidationReport, VerifyReport
from .untouched import untouched


class NullSpaceWarning(UserWarning):
    """Something a user of protection should know; the text says what to do."""


class _Core:
    """The mutable parts of one wrapper (frameworks may rebind attributes of the wrapper itself, never of this)."""

    def __init__(self, bases: list[Optimizer], options: dict[str, Any]) -> None:
        self.bases = bases
        self.options = options
        self.measuring = ConsolidationOptions(
            policy=options["policy"],
            rows=options["rows"],
            bias=options["bias"],
            uncovered=options["uncovered"],
            on_full=options["on_full"],
        )
        self.protection = Protection(ProtectionOptions(project=options["project"], precision=options["precision"]))
        self.store = BasisStore()
        self.displacement = Displacement()
        self.parameters: dict[str, Tensor] = {}
        self.model: Callable[[], nn.Module | None] = lambda: None
        self.base_handles: list[Any] = []
        self.model_handles: list[Any] = []
        self.copied = False

    def before_step(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step pre-hook of every base."""
        if self.copied:
            self.find_copied_model()
        self.displacement.remember(p for group in base.param_groups for p in group["params"])
        return self.protection.before_step(base, args, kwargs)

    def wrapped(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters that are both in the bases and in `model`, by name."""
        ids = {id(p) for base in self.bases for group in base.param_groups for p in group["params"]}
        return {name: p for name, p in named_parameters(model).items() if id(p) in ids}

    def install(self, model: nn.Module) -> None:
        """Hook `model` for norm statistics and exact evaluation."""
        for handle in self.model_handles:
            handle.remove()
        self.model_handles.clear()
        self.model_handles.append(model.register_forward_pre_hook(_BeforeEvaluation(self)))
        if self.options["norm_stats"] == "frozen":
            self.model_handles.extend(freeze_statistics(model, self.store.buffers))

    def find_copied_model(self) -> None:
        """After deepcopy or unpickling: hook the copy of the model, if there is one."""
        self.copied = False
        with suppress(ModelNotFoundError):
            self.install(find_model(p for base in self.bases for group in base.param_groups for p in group["params"]))


class _BeforeEvaluation:
    """Forward pre-hook of the model: an evaluation sees exact weights. Copies of the model carry it without effect."""

    def __init__(self, core: _Core | None = None) -> None:
        self.core: Callable[[], _Core | None] = (lambda: None) if core is None else weakref.ref(core)

    def __call__(self, model: nn.Module, args: Any) -> None:
        core = self.core()
        if core is not None and not model.training:
            core.protection.make_exact()

    def __reduce__(self) -> tuple[type[_BeforeEvaluation], tuple[()]]:
        return _BeforeEvaluation, ()


class NullSpaceOptimizer(Optimizer):
    """Wrap `base` so that directions which consolidated tasks used keep their values exactly.

    Args:
        base: any torch optimizer, or a list of them (one store, one consolidation).
        model: the module that owns the parameters; found among live modules when needed if not given.
        policy: which directions to protect; `Energy(0.999)` by default.
        project: ``"update"`` (anchor correction after the step, exact), ``"gradient"`` (as published methods do;
            leaks), ``"both"``.
        precision: ``"exact"``, or ``"fast"`` (low-precision products, exact every 16th step and before evaluation).
        uncovered: what happens to parameters that were used but cannot be protected: ``"freeze"`` or ``"train"``.
        bias: ``"freeze"``, or ``"joint"`` to protect `[W b]` on `[x; 1]`.
        norm_stats: ``"frozen"`` keeps running statistics that a past task used, ``"train"`` lets them move.
        rows: ``"relevant"`` protects only rows that can reach the model's output, ``"all"`` every row.
        on_full: ``"warn"`` or ``"raise"`` when a parameter has no free direction left.

    Raises:
        OptionError: `base` is not an optimizer, is wrapped already, is differentiable, or an option is unknown.

    Example:
        >>> opt = NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-5))   # doctest: +SKIP
        >>> report = opt.consolidate(task_loader)                                      # doctest: +SKIP
    """

    _core: _Core

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        model: nn.Module | None = None,
        *,
        policy: Policy | None = None,
        project: Project = "update",
        precision: Precision = "exact",
        uncovered: Literal["freeze", "train"] = "freeze",
        bias: Literal["freeze", "joint"] = "freeze",
        norm_stats: Literal["frozen", "train"] = "frozen",
        rows: Literal["relevant", "all"] = "relevant",
        on_full: Literal["warn", "raise"] = "warn",
    ) -> None:
        bases: list[Any] = list(base) if isinstance(base, (list, tuple)) else [base]
        _check_bases(bases)
        if norm_stats not in ("frozen", "train"):
            raise OptionError(f"norm_stats={norm_stats!r}: expected one of 'frozen', 'train'")
        options = {
            "policy": Energy() if policy is None else policy,
            "project": project,
            "precision": precision,
            "uncovered": uncovered,
            "bias": bias,
            "norm_stats": norm_stats,
            "rows": rows,
            "on_full": on_full,
        }
        core = _Core(bases, options)
        super().__init__([torch.empty(0)], {})
        self._attach(core)
        if model is not None:
            self._remember_model(unwrap(model))

    # ---- the torch.optim contract ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base (of all bases, in order)."""
        core = getattr(self, "_core", None)
        return (
            self.__dict__["_early"] if core is None else [group for base in core.bases for group in base.param_groups]
        )

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        core = getattr(self, "_core", None)
        if core is None:
            self.__dict__["_early"] = groups
            return
        rest = list(groups)
        for base in core.bases[:-1]:
            base.param_groups = rest[: len(base.param_groups)]
            rest = rest[len(base.param_groups) :]
        core.bases[-1].param_groups = rest

    @property
    def state(self) -> Any:
        """The state of the base (a merged copy if there are several)."""
        core = getattr(self, "_core", None)
        if core is None or len(core.bases) == 1:
            return None if core is None else core.bases[0].state
        return {parameter: state for base in core.bases for parameter, state in base.state.items()}

    @state.setter
    def state(self, state: Any) -> None:
        core = getattr(self, "_core", None)
        if core is not None and len(core.bases) == 1:
            core.bases[0].state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the (first) base."""
        core = getattr(self, "_core", None)
        return {} if core is None else core.bases[0].defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            core.bases[0].defaults = defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base step (with `closure` if given) and return its loss; protection happens in the base's hooks."""
        bases = self._core.bases
        try:
            if len(bases) == 1:
                return bases[0].step() if closure is None else bases[0].step(closure)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for base in bases:
                base.step()
            return loss
        finally:
            self._core.protection.put_back()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its parameters are free until the next consolidation."""
        core = getattr(self, "_core", None)
        if core is None:
            super().add_param_group(param_group)
        elif len(core.bases) > 1:
            raise OptionError(
                "there are several base optimizers: call add_param_group on the one that should own the parameters"
            )
        else:
            core.bases[0].add_param_group(param_group)

    def train(self) -> None:
        """Switch bases that have modes (Schedule-Free) to training."""
        self._set_mode("train")

    def eval(self) -> None:
        """Switch bases that have modes (Schedule-Free) to evaluation."""
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        for base in self._core.bases:
            switch = getattr(base, mode, None)
            if callable(switch):
                switch()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict plus the bases under ``"nullspace"`` and their fingerprint in every group.

        Holds tensors and plain values only, so it loads with ``weights_only=True``; a bare base optimizer loads it as
        well.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = join_states([base.state_dict() for base in self._core.bases])
        store = self._core.store
        for group in state["param_groups"]:
            group.pop("nullspace", None)
        if store.tasks:
            tensors, metadata = persistence.pack(store)
            state["nullspace"] = {"tensors": tensors, "metadata": metadata, **self._core.protection.owed}
            print_ = persistence.fingerprint(store)
            for group in state["param_groups"]:
                group["nullspace"] = print_
        for post in self._optimizer_state_dict_post_hooks.values():
            state = post(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the bare base; never drops protection in silence.

        Raises:
            BasisFileError: the checkpoint was protected but its bases are missing or differ.
            ShapeError: a basis does not fit its parameter.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        plain, payload, expected = pop_protection(state_dict)
        store = None
        if payload is not None:
            store = persistence.unpack(payload["tensors"], payload["metadata"], source="the optimizer's state dict")
            _check_fit(store, self._core.wrapped(self.model))
        present = store if store is not None else self._core.store
        if expected is not None and (not present.tasks or persistence.fingerprint(present) != expected):
            raise BasisFileError(
                "this checkpoint was protected, but its bases are missing or belong to another run: call "
                "opt.load(path) with the basis file of that run first, or load the checkpoint into the base optimizer "
                "to go on without protection"
            )
        if expected is None and payload is None and self._core.store.tasks:
            warnings.warn(
                f"the checkpoint holds no bases; the {len(self._core.store.tasks)} consolidated tasks stay protected",
                NullSpaceWarning,
                stacklevel=2,
            )
        for base, part in zip(self._core.bases, split_states(plain, [len(b.param_groups) for b in self._core.bases])):
            base.load_state_dict(part)
        if store is not None and payload is not None:
            self._adopt(store)
            self._core.protection.owed = payload
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        core = self._core
        return {
            "bases": core.bases,
            "options": core.options,
            "store": core.store,
            "parameters": core.parameters,
            "owed": core.protection.owed,
            "attributes": {key: value for key, value in self.__dict__.items() if key[0] != "_" and key != "step"},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__init__(self, [torch.empty(0)], {})
        self._attach(_Core(state["bases"], state["options"]))
        self._core.parameters = state["parameters"]
        self._core.store.replace(state["store"])
        self._core.protection.rebuild(self._core.store, self._core.parameters)
        self._core.protection.owed = state["owed"]
        self._core.copied = bool(self._core.store.tasks)
        self.__dict__.update(state["attributes"])

    def __repr__(self) -> str:
        bases = ", ".join(repr(base) for base in self._core.bases)
        store = self._core.store
        counts = (
            ", ".join(f"{sum(b.fate is fate for b in store.values())} {fate.value}" for fate in Fate)
            if store
            else "nothing protected yet"
        )
        settings = ", ".join(f"{key}={value!r}" for key, value in self._core.options.items())
        return f"NullSpaceOptimizer({bases}\n{settings}\ntasks: {len(store.tasks)}; parameters: {counts})"

    # ---- protection ----

    @property
    def bases(self) -> Mapping[str, Any]:
        """`Basis` by parameter name: `U`, `spectrum`, `rank`, `tasks`, `fate`."""
        return self._core.store

    @property
    def model(self) -> nn.Module:
        """The module that owns the wrapped parameters.

        Raises:
            ModelNotFoundError: it was not given and cannot be found.
        """
        model = self._core.model()
        if model is None:
            model = find_model(p for group in self.param_groups for p in group["params"])
            self._remember_model(model)
        return model

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
        on the model.

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
        """
        core = self._core
        model = self.model
        parameters = self._named_parameters(model)
        core.protection.check_anchors()
        task = name if name is not None else f"task {len(core.store.tasks) + 1}"
        work = Pass(model, parameters, loader, task, forward, max_batches, progress)
        with self._evaluation_point():
            grown, report = consolidate(work, core.store, core.measuring, core.displacement)
        core.store.replace(grown)
        core.parameters = {**core.parameters, **parameters}
        self._install(model)
        core.displacement.forget()
        for text in report.warnings:
            warnings.warn(text, NullSpaceWarning, stacklevel=2)
        return report

    def verify(
        self,
        loader: Iterable[Any] | None = None,
        *,
        forward: Forward | None = None,
        max_batches: int | None = None,
        tolerance: float = 1e-5,
    ) -> VerifyReport:
        """Check that everything kept is still what it was.

        Without a loader: the invariant `||W U - A|| / ||A||` per parameter and every buffer that moved. With the
        loader of a consolidated task
        (in any order, without augmentation): also the output drift per layer on the samples that `consolidate`
        remembered by digest, and the first layer
        that breaks.
        """
        core = self._core
        core.protection.make_exact()
        with torch.no_grad():
            kept = {name: guard.drift() for name, guard in core.protection.guards.items()}
        layers, missing = {}, []
        for record in core.store.tasks if loader is not None else []:
            drift = self._probe_drift(record, loader, forward, max_batches)
            if drift is None:
                missing.append(str(record["name"]))
            else:
                layers[str(record["name"])] = drift
        buffers = moved_buffers(core.store, named_buffers(self.model)) if core.store.buffers else ()
        return VerifyReport(kept, buffers, layers, tuple(missing), tolerance)

    def _probe_drift(
        self, record: Mapping[str, Any], loader: Any, forward: Forward | None, limit: int | None
    ) -> dict[str, float] | None:
        stored = self._core.store.probes[str(record["name"])]
        before = Probe(stored["digests"], tuple(record["layers"]), stored["sketches"], stored["norms"])
        model = self.model
        with untouched(model, loader), self._evaluation_point():
            samples = find_samples(loader, before.digests, limit)
            if samples is None:
                return None
            after = record_probe(
                Pass(model, self._named_parameters(model), loader, str(record["name"]), forward), samples
            )
        return compare(before, after)

    def capacity(self) -> dict[str, float]:
        """Return the share of directions still free, by parameter name (0 for frozen and full, 1 for free
        parameters).
        """
        return {name: basis.free_share for name, basis in self._core.store.items()}

    @torch.no_grad()
    def reanchor(self) -> None:
        """Accept the present weights as the values to keep (after a deliberate load, EMA swap or merge)."""
        for guard in self._core.protection.guards.values():
            basis = guard.basis
            if basis.kept is not None:
                basis.kept = guard.parameter.detach().clone()
            with matrix_of(guard.parameter, basis.layout, guard.bias) as matrix:
                for subspace in basis.subspaces.values():
                    subspace.anchor = anchor(matrix, subspace.basis, subspace.side)
            guard.mark()

    def release(self, name: str) -> None:
        """Give up the protection of one parameter: it is free until a later consolidation meets it."""
        if name not in self._core.store:
            known = ", ".join(sorted(self._core.store)[:8])
            raise OptionError(f"release('{name}'): no such basis; known names begin with: {known}")
        self._core.store.remove(name)
        self._core.protection.rebuild(self._core.store, self._core.parameters)

    def detach(self) -> Optimizer | list[Optimizer]:
        """Remove every hook from base and model and return the base (the list of bases if several were given)."""
        core = self._core
        if core.copied:
            core.find_copied_model()
        core.protection.release_gradient_hooks()
        for handle in [*core.base_handles, *core.model_handles]:
            handle.remove()
        core.base_handles.clear()
        core.model_handles.clear()
        return core.bases[0] if len(core.bases) == 1 else core.bases

    def save(self, path: str | PathLike[str]) -> None:
        """Write bases, anchors and provenance to one safetensors file (atomic, checksummed, byte-identical when
        repeated).
        """
        self._core.protection.check_anchors()
        persistence.save(self._core.store, path)

    def load(self, path: str | PathLike[str]) -> None:
        """Replace all bases by those of a file written by `save`.

        Raises:
            BasisFileError: the file is damaged, foreign or names parameters that the model lacks.
            ShapeError: a basis does not fit its parameter.
        """
        self._adopt(persistence.load(path))

    # ---- inside ----

    def _attach(self, core: _Core) -> None:
        self._core = core
        self.__dict__.pop("_early", None)
        for base in core.bases:
            core.base_handles.append(base.register_step_pre_hook(core.before_step))
            core.base_handles.append(base.register_step_post_hook(core.protection.after_step))

    def _remember_model(self, model: nn.Module) -> None:
        self._core.model = weakref.ref(model)

    def _named_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the trainable parameters that are both in the optimizer and in `model`, by name."""
        return {name: p for name, p in self._core.wrapped(model).items() if p.requires_grad}

    def _install(self, model: nn.Module) -> None:
        """Guard what the store keeps, and hook the model for norm statistics and exact evaluation."""
        self._core.protection.rebuild(self._core.store, self._core.parameters)
        self._core.install(model)

    def _adopt(self, store: BasisStore) -> None:
        model = self.model
        parameters = self._core.wrapped(model)
        _check_fit(store, parameters)
        for name, basis in store.items():
            _place(basis, parameters[name].device)
        self._core.store.replace(store)
        self._core.parameters = parameters
        self._install(model)
        for guard in self._core.protection.guards.values():
            guard.seen = (0, -1)

    @contextmanager
    def _evaluation_point(self) -> Iterator[None]:
        """Measure where the user evaluates: bases with modes (Schedule-Free) give their averaged weights."""
        training = [
            base for base in self._core.bases if any(group.get("train_mode", False) for group in base.param_groups)
        ]
        for base in training:
            base.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for base in training:
                base.train()  # type: ignore[attr-defined]


def _check_bases(bases: list[Any]) -> None:
    if not bases:
        raise OptionError("base=[]: expected an optimizer or a list of optimizers")
    for base in bases:
        if isinstance(base, NullSpaceOptimizer):
            raise OptionError("base is a NullSpaceOptimizer already: one wrapper is enough, use it or its detach()")
        if not isinstance(base, Optimizer) or not hasattr(base, "state") or not hasattr(base, "defaults"):
            raise OptionError(
                f"base={type(base).__name__}: expected a torch.optim.Optimizer with param_groups, state and defaults"
            )
        if any(isinstance(getattr(hook, "__self__", None), _Core) for hook in base._optimizer_step_pre_hooks.values()):
            raise OptionError(
                f"this {type(base).__name__} is wrapped already: call detach() on its NullSpaceOptimizer first"
            )
        if any(group.get("differentiable") for group in base.param_groups):
            raise OptionError(
                f"{type(base).__name__}(differentiable=True): corrections cannot be differentiated through; "
                "use differentiable=False"
            )
    if len(bases) > 1 and any(isinstance(base, LBFGS) for base in bases):
        raise OptionError("LBFGS evaluates its closure many times and cannot share a step: wrap it alone")
    owners: dict[int, tuple[int, Any]] = {}
    for number, base in enumerate(bases):
        for group in base.param_groups:
            for parameter in group["params"]:
                if id(parameter) in owners:
                    raise OptionError(
                        f"a parameter of shape {tuple(parameter.shape)} is in bases {owners[id(parameter)][0]} "
                        f"and {number}: each parameter belongs to one optimizer"
                    )
                owners[id(parameter)] = (number, group)


def _check_fit(store: BasisStore, parameters: Mapping[str, Tensor]) -> None:
    missing = sorted(set(store) - set(parameters))
    if missing:
        unexpected = sorted(set(parameters) - set(store))
        raise BasisFileError(
            f"the bases name parameters that the model (or the optimizer) lacks: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; without a basis here: {', '.join(unexpected[:5]) or 'none'}"
        )
    wrong = [
        f"'{name}' is {tuple(parameters[name].shape)}, its basis was made for {basis.shape}"
        for name, basis in store.items()
        if tuple(parameters[name].shape) != tuple(basis.shape)
    ]
    if wrong:
        raise ShapeError(f"shapes changed: {'; '.join(wrong[:5])}; use the model the bases were made with")


def _place(basis: Any, device: torch.device) -> None:
    """Move the tensors of a loaded basis to the device of its parameter."""
    if basis.kept is not None:
        basis.kept = basis.kept.to(device)
    for subspace in basis.subspaces.values():
        subspace.basis, subspace.anchor = subspace.basis.to(device), subspace.anchor.to(device)
