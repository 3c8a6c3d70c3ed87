from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reference.config import load_config
from reference.data import demo
from reference.experiment import Experiment, prepare
from reference.methods import METHODS, Setting
from reference.sequence import Sequence
from reference.studies import run as command
from reference.studies.grids import DEFAULTS, cells
from reference.studies.summary import chosen, read_cells
from reference.training.steps import Batch

SMALL = {
    "iterations": 2, "pretrain_iterations": 2, "warmup": 1, "batch_size": 8, "evaluation_images": 20,
    "consolidation_images": 16, "reference_images": 16, "energy": 0.9,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAIN", "TEST", "PRETRAIN"):
        monkeypatch.setattr(demo, name, 30)


def run(grid: str, output: Path, *values: str) -> int:
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    varied = [part for value in values for part in ("--values", value)]
    return command.main([grid, "--tasks", "colours,photographs", *settings, *varied, "--output", str(output)])


def files(output: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (output / "cells").glob("*.json")]
    return {cell["cell"]: cell for cell in found}


def test_the_ablation_crosses_all_five_factors() -> None:
    every = cells("ablation", {})
    count = 1
    for values in DEFAULTS["ablation"].values():
        count *= len(values)
    assert len(every) == len({cell.name for cell in every}) == count == 72
    for cell in every:
        factors, settings = cell.factors, dict(cell.settings)
        assert METHODS[cell.method].needs_reference == (factors["pool"] == "yes")
        assert cell.method.startswith("gradient") == (factors["moment"] == "gradient")
        assert settings.pop("project", "gradient") == factors["moment"]
        assert settings == {
            "layers": factors["layers"], "pool_losses": factors["losses"] == "yes", "energy": float(factors["energy"])
        }  # fmt: skip


def test_the_dial_changes_one_setting_at_a_time_and_has_the_curve_to_beat() -> None:
    every = {cell.name: cell for cell in cells("dial", {})}
    config = load_config("demo", {"output": "o", "learning_rate": 1e-3})
    assert every["base"].changes(config, {}) == {}
    assert every["rate-0.5"].changes(config, {}) == {"learning_rate": 5e-4}
    assert every["finetune-0.1"].method == "finetune" and every["energy-0.9999"].settings == {"energy": 0.9999}
    assert all(len(cell.changes(config, {})) <= 1 for cell in every.values())
    assert {cell.factors["changed"] for cell in every.values()} == {"nothing", *DEFAULTS["dial"]}


def test_cells_are_run_once_written_small_and_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ("moment=gradient,both", "layers=gnsp", "pool=yes", "losses=yes", "energy=0.9")
    assert run("ablation", tmp_path, *values) == 0
    found = files(tmp_path)
    assert len(found) == 2 and all(path.stat().st_size < 8000 for path in (tmp_path / "cells").iterdir())
    for cell in found.values():
        assert cell["split"] == "validation" and cell["tasks"] == ["colours", "photographs"]
        assert cell["loss"] > 0 and 0 < cell["free_share"] < 1 and cell["bytes"] > 0 and len(cell["accuracy"]) == 2
    table = (tmp_path / "ablation.md").read_text()
    assert table.count("\n| gradient | gnsp | yes | yes | 0.9 | gradient-reference | 1 |") == 1
    assert "old tasks kept" in table and "pretrained" in table and (tmp_path / "ablation.png").stat().st_size > 5000
    assert "of_method" in capsys.readouterr().out

    def never(*arguments: object) -> None:
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(Sequence, "run", never)
    assert run("ablation", tmp_path, *values) == 0
    (tmp_path / "ablation.md").unlink()
    assert command.main(["ablation", "--report", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "ablation.md").read_text() == table
    monkeypatch.setitem(SMALL, "iterations", 3)
    assert run("ablation", tmp_path, *values) == 2
    assert "was made with iterations=2, this run has 3" in capsys.readouterr().err


def test_a_stopped_grid_goes_on_in_the_middle_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ("energy=0.95", "rate=", "layers=", "sgp_alpha=", "prune_bound=", "finetune=")
    assert run("dial", tmp_path / "straight", *values) == 0
    asked = iter(range(1000))
    monkeypatch.setattr("reference.command.StopRequest.__call__", lambda self: next(asked) >= 6)
    assert run("dial", tmp_path / "two", *values) == 130
    assert len(files(tmp_path / "two")) == 1
    monkeypatch.setattr("reference.command.StopRequest.__call__", lambda self: False)
    assert run("dial", tmp_path / "two", *values) == 0
    one, two = files(tmp_path / "straight"), files(tmp_path / "two")
    assert {name: cell["accuracy"] for name, cell in one.items()} == {n: cell["accuracy"] for n, cell in two.items()}


def test_the_dials_of_softness_and_thinning_do_what_they_say(tmp_path: Path) -> None:
    values = ("energy=", "rate=", "layers=vision", "sgp_alpha=1", "prune_bound=0.05", "finetune=1")
    assert run("dial", tmp_path, *values) == 0
    found = files(tmp_path)
    assert set(found) == {"base", "layers-vision", "sgp_alpha-1", "prune_bound-0.05", "finetune-1"}
    assert found["prune_bound-0.05"]["free_share"] > found["base"]["free_share"]
    assert found["sgp_alpha-1"]["config"]["sgp_alpha"] == 1.0 and found["finetune-1"]["bytes"] is None
    assert found["layers-vision"]["bytes"] < found["base"]["bytes"]


def test_rivals_get_their_settings_from_validation_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ("matched_share=0.1,1", "ewc_weight=", "wise_share=0.5", "ensemble_share=", "replay_bytes=ours")
    assert run("controls", tmp_path, *values) == 0
    found = files(tmp_path)
    ours = found["ours_rate-1"]
    assert found["replay_bytes-ours_rate-1"]["settings"] == {"replay_bytes": ours["bytes"]}
    picked = yaml.safe_load(chosen(read_cells(tmp_path, "controls"), "average"))["of_method"]
    assert picked["wise-ft"] == {"wise_share": 0.5} and picked["replay"] == {"replay_bytes": ours["bytes"]}
    gains = {found[f"matched_share-{share}_rate-1"]["diagonal_gain"]: float(share) for share in ("0.1", "1")}
    nearest = min(gains, key=lambda gain: abs(gain - ours["diagonal_gain"]))
    assert picked["matched-plasticity"] == {"matched_share": gains[nearest]}
    load_config("demo", {"output": "o", "of_method": picked})
    assert "matched-plasticity" in capsys.readouterr().out


def test_values_that_are_added_later_stand_in_order(tmp_path: Path) -> None:
    others = ("rate=", "layers=", "sgp_alpha=", "prune_bound=", "finetune=1")
    for values in ("0.85,0.9", "0.99"):
        assert run("dial", tmp_path, f"energy={values}", *others) == 0
    rows = [row[0]["factors"]["to"] for row in read_cells(tmp_path, "dial")]
    assert rows == ["-", "0.85", "0.9", "0.99", "1"]


@pytest.mark.parametrize(
    "values, message",
    [
        (["enrgy=0.9"], "--values enrgy=...: ablation varies moment"),
        (["energy=much"], "not a value that this factor can have"),
        (["pool=maybe"], "not a value that this factor can have"),
        (["energy"], "expected a factor and its values"),
        (["energy="], "leave no cell of ablation"),
        (["energy=2"], "energy=2.0 must lie between"),
        (["layers=text"], "layers='text' must be one of all, vision, gnsp"),
    ],
)
def test_wrong_values_are_named(
    values: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ablation", tmp_path, *values) == 2
    assert message in capsys.readouterr().err


def test_no_finished_cell_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["dial", "--report", "--output", str(tmp_path)]) == 2
    assert "no finished cell of dial" in capsys.readouterr().err


@pytest.fixture
def experiment() -> Experiment:
    settings = {**SMALL, "tasks": ["colours", "photographs"], "methods": "all", "output": "o"}
    prepared = prepare(load_config("demo", settings))
    clip = prepared.pretrained(0)
    return Experiment(prepared.tasks, prepared.pool, lambda seed: clip)


@pytest.mark.parametrize("layers, count", [("gnsp", 9), ("vision", None), ("all", None)])
@pytest.mark.parametrize("name", ["finetune", "nullspace"])
def test_layers_say_what_is_trained(name: str, layers: str, count: int | None, experiment: Experiment) -> None:
    config = load_config("demo", {**SMALL, "layers": layers, "output": "o"})
    made = METHODS[name](Setting(experiment.pretrained(0).copy(), config, experiment.tasks, None, 0))
    trained = {n for n, p in made.clip.model.named_parameters() if p.requires_grad}
    assert len(trained) == (count or len(trained))
    assert all(n.startswith("visual.") for n in trained) == (layers != "all")
    assert made.trained_parameters() == sum(p.numel() for p in made.clip.model.parameters() if p.requires_grad)


def test_thinning_keeps_its_bound_for_every_task_so_far(experiment: Experiment) -> None:
    config = load_config("demo", {**SMALL, "prune_bound": 0.02, "output": "o"})
    made: Any = METHODS["nullspace-reference"](
        Setting(experiment.pretrained(0).copy(), config, experiment.tasks, experiment.pool, 0)
    )
    made.before_sequence()
    reports = []
    prune = made.optimizer.prune
    made.optimizer.prune = lambda *args, **kwargs: reports.append(prune(*args, **kwargs)) or reports[-1]
    for number in (0, 1):
        made.before_task(number)
        assert made.after_task(number)["given_back"] == reports[-1].freed > 0
    assert [set(report.tasks) for report in reports] == [
        {"reference", "colours"}, {"reference", "colours", "photographs"}
    ]  # fmt: skip
    assert all(report.bound == 0.02 and report.lost <= 0.02 for report in reports)


def test_bytes_of_the_results_are_those_of_the_report(experiment: Experiment) -> None:
    config = load_config("demo", {**SMALL, "output": "o"})
    made: Any = METHODS["nullspace"](Setting(experiment.pretrained(0).copy(), config, experiment.tasks, None, 0))
    reports = []
    consolidate = made.optimizer.consolidate
    made.optimizer.consolidate = lambda *args, **kwargs: reports.append(consolidate(*args, **kwargs)) or reports[-1]
    made.after_task(0)
    assert made.facts()["bytes"] == reports[0].bytes > 0


def test_losses_on_the_pool_are_gnsps_beside_our_methods(experiment: Experiment) -> None:
    task, found = experiment.tasks[0], {}
    for name, losses in (("nullspace", False), ("nullspace", True), ("nullspace-losses", False), ("gnsp", False)):
        config = load_config("demo", {**SMALL, "pool_losses": losses, "output": "o"})
        clip = experiment.pretrained(0).copy()
        made = METHODS[name](Setting(clip, config, experiment.tasks, experiment.pool, 0))
        images, labels = clip.normalised(task.train.images[:8]), task.train.labels[:8]
        batch = Batch(images, labels, clip.tokens(task.prompts()), 0, 0, torch.arange(8))
        found[name, losses] = float(made.loss(batch).detach())
    assert found["nullspace", True] == pytest.approx(found["gnsp", False], rel=1e-6)
    assert found["nullspace-losses", False] == found["nullspace", True]
    assert found["nullspace", True] > found["nullspace", False] + 0.1
