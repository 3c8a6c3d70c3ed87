"""Find the module that owns the wrapped parameters, and feed a batch to it."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import ModelNotFoundError


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module inside DDP, DataParallel and `torch.compile` wrappers."""
    while True:
        inner = None
        if any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__):
            inner = module._modules.get("_orig_mod")
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


def unfinished(model: nn.Module) -> str | None:
    """Return what still changes a weight of `model`, and the way out (see `methods.begin_turn`); `None` if nothing."""
    for name, module in model.named_modules():
        if isinstance(way := getattr(module, "unfinished", None), str):
            return f"'{name}' still changes a weight, {{}}: {way} first"
    return None


def find_model(parameters: Iterable[Tensor]) -> nn.Module:
    """Return the smallest live module whose parameters contain all of `parameters`.

    Smallest means fewest parameters, after `unwrap`; modules without a forward of their own come last, and of nested
    modules with
    the same parameters the outermost is taken.

    Raises:
        ModelNotFoundError: no module owns all of them, or several unrelated ones do.
    """
    wanted = {id(p) for p in parameters}
    owners: dict[int, nn.Module] = {}
    nearest: list[tuple[int, str]] = []
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), nn.Module) or "_modules" not in candidate.__dict__:
            continue
        held = wanted & {id(p) for p in candidate.parameters()}
        if held == wanted:
            module = unwrap(candidate)
            owners[id(module)] = module
        elif held:
            nearest.append((len(held), type(candidate).__name__))
    if not owners:
        raise ModelNotFoundError(_nobody(len(wanted), nearest))
    return _chosen(list(owners.values()))


def _chosen(owners: list[nn.Module]) -> nn.Module:
    """Return the outermost of the owners with a forward and the fewest parameters.

    Outermost, because a wrapper without parameters of its own (a normalisation, an output head of functions) decides
    what reaches
    the model inside: feeding the inner one raw batches would protect wrong directions in silence.
    """
    written = [m for m in owners if not isinstance(m, torch.fx.GraphModule)] or owners  # torch.compile makes the others
    able = [m for m in written if getattr(type(m), "forward", nn.Module.forward) is not nn.Module.forward] or written
    fewest = min(_count(module) for module in able)
    smallest = [module for module in able if _count(module) == fewest]
    inside = {id(inner) for module in smallest for inner in module.modules() if inner is not module}
    outermost = [module for module in smallest if id(module) not in inside]
    if len(outermost) > 1:
        listing = ", ".join(f"{type(module).__name__} ({fewest} parameters)" for module in outermost)
        raise ModelNotFoundError(
            f"several live modules own all wrapped parameters: {listing}; "
            "say which one: NullSpaceOptimizer(base, model=...)"
        )
    return outermost[0]


def _count(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def _nobody(count: int, nearest: list[tuple[int, str]]) -> str:
    best = ", ".join(f"{name} owns {n}" for n, name in sorted(nearest, reverse=True)[:3]) or "no live module owns any"
    return (
        f"no live torch.nn.Module owns all {count} wrapped parameters ({best}); "
        "pass the module: NullSpaceOptimizer(base, model=...)"
    )
