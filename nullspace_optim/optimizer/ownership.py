"""Registry of the wrapper that protects each parameter: protection belongs to a model, not to one optimizer object.

A new wrapper over parameters that a living one protects takes its bases over. Bases that were lost with their wrapper
are named before the next step.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..distributed.fsdp import reshard
from ..errors import NullSpaceWarning, OptionError, ShapeError
from ..model.names import named_parameters
from ..protection.step_hooks import Protection
from ..settings import Settings
from ..subspace.basis import Basis, BasisStore
from ..verification.verify import RecentSamples, lost_parameters
from .checks import check_growth
from .mode import GONE

SUPERSEDED = (
    "another NullSpaceOptimizer was made over the same parameters and took the bases of this one over: use that one "
    "(or call its detach(), then load() here)"
)


class Owner(Protocol):
    """The parts of an engine by which wrappers of one model find each other and hand bases over."""

    @property
    def bases(self) -> list[Optimizer]:
        """The wrapped optimizers."""

    options: Settings
    mode: Any
    model: Callable[[], nn.Module | None]
    store: BasisStore
    parameters: dict[str, Tensor]
    protection: Protection
    recent: RecentSamples
    superseded: bool
    lost: tuple[str, ...]
    replaced: frozenset[str]
    refusals: list[Any]
    base_handles: list[Any]

    def owner(self) -> nn.Module:
        """Return the model, found if it was not given."""

    def attach(self) -> None:
        """Hook the bases."""

    def detach(self) -> None:
        """Remove every hook."""

    def snapshot(self) -> BasisStore:
        """Return the store as files hold it."""

    def adopt(self, store: BasisStore) -> None:
        """Take over a store whose anchors are compared before the next step."""

    def take(self, store: BasisStore, parameters: Mapping[str, Tensor]) -> None:
        """Guard what a store keeps."""


@dataclass(frozen=True)
class Claim:
    """Protection of one parameter: its name, the engine that holds the bases, and the tasks they keep."""

    name: str
    owner: weakref.ref[Owner]
    tasks: tuple[str, ...]


_CLAIMS: MutableMapping[Tensor, Claim] = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]


def claim(engine: Owner) -> None:
    """Register everything that `engine` protects as its own: with experts, all of the model they stand beside."""
    _forget(engine)
    tasks, owner = tuple(str(record["name"]) for record in engine.store.tasks), weakref.ref(engine)
    if engine.mode is not None:
        model = engine.model()  # a copy finds its own later
        for beside in [*_trained(engine.bases), *(() if model is None else model.parameters())]:
            _CLAIMS[beside] = Claim("", owner, tasks)
    for name, guard in engine.protection.guards.items():
        for parameter in (guard.parameter, guard.bias):
            if parameter is not None:
                _CLAIMS[parameter] = Claim(name, owner, tasks)


def disclaim(engine: Owner) -> None:
    """Register that nothing is protected by `engine`; optimizers whose bases it took over may step again."""
    _forget(engine)
    for handle in engine.refusals:
        handle.remove()
    engine.refusals.clear()
    engine.lost = ()


def refuse_protected(bases: Iterable[Optimizer], mode: object) -> None:
    """Refuse parameters that a living wrapper keeps in another mode: neither would keep what the other holds.

    Raises:
        OptionError: a wrapper without a mode protects some of them and this one has a mode, or the other way round.
    """
    trained = _trained(bases)
    if not _other_modes(trained, mode):
        return
    gc.collect()  # an optimizer and its hooks refer to each other: dropped ones may be there still
    if not _other_modes(trained, mode):
        return
    if mode is None:
        raise OptionError(
            "a NullSpaceOptimizer with experts (a mode) trains beside these parameters, and this one would move what "
            "its tasks rely on: go on with that one, or call its detach() to take the experts away"
        )
    raise OptionError(
        "a NullSpaceOptimizer without a mode protects these parameters, and experts beside them would not keep it: "
        "go on without mode=, or call detach() on that one to give its bases up"
    )


def _other_modes(trained: list[Tensor], mode: object) -> bool:
    owners = [claim.owner() for claim in _claims(trained)]
    return any(owner is not None and (owner.mode is None) != (mode is None) for owner in owners)


def take_over(engine: Owner) -> None:
    """Take over the bases of living wrappers that protect parameters of a new `engine`; note the tasks of dead ones.

    After an error the new engine is detached and the other wrappers are as they were.

    Raises:
        OptionError: `engine` steps some of the parameters that another wrapper protects, but not all of them, or
            parameters of several others.
    """
    trained = _trained(engine.bases)
    if engine.mode is not None or not _claims(trained):
        return
    try:
        _find_and_succeed(engine, trained)
    except BaseException:
        engine.detach()
        raise


def _find_and_succeed(engine: Owner, trained: list[Tensor]) -> None:
    gc.collect()  # an optimizer and its hooks refer to each other: dropped ones may be there still
    claims = _claims(trained)
    owners = {id(owner): owner for c in claims for owner in [c.owner()] if owner is not None and owner.mode is None}
    engine.lost = tuple(dict.fromkeys(task for c in claims if c.owner() is None for task in c.tasks))
    for parameter in [p for p in trained if p in _CLAIMS and _CLAIMS[p].owner() is None]:
        del _CLAIMS[parameter]  # warned of once
    ids = {id(p) for p in trained}
    for owner in owners.values():
        present = {id(p) for model in (owner.model(), engine.model()) if model is not None for p in model.parameters()}
        held = [(p, c.name) for p, c in _CLAIMS.items() if c.owner() is owner and id(p) not in ids]
        outside = [name for p, name in held if id(p) in present]
        if outside or len(owners) > 1:
            raise OptionError(
                f"another NullSpaceOptimizer protects parameters of this base, and {len(outside)} that it does not "
                f"step ({', '.join(outside[:3])}{', ...' if len(outside) > 3 else ''}): wrap all of them to take its "
                "bases over, or call its detach() first to give them up"
                if outside
                else f"{len(owners)} other NullSpaceOptimizers protect parameters of this base: bases of one can be "
                "taken over; go on with those, or call detach() on all but one"
            )
        _succeed(engine, owner)


def check_ownership(engine: Owner) -> None:
    """Warn once of bases that were lost with an earlier wrapper and not loaded since.

    Raises:
        OptionError: a newer wrapper took the bases over, or `detach()` took the experts away.
    """
    if engine.superseded:
        raise OptionError(SUPERSEDED)
    refuse_without_experts(engine)
    if engine.lost:
        missing = [task for task in engine.lost if task not in {str(record["name"]) for record in engine.store.tasks}]
        engine.lost = ()
        if missing:
            warnings.warn(
                f"an earlier NullSpaceOptimizer protected these parameters for {', '.join(missing)}, and its bases are "
                "gone with it: nothing of them is kept from now on. Make the new optimizer while the earlier one "
                "lives, or save() and load()",
                NullSpaceWarning,
                stacklevel=5,
            )


def check_return(engine: Owner) -> None:
    """Refuse to load bases into an engine that cannot keep them again.

    Raises:
        OptionError: another optimizer protects its parameters, or its experts were taken away by `detach()`.
    """
    if engine.superseded and any(claim.owner() not in (None, engine) for claim in _claims(_trained(engine.bases))):
        raise OptionError(SUPERSEDED)
    refuse_without_experts(engine)


def refuse_without_experts(engine: Owner) -> None:
    """Refuse what needs the experts of a mode that were taken away.

    Raises:
        OptionError: after `detach()`.
    """
    if engine.mode is not None and not engine.base_handles:
        raise OptionError(GONE)


def warn_lost(engine: Owner) -> None:
    """Warn once of protected parameters that the model holds no longer."""
    model = engine.model()
    if model is None or not engine.parameters:
        return
    reshard(model)
    lost = set(lost_parameters(engine.store, engine.parameters, named_parameters(model)))
    told, engine.replaced = engine.replaced, frozenset(lost)
    if names := sorted(lost - told):
        warnings.warn(
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)} parameters) are protected but no "
            "longer in the model, whose module was replaced: what stands there now is not protected. Give the new "
            "parameters to the optimizer (add_param_group), which then compares them with what is kept; or release() "
            "the names",
            NullSpaceWarning,
            stacklevel=3,
        )


def _trained(bases: Iterable[Optimizer]) -> list[Tensor]:
    return [p for base in bases for group in base.param_groups for p in group["params"]]


def _claims(parameters: Iterable[Tensor]) -> list[Claim]:
    return [_CLAIMS[p] for p in parameters if p in _CLAIMS]


def _forget(engine: Owner) -> None:
    for parameter in [p for p, held in _CLAIMS.items() if held.owner() is engine]:
        del _CLAIMS[parameter]


def _succeed(engine: Owner, owner: Owner) -> None:
    """Hand the bases of `owner` to `engine`; its bases refuse to step from now on."""
    if engine.model() is None:
        engine.model = owner.model
    owner.protection.make_exact()
    store, recent = owner.snapshot().copy(), owner.recent
    claims = {c.name: id(p) for p, c in _CLAIMS.items() if c.owner() is owner}
    refusals, owner.refusals = owner.refusals, []  # those of earlier wrappers stay
    owner.detach()
    try:
        _drop_replaced(store, claims, engine.owner(), engine.options)
        engine.adopt(store)
    except BaseException:
        owner.attach()
        owner.refusals = refusals
        owner.take(owner.store, owner.parameters)
        raise
    engine.recent, owner.superseded = recent, True
    engine.refusals += refusals
    engine.refusals += [base.register_step_pre_hook(_refuse) for base in owner.bases]


def _drop_replaced(store: BasisStore, claims: Mapping[str, int], model: nn.Module, options: Settings) -> None:
    """Drop bases of parameters that `model` holds no longer, or in another shape (a head that was replaced), unless
    they have grown and begin with what is kept.
    """
    named = named_parameters(model)
    present = {id(p) for p in named.values()}
    gone = [
        name
        for name, basis in store.items()
        if (not _found_again(basis, named, options) if name in named else claims.get(name) not in present)
    ]
    for name in gone:
        if name in store:  # a bias may have gone with its weight
            store.remove(name)
    if gone:
        warnings.warn(
            f"{', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''} ({len(gone)} parameters) were replaced since "
            "they were consolidated: what stands there now is free, and earlier tasks that use it will change",
            NullSpaceWarning,
            stacklevel=5,
        )


def _found_again(basis: Basis, named: Mapping[str, Tensor], options: Settings) -> bool:
    """Return whether a parameter has the shape of its basis, or has grown from it."""
    try:
        check_growth({basis.name: basis}, named, options)
    except ShapeError:
        return False
    return True


def _refuse(*_: Any) -> NoReturn:
    raise OptionError(SUPERSEDED)
