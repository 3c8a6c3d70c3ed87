"""The methods with experts and adapters: resume, what is frozen, routing by sample, what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.config import Config, load_config
from reference.errors import ExperimentError
from reference.experiment import Experiment, prepare
from reference.methods import METHODS, Setting
from reference.methods.adapters import PLAIN, Centres, Routing
from reference.methods.lora import LoraOfTasks
from reference.methods.moe import MixtureOfAdapters
from reference.sequence import Sequence, StoppedError

SMALL = {
    "tasks": ["colours", "photographs"], "iterations": 6, "pretrain_iterations": 4, "warmup": 2, "batch_size": 8,
    "evaluation_images": 40, "consolidation_images": 32, "igsp": {"rank": 4, "window": 1, "cap": 3, "on_cap": "prune"},
    "lora_rank": 4, "moe_experts": 6, "output": "unused", "learning_rate": 0.01,
}  # fmt: skip
FAMILY = ("igsp", "moe-adapters", "lora-per-task", "lora-shared", "lora-shared-nullspace")


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("demo", SMALL)


@pytest.fixture(scope="module")
def experiment(config: Config) -> Experiment:
    prepared = prepare(config)
    clip = prepared.pretrained(0)
    return Experiment(prepared.tasks, prepared.pool, lambda seed: clip)


@pytest.mark.parametrize("name", FAMILY)
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
    told = {"name", "candidates", "kept", "reused", "history", "converged", "curve", "reuse", "flow", "used"}
    assert all(set(layer) == told for layer in first["layers"])
    assert first["kept"] + first["pruned"] == sum(layer["candidates"] for layer in first["layers"])
    assert 0 <= second["phase_2_drift"] <= 1e-5
    mean = (second["trainable_phase_1"] * second["steps_phase_1"]) + second["trainable_phase_2"] * second[
        "steps_phase_2"
    ]
    assert second["trainable_mean"] == pytest.approx(mean / 6)


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
