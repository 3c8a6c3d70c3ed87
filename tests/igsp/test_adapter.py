"""`save_peft_adapter`: PEFT computes what the experts do, and what no LoRA can do is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from synthetic import small_llama
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import IGSP, FixedRank, NullSpaceOptimizer
from nullspace_optim.errors import OptionError
from nullspace_optim.igsp import save_peft_adapter

SINGLE: dict[str, Any] = {"rank": 3, "candidates": 1, "cap": 6, "window": 2, "on_cap": "prune", "lr": 3e-2}


def texts(seed: int) -> Tensor:
    return torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(seed))


def trained(model: Any, tasks: tuple[str, ...] = ("law",), **options: Any) -> NullSpaceOptimizer:
    mode = IGSP(**{"target_modules": ["q_proj", "down_proj"], **SINGLE, **options})
    opt: Any = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode)
    opt.held = model
    for number, task in enumerate(tasks):
        for step in range(15):
            ids = texts(10 * number + step % 3)
            opt.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            opt.step()
        opt.consolidate([{"input_ids": texts(10 * number)}], name=task, progress=False)
    return opt


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=texts(99)).logits


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"target_modules": "all-linear"}, {"router": "shared"}])
def test_peft_computes_what_a_task_of_single_experts_does(options: dict[str, Any], tmp_path: Path) -> None:
    model, backbone = small_llama(), small_llama()
    opt = trained(model, **options)
    save_peft_adapter(opt, "law", tmp_path)
    with opt.task("law"):
        expected = logits(model)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path)
    assert float((expected - logits(backbone)).norm() / expected.norm()) > 0.05
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


class Nested(nn.Module):
    """A layer whose name is the end of another one's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"fc": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["fc"](self.fc(x).tanh())


def nested(**options: Any) -> tuple[Nested, NullSpaceOptimizer]:
    torch.manual_seed(0)
    model = Nested()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(**{**SINGLE, **options}))
    for step in range(10):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x) - 1).square().mean().backward()
        opt.step()
    opt.consolidate([torch.randn(6, 8)], name="one", progress=False)
    return model, opt


def test_a_layer_whose_name_ends_like_anothers_is_adapted_alone(tmp_path: Path) -> None:
    model, opt = nested(target_modules="fc")
    save_peft_adapter(opt, "one", tmp_path)
    torch.manual_seed(0)
    adapted = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    assert not isinstance(adapted.base_model.model.inner["fc"], peft.tuners.lora.LoraLayer)
    x = torch.randn(5, 8)
    with torch.no_grad(), opt.task("one"):
        torch.testing.assert_close(adapted(x), model(x), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["target_modules"] == "fc"


def test_routing_by_inputs_is_refused_with_the_layers(tmp_path: Path) -> None:
    opt = trained(small_llama(), candidates=2, on_cap="keep")
    message = r"task 'law' routes by its inputs in 'model\.layers\.0\.self_attn\.q_proj' \(2 experts\).*candidates=1"
    with pytest.raises(OptionError, match=message):
        save_peft_adapter(opt, "law", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_later_task_is_written_where_one_expert_is_left_and_else_refused(tmp_path: Path) -> None:
    model = small_llama()
    opt = trained(model, ("law", "code"), on_cap="keep")
    save_peft_adapter(opt, "law", tmp_path)
    with opt.task("law"):
        torch.testing.assert_close(
            logits(peft.PeftModel.from_pretrained(small_llama(), tmp_path)), logits(model), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(OptionError, match=r"'code' routes by its inputs in .*\(2 experts\)"):
        save_peft_adapter(opt, "code", tmp_path)


def test_what_is_no_lora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no finished task of this name; finished: 'law'"):
        save_peft_adapter(trained(small_llama()), "birds", tmp_path)
    with pytest.raises(OptionError, match=r"beside whole blocks, 'model\.layers\.0\.mlp', 'model\.layers\.1\.mlp'"):
        save_peft_adapter(trained(small_llama(), target_modules=["mlp"]), "law", tmp_path)
    with pytest.raises(OptionError, match=r"kind 'bottleneck' have an activation"):
        save_peft_adapter(trained(small_llama(), kind="bottleneck"), "law", tmp_path)
    plain = nn.Linear(4, 4)
    with pytest.raises(OptionError, match="mode"):
        save_peft_adapter(NullSpaceOptimizer(AdamW(plain.parameters()), plain, policy=FixedRank(1)), "law", tmp_path)
    assert not list(tmp_path.iterdir())
