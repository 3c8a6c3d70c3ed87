"""A new task's LoRA outside what old tasks used: InfLoRA, KeepLoRA and SplitLoRA on PEFT models.

A LoRA adds `c B A x` to a layer, with `A` `[r, d]` and `B` `[m, r]`. If `A U = 0` for the stored directions `U`
`[d, k]` of the layer's inputs, inputs within their span never see the LoRA, whatever `B` becomes. So a task begins by
writing the last LoRA into the layer, giving `A` new rows outside `U` and setting `B` to zero (the outputs stay);
`A U = 0` is then the anchor that every step keeps, and `B` is free. To freeze `A` as published, give it a learning rate
of zero: it must stay in the optimizer for its inputs to be seen by `consolidate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..covariance.second_moment import SecondMoment
from ..errors import OptionError
from ..model.names import names_by_identity
from ..optimizer.optimizer import NullSpaceOptimizer
from ..subspace.linalg import eigh
from .low_rank import summed_gradients


@torch.no_grad()
def begin_lora(optimizer: NullSpaceOptimizer, rows: Mapping[str, Tensor]) -> None:
    """Begin a task: write each LoRA into its layer, give `A` its new `rows` `[r, d]`, by parameter name, and zero `B`.

    Outputs stay as they are. What is stored of `B` is given up, since old inputs do not reach it any more; `A` keeps
    its bases, with anchors of (nearly) zero.

    Raises:
        OptionError: a name is not a PEFT LoRA's `A`, or its rows do not have its shape.
        StaleAnchorError: weights were edited before.
    """
    layers = {name: (layer, adapter) for name, layer, adapter in lora_layers(optimizer.model)}
    for name, new in rows.items():
        if name not in layers:
            raise OptionError(f"begin_lora: no LoRA 'A' named '{name}'; there are: {', '.join(list(layers)[:5])}, ...")
        layer, adapter = layers[name]
        if layer.lora_A[adapter].weight.shape != new.shape:
            raise OptionError(
                f"begin_lora: rows {tuple(new.shape)} for '{name}' {tuple(layer.lora_A[adapter].weight.shape)}"
            )
    optimizer._core.protection.check_anchors()
    for name, new in rows.items():
        layer, adapter = layers[name]
        base = layer.get_base_layer().weight
        base.add_(layer.get_delta_weight(adapter).to(base.dtype))
        layer.lora_A[adapter].weight.copy_(new)
        layer.lora_B[adapter].weight.zero_()
        other = name.replace("lora_A", "lora_B")
        if other in optimizer.bases:
            optimizer.release(other)
    optimizer.reanchor()


@torch.no_grad()
def inflora_rows(
    optimizer: NullSpaceOptimizer, moments: Mapping[str, SecondMoment], scale: float = 1 / math.sqrt(3)
) -> dict[str, Tensor]:
    """Return InfLoRA's `A` `[r, d]` by name: the new task's leading directions outside the stored ones, times `scale`.

    `moments` are `optimizer.measure(loader)` of the new task, before it is trained (InfLoRA, section 3.3).
    """
    found = {}
    for name, layer, adapter in lora_layers(optimizer.model):
        if name in moments:
            stored = _stored(optimizer, name, layer.lora_A[adapter].weight)
            moment = moments[name].matrix[0].double()
            outside = moment - stored @ (stored.mT @ moment)
            found[name] = _leading(outside @ outside.mT, layer.lora_A[adapter].weight, stored, scale)
    return found


@torch.no_grad()
def lora_rows(optimizer: NullSpaceOptimizer, seed: int = 0) -> dict[str, Tensor]:
    """Return SplitLoRA's `A` `[r, d]` by name: random rows in the free directions, smaller with every task.

    `A = (N z)^T` with `N` the free directions and `z` normal, scaled to `||A_0|| / (t + 1)` after `t` tasks. `A_0` is
    PEFT's first `A`, whose entries are uniform in `+-1 / sqrt(d)`: `||A_0|| = sqrt(r / 3)` on average.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, layer, adapter in lora_layers(optimizer.model):
        weight = layer.lora_A[adapter].weight
        stored = _stored(optimizer, name, weight)
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        free = drawn - (drawn @ stored) @ stored.mT
        tasks = len(optimizer.bases[name].tasks) if name in optimizer.bases else 0
        size = math.sqrt(len(weight) / 3) / (tasks + 1)
        found[name] = (free * (size / float(free.norm().clamp(min=1e-30)))).to(weight.dtype)
    return found


def keeplora_rows(
    optimizer: NullSpaceOptimizer,
    loader: Iterable[Any],
    loss: Callable[[Any], Tensor],
    weight_energy: float = 0.85,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Return KeepLoRA's `A` `[r, d]` by name: the loss gradient's leading input directions outside what is known.

    `loss(batch)` runs the model on a batch of the new task; known are the stored directions and those that hold
    `weight_energy` of the frozen weight's own energy on the input side (0 for none of them). Gradients of the
    layers' frozen weights are summed over `loader`; the parameters and their gradients are left as they were.
    """
    layers = list(lora_layers(optimizer.model))
    bases = [layer.get_base_layer().weight for _, layer, _ in layers]
    found, sums = {}, summed_gradients(bases, loader, loss)
    with torch.no_grad():
        for (name, layer, adapter), base, gradient in zip(layers, bases, sums, strict=True):
            weight = layer.lora_A[adapter].weight
            known = torch.cat([_stored(optimizer, name, weight), _leading_inputs(base, weight_energy)], dim=1)
            known = torch.linalg.svd(known, full_matrices=False)[0] if known.shape[1] else known
            outside = gradient - (gradient @ known) @ known.mT
            found[name] = _leading(outside.mT @ outside, weight, known, scale)
    return found


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield the name of each active linear LoRA's `A`, its PEFT layer and the adapter's name."""
    names = names_by_identity(model)
    for module in model.modules():
        pairs: Any = getattr(module, "lora_A", None)
        if isinstance(pairs, nn.ModuleDict) and hasattr(module, "get_delta_weight"):
            for adapter in getattr(module, "active_adapters", []):
                if adapter in pairs and isinstance(pairs[adapter], nn.Linear):
                    yield names[id(pairs[adapter].weight)], module, adapter


def _stored(optimizer: NullSpaceOptimizer, name: str, weight: Tensor) -> Tensor:
    """Return the stored directions `[d, k]` of the inputs of `A`, float64."""
    subspace = optimizer.bases[name].subspaces.get("right") if name in optimizer.bases else None
    if subspace is None:
        return weight.new_zeros(weight.shape[1], 0, dtype=torch.float64)
    return subspace.basis[0].double()


def _leading(square: Tensor, weight: Tensor, known: Tensor, scale: float) -> Tensor:
    """Return the leading eigenvectors of `square` `[d, d]` as rows `[r, d]`, outside `known` to rounding."""
    vectors = eigh((square + square.mT)[None] / 2)[1][0][:, : weight.shape[0]]
    vectors = vectors - known @ (known.mT @ vectors)
    return (scale * vectors.mT).to(weight.dtype)


def _leading_inputs(weight: Tensor, energy: float) -> Tensor:
    """Return the input directions `[d, k]` that hold `energy` of a weight's own energy, float64."""
    if energy <= 0:
        return weight.new_zeros(weight.shape[1], 0, dtype=torch.float64)
    _, singular, inputs = torch.linalg.svd(weight.double(), full_matrices=False)
    reached = singular.square().cumsum(0) / singular.square().sum()
    leading: Tensor = inputs[: int((reached < energy).sum()) + 1].mT
    return leading
