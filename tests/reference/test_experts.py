"""The methods with experts and adapters: resume, what is frozen, routing by sample, what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nullspace_optim import IGSP
from reference.config import Config, load_config
from reference.errors import ExperimentError
from reference.evaluation.bootstrap import compare
from reference.experiment import Experiment
from reference.methods import METHODS, Setting
from reference.methods.adapters import PLAIN, Centres, Routing
from reference.methods.lora import LoraOfTasks
from reference.methods.moe import MixtureOfAdapters
from reference.sequence import Sequence, StoppedError
from reference.studies.expert_report import unnamed
from reference.studies.grids import cells
from reference.studies.run import main

SMALL = {
    "tasks": ["colours", "photographs"], "iterations": 6, "pretrain_iterations": 4, "warmup": 2, "batch_size": 8,
    "evaluation_images": 40, "consolidation_images": 32, "igsp": {"rank": 4, "window": 1, "cap": 3, "on_cap": "prune"},
    "lora_rank": 4, "moe_experts": 6, "output": "unused", "learning_rate": 0.01,
}  # fmt: skip
FAMILY = ("igsp", "moe-adapters", "lora-per-task", "lora-shared", "lora-shared-nullspace")


def nightly_but(*names: str) -> list[Any]:
    """The family, of which all but `names` are for the nightly tests."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.nightly) for name in FAMILY]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("demo", SMALL)


@pytest.mark.parametrize("name", nightly_but("igsp"))
@pytest.mark.parametrize("calls", [2, 5, 9], ids=["in-phase-1", "in-phase-2", "in-task-2"])
def test_resume_is_bitwise(name: str, calls: int, config: Config, experiment: Experiment, tmp_path: Path) -> None:
    straight = Sequence(experiment, METHODS[name], config, 0, tmp_path / "straight")
    expected = straight.run()
    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        Sequence(experiment, METHODS[name], config, 0, tmp_path / "two", lambda: next(asked) >= calls - 1).run()
    resumed = Sequence(experiment, METHODS[name], config, 0, tmp_path / "two")
    found = resumed.run(resume=True)
    for key in ("accuracy", "scored_otherwise", "facts", "trained_parameters"):
        assert json.dumps(found[key]) == json.dumps(expected[key]), key
    mine, other = (dict(run.clip.model.named_parameters()) for run in (straight, resumed))
    assert mine.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in mine.items())


