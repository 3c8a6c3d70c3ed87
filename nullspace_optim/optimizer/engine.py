"""The mutable parts behind one wrapper: bases, store, guards, the model and the hooks on all of them.

Frameworks may subclass or rebind the wrapper itself; everything that changes lives in its `Engine`. The hooks on a base
own the engine, which refers to the base weakly: `base.step()` is protected without the wrapper, and all is freed with
the last of them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed.collectives import check_equal_on_all_ranks
from ..distributed.failures import raise_on_all_ranks
from ..distributed.fsdp import refuse_tensor_parallel, reshard, sharded_modules
from ..distributed.group import world_size
from ..errors import BasisFileError, ModelNotFoundError, NullSpaceWarning, OptionError
from ..files.rename import match_store
from ..model.find import find_model
from ..model.hooks import remove_idle_hooks
from ..model.names import named_buffers, named_parameters, original_names
from ..model.norm_stats import forget_compiled, freeze_statistics, statistics
from ..model.storage import with_shared_memory
from ..protection.averaged_weights import BeforeEvaluation, Evaluation, evaluated
from ..protection.phases import hook_phases
from ..protection.step_hooks import Protection
from ..settings import Settings
from ..subspace.basis import BasisStore
from ..subspace.shards import local_store, whole_store
from ..verification.verify import RecentSamples, moved_buffers
from .checks import check_fit, check_growth, facts_of, refuse_compiled, refuse_fused
from .mode import Mode
from .ownership import check_ownership, check_return, claim, disclaim, warn_lost


class Engine:
    """Bases, options, store, guards and hooks of one wrapper."""

    def __init__(self, bases: list[Optimizer], options: Settings, mode: Mode | None = None) -> None:
        self._bases = [weakref.ref(base) for base in bases]
        self.options = options
        self.mode = mode
        self.protection = Protection(options)
        self.store = BasisStore()
        self.recent = RecentSamples()
        self.parameters: dict[str, Tensor] = {}
        self.model: Callable[[], nn.Module | None] = lambda: None
        self.base_handles: list[Any] = []
        self.model_handles: list[Any] = []
        self.norm_handles: list[Any] = []
        self.frozen: set[str] = set()
        self.unguarded: dict[int, str] = {}
        self.held, self.copied = set[int](), False
        self.superseded, self.lost = False, tuple[str, ...]()
        self.replaced = frozenset[str]()
        self.refusals: list[Any] = []

    @property
    def bases(self) -> list[Optimizer]:
        """The wrapped optimizers."""
        return [base for reference in self._bases if (base := reference()) is not None]

    def before_step(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step pre-hook of every base."""
        if self.copied:
            self.find_copied_model()
        if self.superseded or self.lost:
            check_ownership(self)
        if self.unguarded:
            self._warn_unguarded(base)
        self.follow_replaced()
        if self.mode is not None:
            self.protection.held = self.mode.before_step(base)
        return self.protection.before_step(base, args, kwargs)

    def after_step(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step post-hook of every base."""
        self.protection.after_step(base, args, kwargs)
        if self.mode is not None:
            self.mode.after_step(base)

    def _warn_unguarded(self, base: Optimizer) -> None:
        """Warn, once each, of parameters that begin to train although consolidated tasks read them without a basis."""
        trained = (p for group in base.param_groups for p in group["params"] if p.grad is not None)
        names = [self.unguarded.pop(id(p)) for p in trained if id(p) in self.unguarded]
        if names:
            warnings.warn(
                f"{len(names)} parameters that consolidated tasks read begin to train without a basis "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): where they take part in old outputs, "
                "these will move. They were not trainable then; consolidate those tasks again with these parameters "
                "trainable, or keep them fixed (a head whose outputs those tasks ignored may train)",
                NullSpaceWarning,
                stacklevel=5,
            )

    def follow_replaced(self) -> None:
        """Find guarded parameters again whose objects were replaced (a new layer, a framework's swap), by name.

        Every replacement is compared with the anchors before its next step. Nothing is done while the bases hold the
        same tensors as before.

        Raises:
            ShapeError: a replacement has another shape and has not grown from the old weight.
            OptionError: the bases step tensors that are not the model's (DeepSpeed ZeRO).
        """
        held = {id(p) for base in self.bases for group in base.param_groups for p in group["params"]}
        model = self.model()
        if held == self.held or not self.parameters or model is None:
            return
        refuse_fused(self.store, model)
        named = named_parameters(model)
        known = {name: p for name, p in self.parameters.items() if name in named and id(named[name]) in held}
        swapped = {name: named[name] for name, p in known.items() if named[name] is not p}
        if self.protection.guards and not known:
            self._refuse_foreign(model, self.wrapped(model))
        if swapped:
            self.protection.finish_interrupted()
            found = {name: self.store[name] for name in swapped if name in self.store}
            check_growth(found, {**self.parameters, **swapped}, self.options)
            self.parameters = {**self.parameters, **swapped}
            self.rebuild()
            for name, guard in self.protection.guards.items():
                if name in swapped or guard.basis.bias in swapped:
                    guard.seen = ()
            self.install(model)
        self.held = held

    def rebuild(self, store: BasisStore | None = None) -> None:
        """Guard what the store (or a new one) keeps of the parameters, as their one protector; not after `detach`."""
        self.store.replace(self.store if store is None else store)
        self.protection.rebuild(self.store, self.parameters)
        claim(self) if self.base_handles else self.protection.release_gradient_hooks()

    def _refuse_foreign(self, model: nn.Module, wrapped: Mapping[str, Tensor]) -> None:
        count = sum(len(group["params"]) for base in self.bases for group in base.param_groups)
        if count and not wrapped:
            raise OptionError(
                f"the optimizer steps {count} tensors none of which {type(model).__name__} holds: pass the model that "
                "is trained; or, if something flattened or copied its parameters (DeepSpeed ZeRO, 16-bit optimizers "
                "with master weights), use ZeRO stage 0 or torch.distributed.fsdp.fully_shard (FSDP2), which keep them"
            )

    def outside(self, model: nn.Module) -> int:
        """Return how many tensors the bases train that `model` does not hold."""
        held = {id(p) for base in self.bases for group in base.param_groups for p in group["params"]}
        return len(held - {id(p) for p in model.parameters()})

    def wrapped(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters that are both in the bases and in `model`, by name."""
        reshard(model)
        ids = {id(p) for base in self.bases for group in base.param_groups for p in group["params"]}
        return {name: p for name, p in named_parameters(model).items() if id(p) in ids}

    def install(self, model: nn.Module) -> None:
        """Hook `model` for norm statistics and exact evaluation."""
        remove_idle_hooks(model)
        if not self.base_handles:
            return  # detached
        read = {name for task in self.store.tasks for name in task.get("untrained", ())}  # type: ignore[attr-defined]
        self.unguarded = {id(p): name for name, p in named_parameters(model).items() if name in read - set(self.store)}
        first = bool(sharded_modules(model))  # FSDP2 gathers parameters in a pre-hook of its own
        mine = [h for h in model._forward_pre_hooks.values() if isinstance(h, BeforeEvaluation) and h.owner is self]
        if first or not mine:  # torch 2.6 compiles again where a hook is registered anew
            for handle in self.model_handles:
                handle.remove()
            self.model_handles[:] = [model.register_forward_pre_hook(BeforeEvaluation(self), prepend=first)]
        frozen = set(self.store.buffers) if self.options.norm_stats == "frozen" else set()
        if frozen != self.frozen:  # hooks that stay need no new compilation
            self.thaw()
            self.norm_handles, self.frozen = freeze_statistics(model, frozen, self), frozen
            if self.norm_handles:
                forget_compiled()

    def thaw(self) -> None:
        """Let running statistics move again."""
        for handle in self.norm_handles:
            handle.remove()
        if self.norm_handles:
            forget_compiled()
        self.norm_handles, self.frozen = [], set()

    @contextmanager
    def kept_statistics(self) -> Iterator[None]:
        """Put frozen running statistics back that something else has reset or filled anew, and say so; after an error
        they are as it left them.
        """
        found = statistics(self.owner(), self.frozen)
        moved = {n: found[n].detach().clone() for n in moved_buffers(self.store, found) if n in found}
        for name in moved:
            found[name].detach().copy_(self.store.buffers[name])
        try:
            yield
        except BaseException:
            for name, value in moved.items():
                found[name].detach().copy_(value)
            raise
        if moved:
            warnings.warn(
                f"{len(moved)} running statistics that earlier tasks used ({', '.join([*moved][:2])}"
                f"{', ...' if len(moved) > 2 else ''}) were changed outside the optimizer (update_bn, weight "
                'averaging) and put back; to keep new ones, call opt.reanchor() first, or use norm_stats="train"',
                NullSpaceWarning,
                stacklevel=4,
            )

    def find_copied_model(self) -> bool:
        """After deepcopy or unpickling: hook the copy of the model; return whether there is one."""
        self.copied = False
        try:
            self.install(self.owner())
            claim(self)
        except ModelNotFoundError:
            return False
        return True

    def attach(self) -> None:
        """Hook every base, and let the mode begin."""
        for base in self.bases:
            self.base_handles.append(base.register_step_pre_hook(self.before_step))
            self.base_handles.append(base.register_step_post_hook(self.after_step))
            hook_phases(base)
        if self.mode is not None:
            self.mode.attach(self)
            claim(self)
            self.protection.amend = self.mode.add_penalty

    def detach(self) -> None:
        """Remove every hook from bases, model and parameters."""
        self.protection.finish_interrupted()
        if self.copied:
            self.find_copied_model()
        disclaim(self)
        self.protection.release_gradient_hooks()
        self.thaw()
        for handle in [*self.base_handles, *self.model_handles]:
            handle.remove()
        self.base_handles.clear()
        self.model_handles.clear()
        if self.mode is not None:
            self.mode.detach()

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Let the body move parameters without that counting as an edit by somebody else."""
        clean = [guard for guard in self.protection.guards.values() if not guard.edited]
        try:
            yield
        finally:
            for guard in clean:
                guard.mark()

    @contextmanager
    def evaluated(self) -> Iterator[Evaluation]:
        """Let the parameters hold what is evaluated (see `iterates.evaluated`)."""
        with self.unedited(), evaluated(self.bases) as moment:
            yield moment

    def mode_apart(self) -> AbstractContextManager[None]:
        """Take what the mode trains out of the bases inside the context."""
        return nullcontext() if self.mode is None else self.mode.apart()

    def align(self) -> None:
        """Give weights that bases keep beside the parameters every kept direction."""
        for base in self.bases:
            self.protection.align(base)

    def owner(self) -> nn.Module:
        """Return the module that owns the wrapped parameters.

        Raises:
            ModelNotFoundError: it was not given and cannot be found.
        """
        model = self.model()
        if model is None:
            try:
                model = find_model(p for base in self.bases for group in base.param_groups for p in group["params"])
            except ModelNotFoundError:
                if not self.parameters:
                    raise
                model = find_model(self.parameters.values())  # bases may hold tensors of modules that were replaced
            self.model = weakref.ref(model)
            renamed = self.matching(self.store)  # another module around the same parameters than before
            if renamed is not self.store:
                self.store.replace(renamed)
                self.parameters = self.met_by(self.store)
                self.rebuild()
        return model

    def matching(self, store: BasisStore) -> BasisStore:
        """Return `store` under the names of the model, where one prefix makes the difference."""
        return match_store(store, named_parameters(self.owner())) if len(store) else store

    def trainable(self) -> dict[str, Tensor]:
        """Return those of `wrapped` that have gradients."""
        refuse_compiled()
        check_ownership(self)
        self.follow_replaced()
        warn_lost(self)
        model = self.owner()
        wrapped = self.wrapped(model)
        refuse_fused(self.store, model)
        self._refuse_foreign(model, wrapped)
        parameters = {name: p for name, p in wrapped.items() if p.requires_grad}
        if not sharded_modules(model):  # one weight, whichever of its parameters is trained
            parameters = with_shared_memory(parameters, wrapped)
        refuse_tensor_parallel(model, parameters)
        return parameters

    def adopt(self, store: BasisStore) -> None:
        """Take over a loaded store; every anchor is compared with the weights before the next step."""
        with raise_on_all_ranks():
            self.check(store)
            self.extend(store)
        self.settle(store)

    def settle(self, store: BasisStore) -> None:
        """Take over a loaded store whose mode, if any, has taken over its part already.

        Raises:
            BasisFileError, ShapeError: the bases do not belong to the model's parameters.
            ConsolidationError: the ranks have loaded different bases.
        """
        with raise_on_all_ranks():
            parameters = self.met_by(store)
            check_fit(store, parameters, self.options)
        check_equal_on_all_ranks(facts_of(self.options, parameters, store, digests=True), parameters)
        for name, basis in store.items():
            _place(basis, parameters[name].device)
        self.take(local_store(store, parameters), parameters)
        for guard in self.protection.guards.values():
            guard.seen = ()

    def check(self, store: BasisStore) -> None:
        """Refuse a loaded store that this optimizer cannot take over.

        Raises:
            BasisFileError: the store was written in another mode, or names parameters that are not there.
            ShapeError: a parameter has another shape than its basis.
        """
        check_return(self)
        if (self.mode is None) != (store.extension is None):
            wanted = store.extension.record.get("mode") if store.extension is not None else "null-space"
            raise BasisFileError(
                f"these bases were written with mode={wanted!r}, this optimizer has another mode: "
                f"construct NullSpaceOptimizer(base, model, mode={wanted!r}) to load them"
            )
        if self.mode is None:
            check_fit(store, self.met_by(store), self.options)

    def met_by(self, store: BasisStore) -> dict[str, Tensor]:
        """Return the wrapped parameters, and those of the model that only `store` names: the head of an earlier task
        that no base steps keeps its basis, and is compared with its anchor like all others.
        """
        wrapped = self.wrapped(self.owner())
        kept = {name for basis in store.values() for name in (basis.name, basis.bias)}
        return {n: p for n, p in named_parameters(self.owner()).items() if n in kept or n in wrapped}

    def extend(self, store: BasisStore) -> None:
        """Hand the mode's part of a loaded store to the mode, which refuses what does not fit the model."""
        if self.mode is not None and store.extension is not None:
            self.mode.state = store.extension

    def snapshot(self) -> BasisStore:
        """Return the store as files hold it: with the part of its mode and the anchors of all ranks; all must ask."""
        self.protection.finish_interrupted()
        if self.mode is not None:
            self.store.extension = self.mode.state
        return whole_store(self.store, self.parameters)

    def take(self, store: BasisStore, parameters: Mapping[str, Tensor]) -> None:
        """Guard what `store` keeps of `parameters`, and hook the model (after `detach` the bases as well)."""
        if not self.base_handles:
            self.superseded = False
            self.attach()
        self.parameters = {**self.parameters, **parameters}
        self.rebuild(store)
        model = self.owner()
        self.protection.originals = original_names(model)
        if world_size() > 1:  # what all ranks have measured with
            for name in store.buffers.keys() & (buffers := named_buffers(model)).keys():
                buffers[name].detach().copy_(store.buffers[name])
        self.install(model)


def _place(basis: Any, device: torch.device) -> None:
    """Move the tensors of a loaded basis to the device of its parameter."""
    if basis.kept is not None:
        basis.kept = basis.kept.to(device)
    for subspace in basis.subspaces.values():
        subspace.basis, subspace.anchor = subspace.basis.to(device), subspace.anchor.to(device)
        for name in ("scale", "covariance", "members"):
            held = getattr(subspace, name)
            setattr(subspace, name, None if held is None else held.to(device))
