"""`target_modules=` selects what PEFT selects; a language model and a vision transformer learn two domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from synthetic import small_llama
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from nullspace_optim import IGSP, NullSpaceOptimizer
from nullspace_optim.errors import OptionError
from nullspace_optim.igsp import save_peft_adapter

SMALL: dict[str, Any] = {"rank": 4, "candidates": 2, "cap": 20, "window": 4, "on_cap": "prune", "lr": 1e-2}


def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)


def by_peft(model: nn.Module, target_modules: Any) -> list[str]:
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=target_modules, r=2))
    found = [n for n, m in adapted.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return [name.replace("_orig_mod.", "") for name in found]


@pytest.mark.parametrize(
    "target_modules",
    [
        ["q_proj", "v_proj"],
        ("1.self_attn.o_proj", "model.layers.0.mlp.up_proj"),
        r"model\.layers\.\d+\.mlp\.(gate|down)_proj",
        r".*\.self_attn\..*",
        ["lm_head", "k_proj"],
        "all-linear",
    ],
)
def test_the_layers_are_those_that_peft_adapts(target_modules: Any) -> None:
    model = small_llama(0.3)
    opt = NullSpaceOptimizer(AdamW(model.parameters()), model, mode=IGSP(target_modules=target_modules, **SMALL))
    found = list(opt.status().converged)
    assert found == by_peft(
        small_llama(0.3), list(target_modules) if isinstance(target_modules, tuple) else target_modules
    )
    assert len(found) >= 2


def sentences(domain: int, seed: int, count: int = 8) -> Tensor:
    """Return token sequences `[n, 12]` of one domain: words 0..23 or 24..47, each followed by a word of its own."""
    generator = torch.Generator().manual_seed(100 * domain + seed)
    word = torch.randint(0, 24, (count, 1), generator=generator)
    follower = torch.randperm(24, generator=torch.Generator().manual_seed(domain))
    words = [word]
    for _ in range(11):
        words.append(follower[words[-1]])
    return torch.cat(words, dim=1) + 24 * domain


def test_a_llama_learns_two_domains_of_text() -> None:
    model = small_llama(0.3)
    keys = list(model.state_dict())
    mode = IGSP(target_modules=["q_proj", "v_proj", "down_proj"], **SMALL)
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode)

    def loss(domain: int) -> Tensor:
        ids = sentences(domain, 999, 32)
        with torch.no_grad(), opt.task(f"domain {domain}"):
            return model(input_ids=ids, labels=ids).loss

    untrained, learned = [float(loss(domain)) for domain in (0, 1)], []
    for domain in (0, 1):
        for step in range(60):
            ids = sentences(domain, step)
            opt.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            opt.step()
        assert opt.status().phase == 2
        batches = [{"input_ids": sentences(domain, 500 + i)} for i in range(2)]
        report = opt.consolidate(batches, name=f"domain {domain}", progress=False)
        assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["q_proj", "v_proj", "down_proj"] * 2
        learned.append(loss(domain))
    assert all(float(after) < 0.5 * before for before, after in zip(untrained, learned, strict=True))
    assert torch.equal(loss(0), learned[0]), "the first domain by its router is what it was"
    assert list(model.state_dict()) == keys


def test_a_vision_transformer_learns_two_sets_of_images() -> None:
    model = vit()
    mode = IGSP(target_modules=r"blocks\.\d+\.(attn\.qkv|mlp\.fc[12])", **SMALL)
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode)
    patterns = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def images(task: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * task + seed)
        labels = torch.randint(0, 4, (8,), generator=generator)
        return patterns[task, labels] + 0.3 * torch.randn(8, 3, 32, 32, generator=generator), labels

    def predicted(task: int) -> Tensor:
        with torch.no_grad(), opt.task(f"set {task}"):
            return model(images(task, 999)[0])

    model.eval()
    kept = []
    for task in (0, 1):
        for step in range(40):
            x, labels = images(task, step)
            opt.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            opt.step()
        report = opt.consolidate([images(task, 500)[0]], name=f"set {task}", progress=False)
        assert len(report.layers) == 6
        kept.append(predicted(task))
        assert float((kept[task].argmax(1) == images(task, 999)[1]).float().mean()) >= 0.75
    assert torch.equal(predicted(0), kept[0])


def small_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("target_modules", [["c_attn", "c_proj"], "all-linear"])
def test_transposed_linear_layers_of_gpt2_are_those_that_peft_adapts(target_modules: Any) -> None:
    model = small_gpt2()
    opt = NullSpaceOptimizer(AdamW(model.parameters()), model, mode=IGSP(target_modules=target_modules, **SMALL))
    assert list(opt.status().converged) == by_peft(small_gpt2(), target_modules)
    widths = {layer.name.partition("h.0.")[2]: layer.widths for layer in opt.mode.experts.layers}
    assert widths["attn.c_attn"] == (32, 96) and widths["mlp.c_proj"] == (128, 32)


@pytest.mark.parametrize("target_modules", [["mlp"], ["c_attn", "c_fc"]])
def test_gpt2_learns_and_keeps_a_domain_of_text(target_modules: list[str], tmp_path: Path) -> None:
    model = small_gpt2()
    mode = IGSP(target_modules=target_modules, **{**SMALL, "candidates": 1})
    opt, kept = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode), None
    for domain in (0, 1):
        first = float(model(input_ids=sentences(domain, 0), labels=sentences(domain, 0)).loss.detach())
        for step in range(60):
            ids = sentences(domain, step)
            opt.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            opt.step()
        assert float(loss.detach()) < 0.7 * first
        opt.consolidate([{"input_ids": sentences(domain, 500)}], name=f"domain {domain}", progress=False)
        with torch.no_grad(), opt.task("domain 0"):
            found = model(input_ids=sentences(0, 999)).logits
        assert kept is None or torch.equal(found, kept)
        kept = found
    if target_modules != ["mlp"]:
        save_peft_adapter(opt, "domain 0", tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        with torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(small_gpt2(), tmp_path)(input_ids=sentences(0, 999)).logits
        torch.testing.assert_close(loaded, kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_proj", "vproj"], r"'vproj' matches no layer of LlamaForCausalLM; the nearest names are: .*'v_proj'"),
        (r"model\.layers\.0\.self_atn\.q_proj", r"the nearest names are: .*'model\.layers\.0\.self_attn\.q_proj'"),
        (["zzz"], r"'zzz' matches no layer .*its linear layers begin with: 'model\.layers\.0\.self_attn\.q_proj'"),
        (["_proj"], r"'_proj' matches no layer"),
        ("q_proj", r"'q_proj' matches no layer .*'q_proj'.*Give a list of names"),
        ("*.mlp", r"no regular expression.*for a glob pattern give a list, \['mlp'\]"),
        (["input_layernorm"], r"'model\.layers\.0\.input_layernorm' \(LlamaRMSNorm\) holds no torch\.nn\.Linear"),
    ],
)
@pytest.mark.fault(113)
def test_a_name_that_matches_nothing_is_one_error_with_the_nearest_names(target_modules: Any, message: str) -> None:
    model = small_llama(0.3)
    with pytest.raises(OptionError, match=message):
        NullSpaceOptimizer(AdamW(model.parameters()), model, mode=IGSP(target_modules=target_modules, **SMALL))
    assert not hasattr(model, "igsp")
