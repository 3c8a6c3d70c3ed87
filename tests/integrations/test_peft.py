"""PEFT: LoRA adapters are protected like any layer; a learned prompt is used up by its task, a second one is free."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from training import relative_drift
from two_tasks import example, holding, same_weights

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank, Policy
from nullspace_optim.methods import declare_tokens
from nullspace_optim.policies import PEGP

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY, LENGTH, SENTENCES, RANK = 60, 4, 3, 32


def language_model(positions: int = 16) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=positions, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def sentences(task: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(task)
    tokens = torch.randint(20 * task, 20 * task + 20, (SENTENCES, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def with_lora() -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM")
    return peft.get_peft_model(language_model(), config)


def wrap(model: nn.Module, policy: Policy | None = None) -> NullSpaceOptimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    base = AdamW(trained, lr=3e-3, weight_decay=0.01)
    return NullSpaceOptimizer(base, model, policy=policy or NumericalRank())


def train(model: Any, optimizer: Any, task: int, steps: int = 15) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**sentences(task)).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def logits(model: Any) -> Tensor:
    return model(input_ids=sentences(0)["input_ids"]).logits


def test_lora_two_tasks_saved_and_resumed(tmp_path: Path) -> None:
    model = with_lora()
    optimizer = wrap(model)
    train(model, optimizer, 0)
    report = optimizer.consolidate([sentences(0)], progress=False)
    assert {row.fate for row in report.parameters} == {Fate.PROTECTED}
    buffer = io.BytesIO()
    torch.save({"adapter": peft.get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    other = with_lora()
    saved = torch.load(buffer, weights_only=True)
    peft.set_peft_model_state_dict(other, saved["adapter"])
    resumed = wrap(other)
    resumed.load_state_dict(saved["optimizer"])
    for its, one in ((model, optimizer), (other, resumed)):
        with holding(its, lambda its=its: logits(its), optimizer=lambda one=one: one):
            train(its, one, 1)
    assert same_weights(model, other)


def test_lora_basis_file_beside_the_adapter(tmp_path: Path) -> None:
    model = with_lora()
    optimizer = wrap(model)
    train(model, optimizer, 0)
    optimizer.consolidate([sentences(0)], progress=False)
    model.save_pretrained(tmp_path)
    optimizer.save(tmp_path / "bases.safetensors")
    other = peft.PeftModel.from_pretrained(language_model(), tmp_path, is_trainable=True)
    later = wrap(other)
    later.load(tmp_path / "bases.safetensors")
    with holding(other, lambda: logits(other), optimizer=lambda: later):
        train(other, later, 1)


def test_lora_without_protection_moves() -> None:
    """The control."""
    model = with_lora()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    train(model, optimizer, 0)
    then = logits(model).detach()
    train(model, optimizer, 1)
    assert relative_drift(logits(model).detach(), then) > 1e-2


def test_a_prompt_is_used_up_by_its_task_and_a_second_one_is_free() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(language_model(), config)
    optimizer = wrap(model)
    train(model, optimizer, 0)
    report = optimizer.consolidate([sentences(0)], progress=False)
    (row,) = report.parameters
    assert row.fate is Fate.FULL, "every row of the prompt was read"
    then, prompt = logits(model).detach(), next(p for p in model.parameters() if p.requires_grad)
    kept = prompt.detach().clone()
    train(model, optimizer, 1, steps=5)
    assert torch.equal(prompt, kept) and torch.equal(logits(model), then), (
        "the first prompt has nothing left to learn with"
    )

    torch.manual_seed(2)
    model.add_adapter("second", config)
    model.set_adapter("second")
    second = model.prompt_encoder["second"].embedding.weight
    optimizer.add_param_group({"params": [second]})
    begin = train(model, optimizer, 1, steps=1)
    assert train(model, optimizer, 1, steps=40) < begin
    report = optimizer.consolidate([sentences(1)], progress=False)
    assert optimizer.verify().worst == 0.0
    model.set_adapter("default")
    assert torch.equal(logits(model), then)


PROMPTS = 24


def with_prompt() -> Any:
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPTS)
    model = peft.get_peft_model(language_model(PROMPTS + LENGTH), config)
    declare_tokens(model)
    return model


def prompt_and(optimizer: NullSpaceOptimizer) -> Tensor:
    (basis,) = optimizer.bases.values()
    return optimizer._core.parameters[basis.name]


def test_prompt_tuning_two_tasks_saved_and_resumed_bitwise(tmp_path: Path) -> None:
    """A prompt whose rows are declared goes on learning: beside the old tokens and its own old rows (PEGP)."""
    model = with_prompt()
    optimizer = wrap(model, PEGP(0.5))
    train(model, optimizer, 0)
    (row,) = optimizer.consolidate([sentences(0)], progress=False).parameters
    assert row.fate is Fate.PROTECTED and 0 < row.rank < row.dimension
    train(model, optimizer, 1, steps=5)
    adapter = peft.get_peft_model_state_dict(model)
    torch.save({"adapter": adapter, "optimizer": optimizer.state_dict()}, tmp_path / "middle.pt")
    saved = torch.load(tmp_path / "middle.pt", weights_only=True)
    other = with_prompt()  # PEFT loads no prompt as trainable, so it is made anew and then filled
    peft.set_peft_model_state_dict(other, saved["adapter"])
    resumed = wrap(other, PEGP(0.5))
    resumed.load_state_dict(saved["optimizer"])
    kept = optimizer.bases[row.name].U
    for its, one in ((model, optimizer), (other, resumed)):
        prompt = prompt_and(one)
        then, before = prompt.detach() @ kept, prompt.detach().clone()
        begin, end = train(its, one, 1, steps=1), train(its, one, 1, steps=20)
        assert end < begin and relative_drift(prompt.detach(), before) > 1e-3
        assert relative_drift(prompt.detach() @ kept, then) <= 1e-5 and one.verify().ok
    assert torch.equal(prompt_and(optimizer), prompt_and(resumed))
    assert torch.equal(logits(model), logits(other))


def test_two_prompts_of_two_tasks_saved_and_resumed_bitwise(tmp_path: Path) -> None:
    """Without declared rows a prompt is full after its task: a second one learns, the first keeps every bit."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    def begin() -> tuple[Any, NullSpaceOptimizer]:
        torch.manual_seed(1)
        model = peft.get_peft_model(language_model(), config)
        return model, wrap(model)

    def second(model: Any, optimizer: NullSpaceOptimizer) -> None:
        torch.manual_seed(2)
        model.add_adapter("second", config)
        model.set_adapter("second")
        optimizer.add_param_group({"params": [model.prompt_encoder["second"].embedding.weight]})

    model, optimizer = begin()
    train(model, optimizer, 0)
    optimizer.consolidate([sentences(0)], progress=False)
    old = logits(model).detach()
    second(model, optimizer)
    train(model, optimizer, 1, steps=5)
    prompts = {name: encoder.embedding.weight.detach().clone() for name, encoder in model.prompt_encoder.items()}
    torch.save({"prompts": prompts, "optimizer": optimizer.state_dict()}, tmp_path / "middle.pt")
    saved = torch.load(tmp_path / "middle.pt", weights_only=True)
    other, resumed = begin()
    second(other, resumed)
    with torch.no_grad():
        for name, prompt in saved["prompts"].items():
            other.prompt_encoder[name].embedding.weight.copy_(prompt)
    resumed.load_state_dict(saved["optimizer"])
    for its, one in ((model, optimizer), (other, resumed)):
        train(its, one, 1, steps=10)
        assert one.verify().worst == 0.0
    for name in prompts:
        assert torch.equal(model.prompt_encoder[name].embedding.weight, other.prompt_encoder[name].embedding.weight)
    assert not torch.equal(model.prompt_encoder["second"].embedding.weight, prompts["second"])
    other.set_adapter("default")
    assert torch.equal(logits(other), old)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("peft.md"), "peft.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "adapter" / "bases.safetensors").is_file()
