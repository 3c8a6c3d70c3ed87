"""DeepSpeed flattens matrices: refused by name, whichever way it comes. Stand-ins have its names and attributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from training import mlp

from nullspace_optim import FixedRank, NullSpaceOptimizer
from nullspace_optim.errors import OptionError

pytestmark = pytest.mark.fault(36, 110)


def deepspeed_class(module: str, name: str, *parents: type) -> Any:
    return type(name, parents or (object,), {"__module__": module})


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
        ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
        ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"),
        ("deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer"),
    ],
)
def test_its_optimizers_are_refused_by_name_with_the_way_out(module: str, name: str) -> None:
    with pytest.raises(OptionError, match=rf"{name} of DeepSpeed flattens.*stage 0.*fully_shard"):
        NullSpaceOptimizer(deepspeed_class(module, name)())


def test_parameters_of_stage_3_are_refused() -> None:
    """`zero.Init` leaves empty parameters that carry a `ds_id`."""
    model = mlp(12, 8, 2)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match=r"ZeRO stage 3.*stage 0.*fully_shard"):
        NullSpaceOptimizer(AdamW(model.parameters()))


def test_an_ordinary_optimizer_of_deepspeed_is_accepted() -> None:
    fused = deepspeed_class("deepspeed.ops.adam.fused_adam", "FusedAdam", AdamW)
    model = mlp(12, 8, 2)
    assert isinstance(NullSpaceOptimizer(fused(model.parameters()), model), Optimizer)


def flatten(base: Optimizer) -> None:
    """What `deepspeed.initialize(optimizer=...)` does to the optimizer it is given (stages 1 and 2)."""
    for group in base.param_groups:
        flat: Tensor = torch.cat([p.detach().reshape(-1) for p in group["params"]])
        group["params"] = [nn.Parameter(flat)]


def test_an_optimizer_flattened_after_a_consolidation_stops_at_its_next_step() -> None:
    model = mlp(12, 8, 2)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=FixedRank(3))
    optimizer.consolidate([torch.randn(16, 12)], progress=False)
    flatten(optimizer)
    with pytest.raises(OptionError, match=r"1 tensors none of which Sequential holds.*ZeRO.*fully_shard"):
        optimizer.step()


def test_an_optimizer_flattened_before_a_consolidation_is_refused_there() -> None:
    model = mlp(12, 8, 2)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model)
    flatten(optimizer)
    optimizer.step()
    with pytest.raises(OptionError, match=r"none of which Sequential holds.*ZeRO"):
        optimizer.consolidate([torch.randn(16, 12)], progress=False)


def test_training_a_new_head_alone_is_no_reason_to_refuse() -> None:
    model = mlp(12, 8, 2)
    model.add_module("head", nn.Linear(2, 2))
    optimizer = NullSpaceOptimizer(AdamW(model[:3].parameters()), model, policy=FixedRank(1))
    optimizer.consolidate([torch.randn(16, 12)], forward=model[:3], progress=False)
    optimizer.param_groups[0]["params"] = list(model.head.parameters())
    model.head(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert optimizer.verify().ok
