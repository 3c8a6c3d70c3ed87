"""Find the module that owns the wrapped parameters, and feed a batch to it."""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import BatchError, ModelNotFoundError

Forward = Callable[[Any], Any]


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module inside DDP, DataParallel and `torch.compile` wrappers."""
    while True:
        inner = module._modules.get("_orig_mod")
        if inner is None and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


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


def feeder(model: nn.Module, forward: Forward | None = None) -> Forward:
    """Return a callable that runs `model` on one batch.

    With `forward` given it decides alone. Otherwise: a tensor is the only argument; a mapping (or dataclass) gives
    the keys that `model.forward` accepts; a tuple or list gives its first item, or as many leading items as `forward`
    has required positional parameters. Tensors are moved to the device of the model's first parameter.
    """
    if forward is not None:
        return forward
    accepted = inspect.signature(model.forward).parameters
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run(batch: Any) -> Any:
        args, kwargs = _arguments(batch, accepted)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        return model(*args, **kwargs)

    return run


def _arguments(batch: Any, accepted: Mapping[str, inspect.Parameter]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split `batch` into positional and keyword arguments of a forward with parameters `accepted`."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        return (), _keywords(batch, accepted)
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch):
        required = [
            p
            for p in accepted.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        leading = tuple(batch[: max(1, len(required))])
        if len(required) <= 1 and isinstance(leading[0], (Mapping, tuple, list)):
            return _arguments(leading[0], accepted)
        return leading, {}
    raise BatchError(
        f"cannot feed a batch of type {type(batch).__name__} to the model; "
        "pass forward=, a callable that takes the batch and runs the model"
    )


def _keywords(batch: Mapping[Any, Any], accepted: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return {str(key): value for key, value in batch.items()}
    chosen = {str(key): value for key, value in batch.items() if key in accepted}
    if not chosen:
        raise BatchError(
            f"the batch has the keys {sorted(map(str, batch))}, the model's forward accepts {sorted(accepted)}; "
            "pass forward=, a callable that takes the batch and runs the model"
        )
    return chosen


class ClipForward:
    """`forward` for CLIP: images of every batch through one tower, the task's prompts through the other, once.

    Args:
        model: an open_clip model (`encode_image`, `encode_text`).
        tokens: tokenized prompts of the task, `[classes, context]`.
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._fed = False

    def restart(self) -> None:
        """Feed the prompts again with the next batch (a new pass begins)."""
        self._fed = False

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Return normalised `image_features` `[n, e]` and, on the first batch of a pass, `text_features` `[classes,
        e]`.
        """
        model: Any = self._model
        device = next(self._model.parameters()).device
        images = batch if isinstance(batch, Tensor) else batch[0]
        outputs = {"image_features": model.encode_image(images.to(device), normalize=True)}
        if not self._fed:
            outputs["text_features"] = model.encode_text(self._tokens.to(device), normalize=True)
            self._fed = True
        if hasattr(model, "logit_scale"):
            outputs["logit_scale"] = model.logit_scale.exp()
        return outputs


def clip_forward(model: nn.Module, tokens: Tensor) -> ClipForward:
    """Return the ready `forward=` of `consolidate` for an open_clip model and the task's prompts `tokens`."""
    return ClipForward(unwrap(model), tokens)
