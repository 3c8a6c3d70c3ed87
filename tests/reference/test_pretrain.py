from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from reference.config import Config
from reference.data.folders import load_tasks
from reference.errors import ExperimentError
from reference.studies import pretrain
from reference.training.clip import load_clip
from reference.training.compact import WEIGHTS
from reference.training.steps import evaluate

TINY = {"size": 16, "width": 32, "layers": 1, "text-width": 32, "text-layers": 1, "steps": 6, "batch-size": 8}


def paint(path: Path, colour: tuple[int, int, int], corner: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (16, 16), colour)
    image.putpixel((0, 0), (corner, corner, corner))
    image.save(path.with_suffix(".png"))


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Two tasks of two classes; one training image lies in a test folder as well; a pool that names a class."""
    colours = {
        "fruit": {"red_apple": (200, 0, 0), "pear": (0, 200, 0)},
        "water": {"sea": (0, 0, 200), "lake": (0, 90, 200)},
    }
    for task, classes in colours.items():
        for label, colour in classes.items():
            for n in range(5):
                paint(tmp_path / "tasks" / task / "train" / label / str(n), colour, n)
            paint(tmp_path / "tasks" / task / "test" / label / "0", colour, 4 if label == "pear" else 100)
    for n in range(4):
        paint(tmp_path / "pool" / str(n), (50 * n, 50, 50), n)
    lines = ["file,caption", "0.png,a photo of a dog.", "1.png,two pears.", "2.png,a photo of the sea.", "3.png,pearls"]
    (tmp_path / "pool" / "captions.csv").write_text("\n".join(lines) + "\n")
    return {"--tasks-root": str(tmp_path / "tasks"), "--captions": str(tmp_path / "pool")}


def run(places: dict[str, str], output: Path, *more: str) -> int:
    pairs = {**places, **{f"--{name}": str(value) for name, value in TINY.items()}, "--precision": "float32"}
    return pretrain.main([*(part for pair in pairs.items() for part in pair), "--output", str(output), *more])


def gathered(places: dict[str, str], *leave_out: str) -> pretrain.Gathered:
    tasks = load_tasks(Config("mini", "o", data_root=places["--tasks-root"], model="m"), 16)
    config = Config("mini", "o", data_root="d", model="m", reference_root=places["--captions"])
    pool = pretrain.load_reference_pool(config, 16)
    return pretrain.gather(tasks, [(pool.images, pool.captions)], leave_out)


def test_no_test_image_is_learned_from(places: dict[str, str]) -> None:
    found = gathered(places)
    assert len(found.images) == 19 + 4 and found.left_out == {"test images": 1, "unseen classes": 0}
    assert ("a photo of a red apple.",) in found.sentences and len(found.sentences) == 8


def test_classes_that_are_left_out_are_not_seen_anywhere(places: dict[str, str]) -> None:
    found = gathered(places, "fruit")
    said = " ".join(sentence for kind in found.sentences for sentence in kind)
    assert "apple" not in said and "pears" not in said and "pearls" in said and "sea" in said
    assert len(found.images) == 10 + 3 and found.left_out["unseen classes"] == 10 + 1
    with pytest.raises(ExperimentError, match=r"--leave-out frut: no such task .*fruit, water"):
        gathered(places, "frut")


def test_a_tiny_run_leaves_a_model_that_loads(places: dict[str, str], tmp_path: Path) -> None:
    assert run(places, tmp_path / "model") == 0
    told = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert told["images"] == 23 and len(told["loss"]) == 6 and set(told["accuracy"]) == set(told["linear_probe"])
    assert told["linear_probe"]["water"] == 100.0
    with safe_open(tmp_path / "model" / WEIGHTS, "pt") as file:
        rows = file.get_tensor("token_rows")
        assert len(rows) < 40 and file.get_tensor("token_embedding.weight").shape == (len(rows), 32)
        assert told["parameters"] * 2 < told["bytes"] < told["parameters"] * 2 + 10_000
    config = Config("mini", "o", data_root=places["--tasks-root"], model=str(tmp_path / "model"))
    clip = load_clip(config)
    table = clip.model.token_embedding.weight  # type: ignore[union-attr]
    assert table.shape == (49408, 32) and int((table != 0).any(dim=1).sum()) == len(rows)  # type: ignore[arg-type,union-attr]
    for task in load_tasks(config, 16):
        assert evaluate(clip, task, config) == told["accuracy"][task.name]
    assert not (tmp_path / "model" / "pretraining.pt").exists()


def test_an_interrupted_run_goes_on_to_the_same_weights(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(places, tmp_path / "straight") == 0
    asked = iter(range(100))
    monkeypatch.setattr("reference.command.StopRequest.__call__", lambda self: next(asked) >= 2)
    assert run(places, tmp_path / "two") == 130
    monkeypatch.setattr("reference.command.StopRequest.__call__", lambda self: False)
    assert run(places, tmp_path / "two", "--rate", "0.1") == 2
    assert "was made with other options" in capsys.readouterr().err
    assert run(places, tmp_path / "two") == 0
    assert (tmp_path / "two" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("size", [64, 96, 112])
def test_the_model_of_the_defaults_fits_16_megabytes(size: int) -> None:
    options = pretrain.parse(["--tasks-root", "t", "--output", "o", "--size", str(size)])
    with torch.device("meta"):
        model = open_clip.CLIP(**pretrain.shape(options))
    table = model.token_embedding.weight.numel()
    used = 2500 * options.text_width  # tokens of a thousand class names and all templates
    count = sum(p.numel() for p in model.parameters()) - table + used
    assert 7.5e6 < count and 2 * count < 16 * 2**20


def test_bad_options_and_files_are_named(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(places, tmp_path / "m", "--size", "20") == 2
    assert "--size 20 must be a multiple of 8" in capsys.readouterr().err
    with pytest.raises(ExperimentError, match="--text-width 33 must be a multiple of 32"):
        pretrain.shape(argparse.Namespace(size=16, width=32, layers=1, text_width=33, text_layers=1))
    assert run(places, tmp_path / "model") == 0
    whole = (tmp_path / "model" / WEIGHTS).read_bytes()
    (tmp_path / "model" / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExperimentError, match="cannot be read together"):
        load_clip(Config("mini", "o", data_root="d", model=str(tmp_path / "model")))


def test_the_loss_falls(places: dict[str, str], tmp_path: Path) -> None:
    assert run(places, tmp_path / "model", "--steps", "30", "--rate", "3e-3") == 0
    told: dict[str, Any] = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert told["loss"][-1] < 0.85 * told["loss"][0]
