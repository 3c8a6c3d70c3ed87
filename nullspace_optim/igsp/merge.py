"""Merging: where a task's routing is the same for every sample its LoRA experts become part of the layer's weight.

`W + s sum_e g_e B_e A_e` needs a linear layer (`IGSP(target_modules="*.c_fc")`, not the default ``"*.mlp"``, whose
experts stand beside a whole block), LoRA experts, and gates `g` that do not depend on the sample: one expert alone,
router rows that differ by a constant only, or routing that was the same for all samples of a loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .moe import router
from .moe.experts import merge_into
from .moe.layer import ExpertLayer, TaskRouter

SAME = 1e-6  # how far gates may lie apart over a loader and still be the same


@dataclass(frozen=True)
class Merged:
    """The result of `merge_experts`.

    `weights` `[o, d]` by parameter name: put into a plain copy of the model (`load_state_dict(..., strict=False)`) they
    do there what backbone and experts do together. `gates` by layer, one for each stored expert. `routed`: layers that
    go on needing their experts, and why.
    """

    task: str
    weights: Mapping[str, Tensor]
    gates: Mapping[str, tuple[float, ...]]
    routed: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"task '{self.task}': experts of {len(self.weights)} layers merged, {len(self.routed)} layers route"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.routed.items())])


def merge(layers: list[ExpertLayer], model: nn.Module, task: str, number: int, seen: dict[str, Tensor]) -> Merged:
    """Merge what can be merged of the `number`-th task; `seen` are gate inputs `[n, d + 1]` by layer, where known."""
    weights: dict[str, Tensor] = {}
    gates: dict[str, tuple[float, ...]] = {}
    routed: dict[str, str] = {}
    for layer in layers:
        found = _gates(layer, number, seen.get(layer.name))
        module = model.get_submodule(layer.name)
        if not isinstance(module, nn.Linear):
            routed[layer.name] = f"{type(module).__name__} is not a linear layer"
        elif layer.options.kind != "lora":
            routed[layer.name] = "bottleneck experts are not linear"
        elif found is None:
            routed[layer.name] = "its gates depend on the sample"
        else:
            weights[f"{layer.name}.weight"] = merge_into(module.weight, layer.history, found, layer.options.scale)
            gates[layer.name] = tuple(found.tolist())
    return Merged(task, weights, gates, routed)


@torch.no_grad()
def _gates(layer: ExpertLayer, number: int, seen: Tensor | None) -> Tensor | None:
    """Return the gates `[H]` of all stored experts, None if they depend on the sample."""
    record = layer.record(number)
    if not len(record.experts):
        return record.weight.new_zeros(layer.size)
    constant = router.constant(layer.widths[0], layer.options.gate_scale)
    inputs = _any_input(record, constant) if seen is None else seen
    if inputs is None:
        return None
    choice = router.top_k(router.logits(inputs, record.weight), layer.options.top_k)
    found = router.dense(router.RoutingChoice(record.experts[choice.experts], choice.gates), layer.size)
    if float((found.amax(dim=0) - found.amin(dim=0)).max()) > SAME:
        return None
    return found.mean(dim=0)


def _any_input(record: TaskRouter, constant: float) -> Tensor | None:
    """Return a gate input `[1, d + 1]` that stands for all, None if there is none.

    Without samples only routers whose rows agree in everything but the constant are the same for all inputs.
    """
    rows = record.weight[:, :-1]
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        return None
    return torch.cat([rows.new_zeros(1, rows.shape[1]), rows.new_full((1, 1), constant)], dim=1)
