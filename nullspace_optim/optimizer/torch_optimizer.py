"""The torch.optim contract: a real `Optimizer` whose groups, state, defaults and step are those of the wrapped base.

`param_groups`, `state` and `defaults` are live properties, never copies by reference: after `load_state_dict` the
base's list is a new object. Nothing is ever stored in the base's `state`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ..distributed.failures import raise_on_all_ranks
from ..distributed.group import rank
from ..errors import BasisFileError, NullSpaceWarning, OptionError
from ..files import basis_file, schema
from ..files.state_dict import carry, join_states, lost_its_mark, pop_protection, read_store, seal, split_states
from ..protection.phases import PHASES
from ..subspace.basis import BasisStore, Fate
from .dcp import Checkpoint, called_by_torch, complete, drop_state, names_of
from .engine import Engine
from .ownership import refuse_without_experts, warn_lost


class WrappedOptimizer(Optimizer):
    """An optimizer that hands everything on to the bases of its `Engine`."""

    _core: Engine
    _bases: list[Optimizer]

    def _attach(self, core: Engine, hooked: bool = True) -> None:
        """Become the wrapper of `core` (the optimizer's own tables are made with a placeholder first)."""
        super().__init__([torch.empty(0)], {})
        self._core, self._bases = core, core.bases  # the engine itself does not keep its bases alive
        self.__dict__.pop("_early", None)
        if hooked:
            core.attach()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base: its own list (of several bases, a new list of their groups in order)."""
        core = getattr(self, "_core", None)
        if core is None:
            return self.__dict__["_early"]  # type: ignore[no-any-return]
        if len(core.bases) == 1:
            return core.bases[0].param_groups  # type: ignore[no-any-return]
        return [group for base in core.bases for group in base.param_groups]

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

    @property
    def is_second_order(self) -> bool:
        """True where a base wants `backward(create_graph=True)` (AdaHessian; timm's training script asks)."""
        return any(getattr(base, "is_second_order", False) for base in self._core.bases)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base step (with `closure` if given) and return its loss; protection happens in the base's hooks.

        After an error or an interrupt every kept direction is back at its anchor.
        """
        with self._core.protection.finishing(), one_call_of_global_hooks(self._bases):
            if len(self._bases) == 1:
                return self._bases[0].step() if closure is None else self._bases[0].step(closure)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for base in self._bases:
                base.step()
            return loss

    def __getattr__(self, name: str) -> Any:
        """Hand on the parts of a step that are called by hand (SAM's `first_step` and `second_step`)."""
        bases = self.__dict__.get("_bases", ())
        if name in PHASES and len(bases) == 1:
            return getattr(bases[0], name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

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
        """Switch bases that have modes to training."""
        self._set_mode("train")

    def eval(self) -> None:
        """Switch bases that have modes to evaluation."""
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        with self._core.unedited():
            for base in self._core.bases:
                switch = getattr(base, mode, None)
                if callable(switch):
                    switch()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict plus the bases under ``"nullspace"`` and their fingerprint in every group (empty
        without bases), by which a load finds out that a recipe has dropped them.

        Holds tensors and plain values only, so it loads with ``weights_only=True``; a bare base optimizer loads it as
        well. Inside `get_state_dict` of torch.distributed.checkpoint the bases are text in the first group instead, and
        every trainable parameter has optimizer state.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        core, for_dcp = self._core, called_by_torch()
        refuse_without_experts(core)
        warn_lost(core)
        whole: AbstractContextManager[list[Tensor]] = complete(core) if for_dcp else nullcontext([])
        with whole as stateless:
            state = join_states([base.state_dict() for base in core.bases])
        store = core.snapshot()
        groups = state.get("param_groups", ())  # optimizers around an optimizer may have their own structure
        kept = bool(store.tasks) or store.extension is not None
        mark = schema.fingerprint(store) if kept else ""
        for group in groups:  # also without bases: torch.distributed.checkpoint fills in keys that are there
            group["nullspace"] = mark
        if kept:
            owed = {**core.protection.owed, "allowed": core.protection.allowed}
            if for_dcp:
                carry(state, store, {**owed, "stateless": names_of(core, stateless)})
            else:
                tensors, metadata = schema.pack(store)
                state["nullspace"] = {"tensors": tensors, "metadata": metadata, **owed, "seal": seal(metadata, owed)}
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
        core = self._core
        plain, payload, expected = pop_protection(state_dict)
        store = None if payload is None else read_store(payload)
        self._refuse_missing(state_dict, store, expected)
        if store is not None:
            store = core.matching(store)
            core.check(store)
            core.extend(store)  # a mode's parameters must exist before their optimizer state is loaded
        for base, part in zip(core.bases, split_states(plain, [len(b.param_groups) for b in core.bases])):
            base.load_state_dict(part)
        if store is not None and payload is not None:
            core.settle(store)
            core.protection.owed = payload
            core.protection.allowed = payload["allowed"]
            drop_state(core, payload.get("stateless", ()))
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _refuse_missing(self, state: dict[str, Any], store: BasisStore | None, expected: str | None) -> None:
        """Refuse a checkpoint whose bases are neither in it nor here; warn of one that never had any."""
        present = self._core.snapshot() if store is None else store
        known = bool(present.tasks) or present.extension is not None
        if expected is not None and (not known or schema.fingerprint(present) != expected):
            raise BasisFileError(
                "this checkpoint was protected, but its bases are missing or belong to another run: call "
                "opt.load(path) with the basis file of that run first, or load the checkpoint into the base optimizer "
                "to go on without protection"
            )
        groups = len(state.get("param_groups", ()))
        if self._core.mode is not None and store is None and groups != len(self.param_groups):
            raise BasisFileError(
                f"this state holds no experts ({groups} parameter groups there, {len(self.param_groups)} here): an "
                "optimizer without them wrote it; load it into the base before the NullSpaceOptimizer is made"
            )
        if expected is None and not known and lost_its_mark(state):
            raise BasisFileError(
                "this state does not say whether it was protected (flatten_optimizer_state_dict drops that, and a bare "
                "optimizer does not write it): call opt.load(path) with its bases first; if it has none, load it into "
                "the base optimizer, set_state_dict(model, base, ...)"
            )
        if expected is None and store is None and present.tasks:
            warnings.warn(
                f"the checkpoint holds no bases; the {len(present.tasks)} consolidated tasks stay protected",
                NullSpaceWarning,
                stacklevel=3,
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write bases, anchors and provenance to one safetensors file (atomic, checksummed, byte-identical when
        repeated).

        Of several processes all must call it; rank 0 writes, the others wait until the file is complete.
        """
        with raise_on_all_ranks():
            self._core.follow_replaced()
            warn_lost(self._core)
            self._core.protection.check_anchors()
        whole = self._core.snapshot()
        with raise_on_all_ranks():
            if rank() == 0:
                basis_file.save(whole, path)

    def checkpoint(self) -> Checkpoint:
        """Return model, base optimizers and protection as one object for `torch.distributed.checkpoint`.

        Saved by so many processes, it can be loaded by any other number.

        Example:
            >>> dcp.save({"training": opt.checkpoint()}, checkpoint_id=folder)   # doctest: +SKIP
            >>> dcp.load({"training": opt.checkpoint()}, checkpoint_id=folder)   # doctest: +SKIP
        """
        return Checkpoint(self._core)

    def load(self, path: str | PathLike[str]) -> None:
        """Replace all bases by those of a file written by `save`; each of several processes reads it.

        Raises:
            BasisFileError: the file is damaged, foreign or names parameters that the model lacks.
            ShapeError: a basis does not fit its parameter.
        """
        with raise_on_all_ranks():
            store = basis_file.load(path)
        with torch.inference_mode(False):
            self._core.adopt(self._core.matching(store))
            self._core.align()

    def __getstate__(self) -> dict[str, Any]:
        core = self._core
        core.protection.finish_interrupted()
        return {
            "bases": core.bases,
            "options": core.options,
            "mode": core.mode,
            "store": core.store,
            "parameters": core.parameters,
            "owed": core.protection.owed,
            "detached": not core.base_handles,
            "attributes": {key: value for key, value in self.__dict__.items() if key[0] != "_" and key != "step"},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        hooked = not state.get("detached", False)
        self._attach(Engine(state["bases"], state["options"], state["mode"]), hooked)
        self._core.parameters = state["parameters"]
        self._core.store.replace(state["store"])
        self._core.rebuild()
        self._core.protection.owed = state["owed"]
        self._core.copied = hooked and bool(self._core.store.tasks)
        if hooked and self._core.store.buffers:  # a forward pass before the first step must not move them
            self._core.copied = not self._core.find_copied_model()
        self.__dict__.update(state["attributes"])

    def __repr__(self) -> str:
        bases = ", ".join(repr(base) for base in self._core.bases)
        store = self._core.store
        counts = (
            ", ".join(f"{sum(b.fate is fate for b in store.values())} {fate.value}" for fate in Fate)
            if store
            else "nothing protected yet"
        )
        options = {"mode": self._core.mode, **vars(self._core.options)}
        settings = ", ".join(f"{key}={value!r}" for key, value in options.items())
        return f"NullSpaceOptimizer({bases}\n{settings}\ntasks: {len(store.tasks)}; parameters: {counts})"


@contextmanager
def one_call_of_global_hooks(bases: Sequence[Optimizer]) -> Iterator[None]:
    """Let global step hooks (of profilers, of loggers) pass over steps of `bases`: the wrapper's step is their call."""
    tables: Any = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    before = [(table, key, hook) for table in tables for key, hook in table.items()]
    for table, key, hook in before:
        table[key] = _passing_over(hook, bases)
    try:
        yield
    finally:
        for table, key, hook in before:
            if key in table:  # else it was removed within the step
                table[key] = hook


def _passing_over(hook: Callable[..., Any], bases: Sequence[Optimizer]) -> Callable[..., Any]:
    def call(optimizer: Optimizer, *arguments: Any) -> Any:
        return None if any(optimizer is base for base in bases) else hook(optimizer, *arguments)

    return call
