"""Whether stored bases belong to the parameters at hand (names and shapes), and whether a call can be served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import BasisFileError, OptionError, StaleAnchorError
from ..files.schema import digest
from ..model.names import fused_name, named_parameters
from ..protection.edits import STALE, refuse_growth
from ..protection.guard import Guard
from ..settings import Settings
from ..subspace.basis import Basis, BasisStore
from ..subspace.growth import check_shapes


def refuse_compiled() -> None:
    """Refuse to look at a model from within a compiled function.

    Raises:
        OptionError: the caller runs under torch.compile.
    """
    compiling = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)()
    if compiling not in (None, False):
        raise OptionError(
            "a function that torch.compile has compiled called consolidate() or measure(), which cannot see the "
            "operators from within: call it outside of that function (the model itself may be compiled)"
        )


def check_fit(store: BasisStore, parameters: Mapping[str, Tensor], options: Settings) -> None:
    """Refuse bases that do not belong to `parameters`.

    Raises:
        BasisFileError: the store names parameters that are not there.
        ShapeError: a parameter has another shape than its basis and has not grown from it.
    """
    missing = sorted(set(store) - set(parameters))
    if missing:
        unexpected = sorted(set(parameters) - set(store))
        raise BasisFileError(
            f"the bases name parameters that the model (or the optimizer) lacks: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; without a basis here: {', '.join(unexpected[:5]) or 'none'}. Use "
            "the model that they were made with, or release() these names where they were saved, and save again"
        )
    check_growth(store, parameters, options)


@torch.no_grad()
def check_growth(store: Mapping[str, Basis], parameters: Mapping[str, Tensor], options: Settings) -> None:
    """Refuse parameters of another shape than their basis, unless they have grown and begin with what is kept.

    With ``project="gradient"`` weights leak, and what they begin with is not compared.

    Raises:
        ShapeError: names the parameter and both shapes.
    """
    check_shapes(store, parameters)
    for name, basis in store.items():
        compared = basis.kept is not None or (basis.subspaces and options.project != "gradient")
        if compared and tuple(parameters[name].shape) != basis.shape:
            guard = Guard(parameters[name], basis, parameters[basis.bias] if basis.bias else None)
            drift = guard.drift()
            if not drift <= STALE.get(guard.parameter.dtype, 1e-3):
                refuse_growth(guard, drift)


def refuse_fused(store: Mapping[str, Basis], model: nn.Module) -> None:
    """Refuse bases of parts (of `weight_norm`, of pruning) that were folded into one weight.

    Raises:
        StaleAnchorError: names the parts and the weight.
    """
    named: Mapping[str, Tensor] = named_parameters(model) if any(map(fused_name, store)) else {}
    gone: dict[str, list[str]] = {}
    for name in store:
        fused = fused_name(name)
        if fused in named and name not in named:
            gone.setdefault(str(fused), []).append(name)
    for fused, parts in gone.items():
        raise StaleAnchorError(
            f"{', '.join(map(repr, parts))} were folded into '{fused}' (a parametrization, weight_norm or pruning was "
            "removed): the fused weight is a new weight that nothing protects. Fold before consolidating; or "
            f"release() these names and consolidate the old tasks again, which protects '{fused}'"
        )


def facts_of(
    options: Settings,
    parameters: Mapping[str, Tensor],
    store: BasisStore,
    *,
    task: str | None = None,
    digests: bool = False,
) -> Iterator[tuple[str, str]]:
    """Yield pairs (what, value) in a fixed order: options, tasks, parameters, bases.

    With `digests` every byte of bases and anchors counts (a file that was just loaded), otherwise fates and ranks.
    """
    for key, value in vars(options).items():
        yield f"option {key}", repr(value)
    if task is not None:
        yield "the name of this task", repr(task)
    yield "the consolidated tasks", repr([record["name"] for record in store.tasks])
    for name, parameter in parameters.items():
        yield f"parameter '{name}'", f"{list(parameter.shape)} {parameter.dtype}"
    for name in sorted(store):
        yield f"the basis of '{name}'", _described(store[name], digests)


def _described(basis: Basis, digests: bool) -> str:
    sides = []
    for side, subspace in sorted(basis.subspaces.items()):
        marks = f" {digest(subspace.basis)[:16]} {digest(subspace.anchor)[:16]}" if digests else ""
        sides.append(f"{side} rank {list(subspace.ranks)}{marks}")
    return f"{basis.fate.value} {'; '.join(sides)}".strip()
