"""Plans from shapes against real tensors, counted operations and real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import BATCH, Measured, agrees
from torch import Tensor, nn

from nullspace_optim.cli import main
from nullspace_optim.errors import OptionError
from nullspace_optim.planning.architectures import build
from nullspace_optim.planning.predict import Conditions, by_fraction, by_rank, consolidation, on_both_sides, predict
from nullspace_optim.planning.shapes import Moment, Survey, Weight
from nullspace_optim.planning.survey import survey


def linear(out: int, inputs: int, **options: Any) -> Weight:
    return Weight("w", (out, inputs), (1, out, inputs), 4, {"right": 0}, **options)


def surveyed(*weights: Weight, size: int = 8) -> Survey:
    return Survey("toy", 4, 100, weights, (Moment(1, size, 40),), (), (), 0, 1000, 3000)


def test_bytes_and_operations_of_one_matrix_by_hand() -> None:
    found = predict(surveyed(linear(6, 8)), by_rank(3))
    assert (found.memory.bases, found.memory.anchors) == (8 * 3 * 4, 6 * 3 * 4)
    assert found.memory.workspaces == 6 * 3 * 4 and found.memory.copies == 0
    assert found.step_flops == 4 * 6 * 8 * 3
    assert found.share == 3 / 8


def test_beyond_half_of_the_directions_the_difference_form_runs() -> None:
    found = predict(surveyed(linear(6, 8)), by_rank(6))
    assert found.memory.copies == 6 * 8 * 4
    assert found.memory.workspaces == 6 * 6 * 4 + 8 * 2 * 4
    assert found.step_flops == 4 * 6 * 8 * 2 + 4 * 6 * 8 * 6 // 16


def test_a_full_weight_is_kept_whole_and_costs_no_operations() -> None:
    found = predict(surveyed(linear(6, 8)), by_fraction(1.0))
    assert found.full == 1 and found.step_flops == 0 and found.memory.kept == 6 * 8 * 4


def test_weights_that_share_rows_share_a_basis_but_no_anchor() -> None:
    found = predict(surveyed(linear(6, 8), linear(2, 8)), by_rank(3))
    assert found.memory.bases == 8 * 3 * 4 and found.memory.anchors == (6 + 2) * 3 * 4


def test_devices_share_right_anchors_by_rows_and_repeat_bases() -> None:
    found = predict(surveyed(linear(6, 8)), by_rank(3), Conditions(devices=4))
    assert found.per_device.bases == found.memory.bases
    assert found.per_device.anchors == 2 * 3 * 4  # ceil(6 / 4) rows
    assert found.step_flops_per_device == found.step_flops // 3
    left = Weight("p", (8, 6), (1, 8, 6), 4, {"left": 0})
    assert predict(surveyed(left), by_rank(3), Conditions(devices=4)).per_device.anchors == 3 * 6 * 4


def test_projecting_gradients_as_well_costs_the_same_again() -> None:
    toy = surveyed(linear(6, 8))
    once, both = (predict(toy, by_rank(3), Conditions(project=p)).step_flops for p in ("update", "both"))  # type: ignore[arg-type]
    assert both == 2 * once


def test_a_policy_that_looks_at_weights_protects_both_sides_of_each() -> None:
    found = predict(on_both_sides(surveyed(linear(6, 8), linear(6, 8))), by_rank(3))
    assert found.memory.bases == 2 * (8 + 6) * 3 * 4 and found.step_flops == 2 * 4 * 6 * 8 * 6


def test_a_consolidation_by_hand() -> None:
    cost = consolidation(surveyed(linear(6, 8)), Conditions(samples=8))
    again = 3 * 1000  # the first batch once for the probe and twice for the drift that is allowed
    assert (cost.forward_flops, cost.moment_flops, cost.eigh_flops) == (2000 + again, 2 * 40 * 64 * 2, 9 * 512)
    assert (cost.moments, cost.largest) == (4 * 64, 8)
    assert consolidation(surveyed(linear(6, 8)), Conditions(precise=True)).moments == 8 * 64


@pytest.mark.parametrize("wrong", [{"devices": 0}, {"samples": 0}, {"precision": "half"}, {"project": "none"}], ids=str)
def test_conditions_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Conditions(**wrong)


def check(
    name: str, model: nn.Module, batch: Any, run: Callable[[Any], Any], k: int, samples: int, **options: Any
) -> None:
    """Bytes must agree exactly, operations within a hundredth (15 % are promised)."""
    real = Measured(model, batch, run, k)
    architecture = build(name, batch=samples, **options)
    agrees(survey(architecture.model, architecture.run, batch=samples), real, k)


def clip_batch(samples: int, size: int, context: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, size, size), torch.randint(0, vocabulary, (samples, context))


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize(("k", "samples"), [(16, 2 * BATCH), (100, 112)], ids=["anchor form", "difference form"])
def test_a_clip_agrees_with_its_measured_run(k: int, samples: int, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 192, "head_width": 64, "patch_size": 4},
        "text_cfg": {"context_length": 16, "vocab_size": 300, "width": 160, "heads": 2, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.CLIP(**config).eval()
    batch = clip_batch(samples, 32, 16, 100)
    check(str(tmp_path), model, batch, lambda b: model(*b), k, samples)


def test_a_language_model_with_tied_weights_agrees_with_its_measured_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=200, n_positions=64)
    config.save_pretrained(tmp_path)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 90, (BATCH, 24))
    check(str(tmp_path), model, tokens, lambda b: model(input_ids=b), 20, BATCH, sequence=24)


def test_a_grouped_query_model_agrees_with_its_measured_run(tmp_path: Path) -> None:
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("its rotary embedding enters autocast on the meta device, which torch refuses")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
    )
    config.save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 90, (BATCH, 24))
    check(str(tmp_path), model, tokens, lambda b: model(input_ids=b), 30, BATCH, sequence=24)


def test_a_convolutional_model_agrees_with_its_measured_run() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_efficientnet", pretrained=False).eval()
    images = torch.randn(4, *model.pretrained_cfg["input_size"])
    check("test_efficientnet", model, images, model, 4, 4)


@pytest.mark.nightly
def test_mini_clip_agrees_with_its_measured_run(data_root: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    folder = data_root / "mini-clip"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    check(str(folder), model, clip_batch(BATCH, 64, 24, 40000), lambda b: model(*b), 64, BATCH)


@pytest.mark.nightly
def test_vit_b_32_agrees_with_its_measured_run() -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("ViT-B-32", pretrained=None).eval()
    check("ViT-B-32", model, clip_batch(BATCH, 224, 77, 40000), lambda b: model(*b), 96, BATCH)


def test_a_very_large_model_needs_neither_weights_nor_time() -> None:
    pytest.importorskip("open_clip")
    architecture = build("ViT-bigG-14", batch=2)
    found = survey(architecture.model, architecture.run, batch=2)
    assert {p.device.type for p in architecture.model.parameters()} == {"meta"}
    assert found.parameters == 2_539_567_105
    assert not found.free


def test_only_trainable_parameters_are_surveyed() -> None:
    pytest.importorskip("timm")
    architecture = build("test_vit", batch=1)
    found = survey(architecture.model, architecture.run, batch=1, trainable="blocks.0.*")
    assert all(weight.name.startswith("blocks.0.") for weight in found.weights) and found.weights
    with pytest.raises(OptionError, match="trainable='nothing'"):
        survey(architecture.model, architecture.run, batch=1, trainable="nothing")


def test_a_model_that_needs_values_is_refused_by_name() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 3, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            return y if y.sum().item() > 0 else -y

    model, x = Branching(), torch.empty(2, 3, device="meta")
    with pytest.raises(OptionError, match="Branching cannot be surveyed on the meta device"):
        survey(model, lambda: model(x), batch=2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ViT-B-99", "similar names: ViT-B"),
        ("hf-hub:someone/something", "downloaded"),
        ("timm:no_such", "cannot be built"),
    ],
)
def test_unknown_models_are_one_clear_error(name: str, says: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(OptionError, match=says):
        build(name)


def test_a_folder_without_a_configuration_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="neither open_clip_config"):
        build(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(OptionError, match="expected an object"):
        build(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such"}')
    with pytest.raises(OptionError, match="no-such"):
        build(str(tmp_path))


def test_the_command_prints_a_table_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main(["plan", "--model", "test_vit", "--batch", "2", "--devices", "8", "--policy", "Energy(0.99)"]) == 0
    text = capsys.readouterr().out
    assert "test_vit (timm)" in text and "1/16" in text and "3/4" in text
    assert "depend on the data" in text and "FSDP2" in text and "second moments held" in text


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main(["plan", "--model", "test_vit", "--batch", "2", "--policy", "FixedRank(8)", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["ranks"]) == ["k=8"]
    architecture = build("test_vit", batch=2)
    expected = predict(survey(architecture.model, architecture.run, batch=2), by_rank(8))
    assert document["ranks"]["k=8"]["memory"]["bases"] == expected.memory.bases
    assert document["ranks"]["k=8"]["step_flops"] == expected.step_flops


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("Energy(2)", "threshold"),
        ("Nothing(1)", "one of"),
        ("__import__('os')", "one of"),
        ("Energy(open('x'))", "one of"),
    ],
)
def test_a_policy_is_read_and_never_run(policy: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "test_vit", "--policy", policy]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_fractions_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("2", "1/0", "x", ""):
        assert main(["plan", "--model", "test_vit", "--fractions", wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["plan", "--model", "test_vit", "--fractions", "1/2", "--policy", "FixedRank(8)"]) == 2
    assert "--policy FixedRank says how many directions" in capsys.readouterr().err
