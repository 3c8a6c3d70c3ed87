"""Experts of one task as a LoRA adapter that PEFT loads, where its routing is the same for all inputs."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ..distributed.failures import raise_on_all_ranks
from ..distributed.group import rank
from ..errors import OptionError
from ..optimizer.optimizer import NullSpaceOptimizer
from .mode import IgspMode
from .moe.layer import ExpertLayer
from .moe.sites import linear_widths

PREFIX = "base_model.model."


def save_peft_adapter(optimizer: NullSpaceOptimizer, task: str, folder: str | PathLike[str]) -> None:
    """Write the experts of a finished `task` to `folder`: `adapter_config.json` and `adapter_model.safetensors`.

    `PeftModel.from_pretrained(backbone, folder)` then computes what the model does inside ``optimizer.task(task)``.
    That is a plain LoRA where the task uses at most one expert in each layer: the softmax over one logit is 1. All
    ranks call it, rank 0 writes.

    Raises:
        OptionError: the optimizer has no experts or the task no router; or, with the names of the layers, routing that
            depends on the input, experts with an activation, or experts beside something other than a linear layer.

    Example:
        >>> save_peft_adapter(opt, "birds", "birds-lora")   # doctest: +SKIP
        >>> PeftModel.from_pretrained(backbone, "birds-lora")   # doctest: +SKIP
    """
    with raise_on_all_ranks():
        layers, number = _layers_of(optimizer, task)
        used = {layer: layer.record(number).experts.tolist() for layer in layers}
        _refuse(optimizer.model, used, task)
        if rank() == 0:
            single = {layer: experts[0] for layer, experts in used.items() if experts}
            target, tensors = Path(folder), _tensors(single)
            target.mkdir(parents=True, exist_ok=True)
            save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
            text = json.dumps(_describe(optimizer.model, list(single)), indent=2, sort_keys=True)
            (target / "adapter_config.json").write_text(text + "\n", "utf-8")


def _layers_of(optimizer: NullSpaceOptimizer, task: str) -> tuple[list[ExpertLayer], int]:
    """Return all layers with experts and the number of the finished `task`."""
    mode = optimizer.mode
    if not isinstance(mode, IgspMode):
        raise OptionError(f"save_peft_adapter: {mode!r} has no experts; use mode='igsp'")
    tasks = mode.experts.scope.tasks
    if task not in tasks:
        known = ", ".join(map(repr, tasks)) or "none"
        raise OptionError(f"save_peft_adapter(task={task!r}): no finished task of this name; finished: {known}")
    if mode.options.kind != "lora":
        raise OptionError(
            f"save_peft_adapter: experts of kind {mode.options.kind!r} have an activation and biases, so they are no "
            "LoRA; train with IGSP(kind='lora'), or deploy by opt.save and opt.load"
        )
    return mode.experts.layers, tasks.index(task)


def _refuse(model: nn.Module, used: dict[ExpertLayer, list[int]], task: str) -> None:
    """Refuse layers that are not a linear map and its LoRA, by name."""
    routed = [f"'{layer.name}' ({len(experts)} experts)" for layer, experts in used.items() if len(experts) > 1]
    if routed:
        raise OptionError(
            f"save_peft_adapter: task '{task}' routes by its inputs in {_listed(routed)}, which no LoRA can do: one "
            "expert a layer is needed (IGSP(candidates=1), and pruning or a first task that leaves no other); "
            "otherwise deploy by opt.save and opt.load"
        )
    blocks = [layer.name for layer, experts in used.items() if experts]
    blocks = [f"'{name}'" for name in blocks if not linear_widths(model.get_submodule(name))]
    if blocks:
        raise OptionError(
            f"save_peft_adapter: the experts stand beside whole blocks, {_listed(blocks)}, and PEFT adapts single "
            "linear layers: choose these with IGSP(target_modules=...)"
        )
    if not any(used.values()):
        raise OptionError(f"save_peft_adapter: task '{task}' uses no expert in any layer; its model is the backbone")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more layers" if len(names) > 5 else "")


def _tensors(single: dict[ExpertLayer, int]) -> dict[str, Tensor]:
    """Return `A` `[r, d]` and `B` `[o, r]` of the expert of each layer under PEFT's keys; `B` holds the scale."""
    tensors = {}
    for layer, expert in single.items():
        down, up = (layer.history[part][expert].detach().cpu() for part in ("down", "up"))
        tensors[f"{PREFIX}{layer.name}.lora_A.weight"] = down.contiguous()
        tensors[f"{PREFIX}{layer.name}.lora_B.weight"] = (layer.options.scale * up).mT.contiguous()
    return tensors


def _describe(model: nn.Module, layers: list[ExpertLayer]) -> dict[str, object]:
    """Return PEFT's configuration; only fields that every version of PEFT knows."""
    names, width = [layer.name for layer in layers], layers[0].options.width
    others = [name for name, _ in model.named_modules() if name not in names]
    path = getattr(model, "name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": path if isinstance(path, str) and path else None,
        "inference_mode": True,
        "r": width,
        "lora_alpha": width,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not all(isinstance(model.get_submodule(name), nn.Linear) for name in names),
        "target_modules": _targets(names, others),
    }


def _targets(names: list[str], others: list[str]) -> list[str] | str:
    """Return `names` as a list, or as a regular expression where PEFT would take another module for one of them."""
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(name.replace(".", r"\.") for name in names)
    return names
