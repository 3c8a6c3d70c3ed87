"""The preset `paper` from end to end, in small: its sources, recipe, schedules and ways of scoring at 224 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from layouts import LAYOUTS, expect_them
from PIL import Image
from safetensors.torch import save_file

from reference.config import Config, load_config
from reference.data import stand_in
from reference.data.tasks import ORDERS, templates_of
from reference.errors import ExperimentError
from reference.experiment import prepare
from reference.run import main
from reference.training.clip import load_clip

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TASKS = ("dtd", "eurosat", "flowers102", "mnist")
METHODS = ("finetune", "gnsp", "gnsp-exact", "nullspace-reference")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an open_clip model of the paper's kind, but tiny."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pool")
    lines = ["file,caption"]
    for n in range(8):
        Image.new("RGB", (40 + n, 30), (30 * n, 90, 200 - 20 * n)).save(folder / f"{n}.jpg")
        lines.append(f"{n}.jpg,a photo of thing {n % 5}.")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def results(folder: Path, method: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{method}-seed42" / "results.json").read_text())
    return found


def test_the_preset_runs_from_torchvisions_folders_to_the_table(
    architecture: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_them(monkeypatch)
    for task in TASKS:
        LAYOUTS[task][0](tmp_path / "data")
    places = ["--data-root", str(tmp_path / "data"), "--model", architecture, "--reference-root", pool]
    short = ["--set", "iterations=4", "--set", "batch_size=4", "--seeds", "42", "--tasks", ",".join(TASKS)]
    output = ["--output", str(tmp_path / "out"), "--methods", ",".join(METHODS)]
    assert main(["--preset", "paper", *places, *short, *output]) == 0
    printed = capsys.readouterr().out
    assert "s / iteration" in printed and "s / 1,000 images consolidated" in printed
    for method in METHODS:
        found = results(tmp_path / "out", method)
        ways = [f"task known, {rule} templates" for rule in ("gnsp", "first")]
        assert list(found["scored_otherwise"]) == ways and found["tasks"] == list(TASKS)
        steps = [task["iterations"] for task in found["training"]]
        assert steps == ([2, 2, 4, 2] if method.startswith("gnsp") else [4] * 4), "GNSP's shares by task"
        consolidated = [part["task"] for part in found["consolidations"]]
        first = ["reference"] if method == "nullspace-reference" else []
        assert consolidated == ([] if method == "finetune" else [*first, *TASKS])
        assert found["seconds_per_iteration"] > 0 and found["peak_memory"]["process_mib"] > 0
        assert (found["consolidation_seconds_per_1000_images"] is None) == (method == "finetune")
        assert found["config"]["precision"] == "bfloat16" and found["config"]["label_smoothing"] == 0.2
        whole, restricted = found["trained_parameters"][0], found["trained_parameters"][1]
        assert (restricted < whole / 10) == method.startswith("gnsp")


def test_class_names_templates_and_pixels_are_those_of_the_benchmark(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_them(monkeypatch)
    for task in ORDERS["I"]:
        LAYOUTS[task][0](tmp_path)
    settings = {"data_root": str(tmp_path), "model": architecture, "methods": ["finetune"], "output": "o"}
    found = prepare(load_config("paper", settings)).tasks
    assert [task.name for task in found] == list(ORDERS["I"])
    for task in found:
        assert task.class_names == LAYOUTS[task.name][2] and task.templates == templates_of(task.name)
        assert task.train.images[:1].shape == (1, 3, 224, 224)


def test_stand_ins_have_the_benchmarks_classes_and_need_no_data(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "TRAIN", 24)
    monkeypatch.setattr(stand_in, "TEST", 6)
    settings = ["source=stand-in", "iterations=2", "batch_size=4", "reference_images=6", "gradient_checkpointing=true"]
    pairs = [part for pair in settings for part in ("--set", pair)]
    chosen = ["--tasks", "dtd,mnist", "--methods", "gnsp-exact", "--seeds", "42", "--model", architecture]
    assert main(["--preset", "paper", *chosen, *pairs, "--output", str(tmp_path)]) == 0
    assert results(tmp_path, "gnsp-exact")["chance"] == [100 / 47, 10.0]
    whole = load_config("paper", {"source": "stand-in", "model": architecture, "output": "o", "reference_images": 2})
    assert sum(len(task.class_names) for task in prepare(whole).tasks) == 1201


def test_a_model_may_have_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create(name: str, pretrained: str | None, require_pretrained: bool) -> torch.nn.Module:
        asked.append((name, pretrained))
        assert not require_pretrained
        return open_clip.CLIP(**TINY)

    monkeypatch.setattr(open_clip, "create_model", create)
    one, two = (load_clip(Config("paper", "o", data_root="d", model="ViT-B-16-quickgelu:random")) for _ in range(2))
    assert asked == [("ViT-B-16-quickgelu", None)] * 2
    assert torch.equal(one.model.visual.proj, two.model.visual.proj)  # type: ignore[union-attr,arg-type]
    with pytest.raises(ExperimentError, match="ViT-B-16:random for untrained weights"):
        load_clip(Config("paper", "o", data_root="d", model="ViT-Q-16:random"))