@pytest.mark.parametrize("name", nightly_but("lora-shared-nullspace"))
def test_the_pool_is_seen_alike_by_a_run_taken_up_after_its_last_task(
    name: str, config: Config, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool is of no task: its figures must not depend on which one was trained last in this process."""
    expected = Sequence(experiment, METHODS[name], config, 0, tmp_path / "straight").run()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sequence, "_results", _interrupted)
        Sequence(experiment, METHODS[name], config, 0, tmp_path / "two").run()
    resumed = Sequence(experiment, METHODS[name], config, 0, tmp_path / "two").run(resume=True)
    assert expected["pool"].keys() == {"before", "after"}
    assert resumed["pool"] == expected["pool"]


def _interrupted(self: Sequence) -> dict[str, Any]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", FAMILY)
def test_the_backbone_stays_and_the_counts_are_reported(
    name: str, config: Config, experiment: Experiment, tmp_path: Path
) -> None:
    run = Sequence(experiment, METHODS[name], config, 0, tmp_path)
    before = {key: value.clone() for key, value in run.clip.model.state_dict().items()}
    results = run.run()
    now = run.clip.model.state_dict()
    changed = [key for key, value in before.items() if not torch.equal(now[key], value)]
    assert all("adapter" in key for key in changed) and bool(changed) == (name != "igsp")
    facts = results["facts"]
    assert facts["final_with_routers"] >= facts["final_without_routers"] > 0 and facts["trainable_mean"] > 0
    if len(METHODS[name].evaluations) == 2:
        known = results["accuracy"]
        assert known[0][1] == results["pretrained"][1], "a task without adapter is the pretrained model"
        (unknown,) = results["scored_otherwise"].values()
        assert len(unknown["accuracy"]) == 2


def test_igsp_tells_convergence_and_fate_of_experts(config: Config, experiment: Experiment, tmp_path: Path) -> None:
    facts: dict[str, Any] = Sequence(experiment, METHODS["igsp"], config, 0, tmp_path).run()["facts"]
    first, second = facts["tasks"]
    assert first["steps_phase_1"] + first["steps_phase_2"] == 6 and first["task"] == "colours"
    told = {"name", "candidates", "kept", "reused", "history", "converged", "curve", "reuse", "flow", "used", "routing"}
    assert all(set(layer) == told for layer in first["layers"])
    assert first["kept"] + first["pruned"] == sum(layer["candidates"] for layer in first["layers"])
    assert 0 <= second["phase_2_drift"] <= 1e-5
    mean = (second["trainable_phase_1"] * second["steps_phase_1"]) + second["trainable_phase_2"] * second[
        "steps_phase_2"
    ]
    assert second["trainable_mean"] == pytest.approx(mean / 6)


def driver(what: str, folder: Path, *options: str) -> int:
    pairs = [f"{key}={json.dumps(value)}" for key, value in SMALL.items() if key not in ("igsp", "output")]
    pairs.append("igsp={rank: 4, window: 1, cap: 3, on_cap: prune, candidates: 2}")
    settings = [word for pair in pairs for word in ("--set", pair)]
    return main([what, "--preset", "demo", "--output", str(folder), *options, *settings])


def test_one_command_makes_the_comparison_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("--rows", "igsp,lora-per-task", "--seeds", "0,1")
    assert driver("comparison", tmp_path, "--rows", "igsp", "--seeds", "0") == 0
    first = (tmp_path / "igsp-seed0" / "results.json").read_bytes()
    assert driver("comparison", tmp_path, *rows) == 0
    assert (tmp_path / "igsp-seed0" / "results.json").read_bytes() == first
    assert sorted(path.parent.name for path in tmp_path.glob("*/results.json")) == [
        "igsp-seed0", "igsp-seed1", "lora-per-task-seed0", "lora-per-task-seed1",
    ]  # fmt: skip
    text = (tmp_path / "experts.md").read_text()
    ours, other = (json.loads((tmp_path / f"{m}-seed0/results.json").read_text()) for m in ("igsp", "lora-per-task"))
    mine = [json.loads((tmp_path / f"igsp-seed{n}/results.json").read_text())["facts"] for n in (0, 1)]
    saved = 100 * (1 - sum(f["final_with_routers"] for f in mine) / 2 / other["facts"]["final_with_routers"])
    assert "| lora-per-task | " in text and f"| {saved:.1f} | 86.9 | " in text
    unknown = ours["scored_otherwise"]["task unknown, first templates"]
    assert unnamed(ours)["last"] == pytest.approx(sum(unknown["accuracy"][-1]) / 2)
    assert (
        unnamed(ours)["right"] == unknown["right"] and unnamed({**ours, "scored_otherwise": {}})["last"] == ours["last"]
    )
    of = {
        m: [json.loads((tmp_path / f"{m}-seed{n}/results.json").read_text()) for n in (0, 1)]
        for m in METHODS
        if (tmp_path / f"{m}-seed0").exists()
    }
    pair = [[unnamed(run) for run in of[m]] for m in ("igsp", "lora-per-task")]
    gap = np.mean([a["last"] - b["last"] for a, b in zip(*pair)])
    assert f"| {compare(*pair, 'average')} | {gap:+.1f} [" in text
    assert (tmp_path / "routing-igsp.png").stat().st_size > 5000
    points = ours["facts"]["tasks"][0]["layers"][0]["routing"]
    assert ours["facts"]["tasks"][0]["routing_steps"] == [5] and sum(points[0]) == pytest.approx(1.0, abs=2e-3)
    capsys.readouterr()
    (tmp_path / "experts.md").unlink()
    assert driver("comparison", tmp_path, "--report") == 0
    assert (tmp_path / "experts.md").read_text() == text and text in capsys.readouterr().out


def test_the_ablation_changes_one_choice_at_a_time(tmp_path: Path) -> None:
    assert driver("igsp", tmp_path, "--rows", "as compared;two candidates, one price;A frozen in phase 2") == 0
    found = {path.parent.name: json.loads(path.read_text())["config"] for path in tmp_path.glob("*/results.json")}
    base = found["as_compared-seed0"]["igsp"]
    assert found["two_candidates_one_price-seed0"]["igsp"] == {**base, "candidates": 2, "price": "flat"}
    assert found["A_frozen_in_phase_2-seed0"]["igsp"] == {**base, "orthogonal": "structural"}
    assert all(config["split"] == "validation" for config in found.values())
    for cell in cells("igsp", {}) + cells("comparison", {}):
        assert cell.method in METHODS and IGSP(**cell.settings.get("igsp", {}))


def test_an_unknown_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver("comparison", tmp_path, "--rows", "isgp") == 2
    assert "unknown row 'isgp' in --rows: choose from igsp; moe-adapters" in capsys.readouterr().err
    assert driver("comparison", tmp_path, "--report") == 2
    assert "no results.json below" in capsys.readouterr().err


def test_a_wrong_option_of_igsp_is_named(experiment: Experiment) -> None:
    for options, message in (({"ranks": 4}, "ranks"), ({"kind": "tiny"}, "kind='tiny'")):
        settings = load_config("demo", {**SMALL, "igsp": options})
        with pytest.raises(ExperimentError, match=message):
            METHODS["igsp"](Setting(experiment.pretrained(0).copy(), settings, experiment.tasks, None, 0))
    with pytest.raises(ExperimentError, match="igsp=3"):
        load_config("demo", {**SMALL, "igsp": 3})
    assert load_config("demo", {**SMALL, "igsp": {"lr": "1e-4"}}).igsp == {"lr": 1e-4}


def test_centres_give_each_input_to_the_nearest_task_or_to_none() -> None:
    centres = Centres()
    one, two = torch.eye(8)[:2]
    for mean in (one, two):
        centres.add(torch.nn.functional.normalize(mean + 0.1 * torch.randn(30, 8), dim=1))
    inputs = torch.nn.functional.normalize(torch.stack([one + 0.02, two - 0.02, -one]), dim=1)
    assert centres.nearest(inputs).tolist() == [0, 1, PLAIN]
    assert Centres().nearest(inputs).tolist() == [PLAIN] * 3


def test_lora_of_tasks_is_the_same_for_a_task_and_for_samples_of_it() -> None:
    routing = Routing()
    module, x = LoraOfTasks(8, 2, 3, routing), torch.randn(4, 5, 8)
    for lora in module.of_task:
        torch.nn.init.normal_(lora.up.weight)
    alone = []
    for routing.task in (0, 1, 2, PLAIN):
        alone.append(module(x))
    routing.task = torch.tensor([2, PLAIN, 0, 1])
    expected = torch.stack([alone[2][0], alone[3][1], alone[0][2], alone[1][3]])
    torch.testing.assert_close(module(x), expected)


def test_moe_equals_its_experts_one_at_a_time_and_freezes_the_most_used() -> None:
    routing = Routing(0)
    module, x = MixtureOfAdapters(24, 5, 2, routing), torch.randn(6, 4, 24)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.eval()
    expected = torch.zeros_like(x)
    for sample in range(6):
        best = (x[sample, 0] @ module.router[0]).topk(2)
        for expert, gate in zip(best.indices.tolist(), torch.softmax(best.values, 0)):
            hidden = torch.relu(x[sample] @ module.down[expert].T + module.down_bias[expert])
            expected[sample] += 0.1 * gate * (hidden @ module.up[expert] + module.up_bias[expert])
    torch.testing.assert_close(module(x), expected, atol=1e-3, rtol=1e-4)
    routing.task = torch.tensor([0] * 5 + [PLAIN])
    torch.testing.assert_close(module(x)[:5], expected[:5], atol=1e-3, rtol=1e-4)
    assert torch.count_nonzero(module(x)[5]) == 0
    module.counts.copy_(torch.tensor([1.0, 9.0, 0.0, 7.0, 2.0]))
    module.freeze_most_used()
    module.begin(1)
    assert module.frozen.tolist() == [False, True, False, True, False]
    assert [p.requires_grad for p in module.down] == [True, False, True, False, True]
    assert [p.requires_grad for p in module.router] == [False, True]


def test_a_method_that_changes_the_model_stands_in_the_tables(tmp_path: Path) -> None:
    pool = ("--set", "reference_images=16")
    assert driver("comparison", tmp_path, "--rows", "igsp,gnsp-exact", "--seeds", "0", *pool) == 0
    text = (tmp_path / "experts.md").read_text()
    exact = json.loads((tmp_path / "gnsp-exact-seed0/results.json").read_text())
    mean = sum(exact["trained_parameters"]) / 2 / 1e3
    assert f"| gnsp-exact | - | - | {mean:.1f} | 0.0 | 0.0 |" in text
    assert "| stores none | 86.9 | " in text
