from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from reference.config import Config, load_config
from reference.errors import ExperimentError
from reference.experiment import Experiment
from reference.methods import METHODS
from reference.run import main
from reference.sequence import Sequence, StoppedError
from reference.training.clip import load_clip

SMALL = {
    "tasks": ["colours", "photographs"], "methods": "all", "iterations": 6, "pretrain_iterations": 4, "warmup": 2,
    "batch_size": 8, "evaluation_images": 40, "consolidation_images": 32, "reference_images": 32,
}  # fmt: skip


SHAPE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("demo", {**SMALL, "output": "unused"})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_a_results_file(name: str, config: Config, experiment: Experiment, tmp_path: Path) -> None:
    Sequence(experiment, METHODS[name], config, 0, tmp_path).run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["method"] == name and results["seed"] == 0 and results["tasks"] == SMALL["tasks"]
    assert len(results["accuracy"]) == 2 and all(len(row) == 2 for row in results["accuracy"])
    assert {"transfer", "average", "last", "pretrained", "seconds", "peak_memory", "machine", "torch", "config"} <= set(
        results
    )
    assert not (tmp_path / "checkpoint.pt").exists() and (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("name", ["finetune", "nullspace"])
@pytest.mark.parametrize("calls", [3, 7, 9], ids=["in-task-1", "after-task-1", "in-task-2"])
@pytest.mark.fault(119)
def test_resume_is_bitwise(name: str, calls: int, config: Config, experiment: Experiment, tmp_path: Path) -> None:
    straight = Sequence(experiment, METHODS[name], config, 0, tmp_path / "straight")
    expected = straight.run()
    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        Sequence(experiment, METHODS[name], config, 0, tmp_path / "two", lambda: next(asked) >= calls - 1).run()
    resumed = Sequence(experiment, METHODS[name], config, 0, tmp_path / "two")
    assert resumed.run(resume=True)["accuracy"] == expected["accuracy"]
    for (key, one), two in zip(straight.clip.model.state_dict().items(), resumed.clip.model.state_dict().values()):
        assert torch.equal(one, two), key


def test_the_command_draws_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items() if key != "methods"]
    arguments = ["--methods", "finetune,nullspace", "--output", str(tmp_path), *pairs]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "after photographs" in printed and "transfer" in printed
    assert (tmp_path / "forgetting.png").exists() and (tmp_path / "nullspace-seed0" / "heatmap.png").exists()
    assert main(arguments) == 2
    assert "already holds results" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert main([*arguments, "--resume", "--set", "iterations=7"]) == 2
    assert "iterations" in capsys.readouterr().err


@pytest.mark.fault(119)
def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reference.command.StopRequest.__call__", lambda self: True)
    before = signal.getsignal(signal.SIGINT)
    pairs = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items() if key != "methods"]
    assert main(["--methods", "finetune", "--output", str(tmp_path), *pairs]) == 130
    signal.signal(signal.SIGINT, before)
    assert "--resume --methods finetune" in capsys.readouterr().err
    assert (tmp_path / "finetune-seed0" / "checkpoint.pt").exists()


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(
    config: Config, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Sequence(experiment, METHODS["finetune"], config, 0, tmp_path)
    run._begin()
    saved, whole = (tmp_path / "checkpoint.pt").read_bytes(), torch.save

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ExperimentError, match=r"checkpoint\.pt \(.*No space left.*--resume"):
        Sequence(experiment, METHODS["finetune"], config, 0, tmp_path).run(resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved and not (tmp_path / "checkpoint.tmp").exists()
    monkeypatch.setattr(torch, "save", whole)
    results = Sequence(experiment, METHODS["finetune"], config, 0, tmp_path).run(resume=True)
    assert results["pretrained"] == run.main.pretrained


def test_a_folder_that_takes_no_checkpoint_is_named_before_training(
    config: Config, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reference.sequence.shutil.disk_usage", lambda folder: SimpleNamespace(free=2**20))
    run = Sequence(experiment, METHODS["finetune"], config, 0, tmp_path / "run")
    with pytest.raises(ExperimentError, match=r"run has 1 MiB of free space, .* finetune needs about \d+ MiB"):
        run.run()
    assert not run.progress.boards


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    pairs = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items() if key != "methods"]
    assert main(["--methods", "finetune", "--output", str(tmp_path / "file" / "run"), *pairs]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "choose another --output" in said and "Traceback" not in said


def test_a_model_folder_without_weights_is_not_taken_for_a_pretrained_one(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SHAPE, "preprocess_cfg": {}}))
    with pytest.raises(ExperimentError, match=r"open_clip cannot load it .*check --model"):
        load_clip(Config("mini", "o", data_root="d", model=str(tmp_path)))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SHAPE, "preprocess_cfg": {}}))
    (tmp_path / "open_clip_model.safetensors").write_bytes(save({"visual.proj": torch.zeros(3, 3)}))
    with pytest.raises(ExperimentError, match=r"open_clip cannot load it .*check --model"):
        load_clip(Config("mini", "o", data_root="d", model=str(tmp_path)))
