"""Plans of joint biases, sketches, LoRA adapters, prompts and experts, and of a consolidation, against real runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import BATCH, Measured, agrees, counted
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import IGSP, FixedRank, NullSpaceOptimizer, SketchedCovariance, declare_tokens
from nullspace_optim.cli import main
from nullspace_optim.covariance.second_moment import SecondMoment
from nullspace_optim.covariance.sketch import FrequentDirections
from nullspace_optim.errors import OptionError
from nullspace_optim.planning.adapters import LORA, PROMPT, with_lora, with_prompt
from nullspace_optim.planning.architectures import Architecture, build
from nullspace_optim.planning.experts import places_of, predict_experts
from nullspace_optim.planning.predict import Conditions, by_rank, consolidation, predict
from nullspace_optim.planning.shapes import Moment
from nullspace_optim.planning.survey import survey

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """`[n, 24]` to `[n, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def of_net(batch: int, **options: Any) -> Any:
    with torch.device("meta"):
        model, x = Net(), torch.empty(batch, 24)
    return survey(model, lambda: model(x), batch=batch, **options)


@pytest.mark.parametrize("k", [4, 22, 41])
def test_a_joint_bias_is_one_more_input_and_agrees_with_its_measured_run(k: int) -> None:
    model = Net()
    real = Measured(model, torch.randn(64, 24), model, k, bias="joint")
    agrees(of_net(64, bias="joint"), real, k)


def test_a_consolidation_agrees_with_the_count_of_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole products, which a CPU cuts down to the lower triangle; no counter sees how eigenvectors are found."""
    monkeypatch.setattr(SecondMoment, "_one_by_one", lambda self, groups: False)
    model = Net()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=FixedRank(4), rows="all")
    with counted() as mode:
        optimizer.consolidate(list(torch.randn(16, 64, 24)), progress=False)
    cost = consolidation(of_net(64), Conditions(samples=1024))
    assert mode.get_total_flops() == pytest.approx(cost.forward_flops + cost.moment_flops, rel=0.15)


def test_bytes_of_a_sketch_are_those_of_a_real_one() -> None:
    real = FrequentDirections(2, 40, 8, dtype=torch.float32, device="cpu")
    held = real._buffer.nbytes + real.squares.nbytes
    assert Moment(2, 40, 100, sketched=8).bytes(4) == held
    found = of_net(64, sketch=SketchedCovariance(8, 30))
    assert [moment.sketched for moment in found.moments] == [0, 8, 8]
    assert consolidation(found).moments == 4 * (24 * 24 + 2 * 40 * 17)


def gpt2(folder: Path, tokens: int = 24) -> tuple[Any, Architecture, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=200, n_positions=64)
    config.save_pretrained(folder)
    model = transformers.GPT2LMHeadModel(config).eval()
    return model, build(str(folder), batch=BATCH, sequence=tokens), torch.randint(0, 90, (BATCH, tokens))


def test_lora_adapters_agree_with_their_measured_run(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, architecture, tokens = gpt2(tmp_path)
    peft.inject_adapter_in_model(peft.LoraConfig(r=6, target_modules=["c_attn", "c_fc"]), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = with_lora(architecture, 6, "*.c_[af]*.weight")
    assert "LoRA of rank 6 beside 4 layers" in adapted.name
    found = survey(adapted.model, adapted.run, batch=BATCH, trainable=LORA)
    agrees(found, Measured(model, tokens, lambda b: model(input_ids=b), 3), 3)
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_prompt_agrees_with_its_measured_run(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, architecture, tokens = gpt2(tmp_path)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)
    model = peft.get_peft_model(model, config).eval()
    declare_tokens(model)
    planned = with_prompt(architecture, 10, declare_tokens)
    found = survey(planned.model, planned.run, batch=BATCH, trainable=PROMPT)
    assert found.weights[0].shape == (10, 48) and found.moments[0].rows == BATCH * (24 + 10)
    agrees(found, Measured(model, tokens, lambda b: model(input_ids=b), 8), 8)


def test_models_that_take_no_adapters_are_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("timm")
    _, architecture, _ = gpt2(tmp_path)
    with pytest.raises(OptionError, match=r"matches 'nothing'; linear layers begin with: transformer\.h\.0"):
        with_lora(architecture, 4, "nothing")
    with pytest.raises(OptionError, match="rank 0"):
        with_lora(architecture, 0)
    with pytest.raises(OptionError, match="no language model"):
        with_prompt(build("test_vit", batch=1), 4, declare_tokens)
    with pytest.raises(OptionError, match="prompt of 0 tokens"):
        with_prompt(architecture, 0, declare_tokens)


def test_a_missing_peft_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(OptionError, match="pip install peft"):
        with_lora(Architecture("net", model, model, "", {}), 4)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_experts_agree_with_a_run_of_two_tasks(kind: Any) -> None:
    """With ``on_cap="keep"`` and no convergence every candidate survives."""
    options = IGSP(target_modules="layers.[02]", rank=4, candidates=2, kind=kind, cap=3, window=50, orthogonal="both")
    torch.manual_seed(0)
    model = Net()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=options)
    mode: Any = opt._core.mode
    for task in range(2):
        x = torch.randn(16, 24) + task
        for _ in range(5):
            opt.zero_grad()
            model(x).square().mean().backward()
            with counted() as counter:
                opt.step()
        trained, correction = mode.progress.trained, counter.get_total_flops()
        opt.consolidate([x], progress=False)
    with torch.device("meta"):
        meta, batch = Net(), torch.empty(16, 24)
    places = places_of(meta, lambda: meta(batch), options)
    cost = predict_experts(places, options, kept=2, tasks=2)
    bank = mode.experts
    assert (trained.first, trained.second) == cost.trainable and cost.candidates == 4
    assert sum(layer.size for layer in bank.layers) == cost.experts
    assert sum(v.nbytes for layer in bank.layers for v in layer.history.values()) == cost.frozen
    assert correction == pytest.approx(cost.step_flops, rel=0.15)  # a unit that never fires adds no direction
    assert sum(layer.inputs.nbytes + layer.outputs.nbytes for layer in bank.layers) == pytest.approx(
        cost.bases, rel=0.15
    )
    assert sum(v.nbytes for layer in bank.layers for r in layer.routers() for v in r.buffers()) == cost.routers
    before = predict_experts(places, options, kept=2, tasks=3)  # the third task has just begun
    with torch.no_grad():
        counts = []
        for name in (None, "no such task"):
            with opt.task(name) if name else torch.enable_grad(), counted() as counter:
                model(x)
            counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == before.forward_flops


def test_more_experts_than_candidates_are_refused() -> None:
    with pytest.raises(OptionError, match="kept=5"):
        predict_experts([], IGSP(), kept=5, tasks=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lora", "4", "--prompt", "4"], "--lora and --prompt"),
        (["--prompt", "4", "--trainable", "x*"], "leave --trainable out"),
        (["--sketch", "many"], "--sketch 'many'"),
        (["--sketch", "1"], "size=1"),
        (["--sketch", "8,9", "--policy", "SGP"], "needs whole second moments"),
        (["--mode", "IGSP(rank=0)"], "rank=0"),
        (["--mode", "magic"], "one of IGSP"),
        (["--mode", "IGSP(rank=5000)"], "IGSP(rank=5000): larger than the layer"),
        (["--vocabulary", "-5"], "rows_used=-5"),
        (["--mode", "igsp", "--tasks", "0"], "at least one task"),
        (["--mode", "IGSP(target_modules='no.such')"], "matches no layer"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line_and_exit_code_2(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    assert main(["plan", "--model", "test_vit", "--batch", "1", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_command_prints_plans_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    command = ["plan", "--model", "test_vit", "--batch", "2", "--mode", "IGSP(rank=4)", "--tasks", "3"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "4 candidates a layer and task" in text and "after 3 tasks" in text and "phase 2" in text
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["kept"]) == ["0", "1", "2", "3", "4"] and document["kept"]["0"]["frozen"] == 0
    architecture = build("test_vit", batch=2)
    places = places_of(architecture.model, architecture.run, IGSP(rank=4))
    assert document["kept"]["2"]["stored"] == predict_experts(places, IGSP(rank=4), 2, 3).stored


def test_the_command_prints_plans_of_sketches_and_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("peft")
    assert main(["plan", "--model", "test_vit", "--batch", "2", "--sketch", "8,32"]) == 0
    assert "are sketched by 8 rows" in capsys.readouterr().out
    assert main(["plan", "--model", "test_vit", "--batch", "2", "--lora", "4", "--policy", "KeepLoRA"]) == 0
    assert "begin_lora gives back" in capsys.readouterr().out
    assert main(["plan", "--model", "test_vit", "--batch", "2", "--bias", "joint"]) == 0
    assert "one more input" in capsys.readouterr().out


def test_predictions_do_not_change_the_survey() -> None:
    found = of_net(8)
    assert predict(found, by_rank(3)) == predict(found, by_rank(3))
