"""The published tables: schedules, Adam-NSCL, resuming, the command, and what counts as reproduced."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from table_runs import Images, SmallResNet, nscl_protocol, small
from torch import Tensor, nn
from torch.nn import functional

from nullspace_optim import Energy, NullSpaceOptimizer, NullSpaceWarning
from nullspace_optim.policies import Spectrum
from reference.errors import ExperimentError
from reference.published import methods, runs
from reference.published.__main__ import main
from reference.published.data import (
    PermutedMNIST,
    SplitCIFAR100,
)
from reference.published.methods import METHODS, chosen_methods
from reference.published.networks import PermutedMLP
from reference.published.protocols import PROTOCOLS, Protocol
from reference.published.published import Published, verdict
from reference.published.report import as_published, comparable, read_runs, report
from reference.published.runs import Run
from reference.published.sessions import KeptNorms
from reference.published.training import Patience, train


def test_rates_are_halved_after_shares_of_the_epochs(digits: Images) -> None:
    assert PROTOCOLS["cifar100-resnet"].halvings == {30, 60} and not PROTOCOLS["pmnist"].halvings
    protocol, rates = small(digits, epochs=4, milestones=(0.5, 0.75)), []
    tasks, model = PermutedMNIST(digits, seed=1), PermutedMLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08)

    def penalty() -> float:
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    train(model, optimizer, tasks.part(0, "train"), tasks.part(0, "validation"), protocol, 0, 1, penalty)
    assert list(dict.fromkeys(rates)) == [0.08, 0.04, 0.02]
    assert rates.count(0.08) == len(rates) / 2


def test_the_rate_falls_along_a_cosine_anew_in_every_task(digits: Images) -> None:
    protocol = small(digits, epochs=2, cosine=True)
    tasks, model = PermutedMNIST(digits, seed=1), PermutedMLP()
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.08), model)
    for task in range(2):
        rates: list[float] = []

        def penalty(rates: list[float] = rates) -> float:
            rates.append(optimizer.param_groups[0]["lr"])
            return 0.0

        METHODS["gpm"].set_rates(optimizer, replace(protocol, rate=0.08), task)
        data = tasks.part(task, "train")
        train(model, optimizer, data, tasks.part(task, "validation"), protocol, task, 1, penalty)
        steps = 2 * math.ceil(len(data[1]) / protocol.batch)
        assert rates == pytest.approx([0.04 * (1 + math.cos(math.pi * n / steps)) for n in range(steps)])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_method_may_change_the_protocol_and_its_results_say_so(digits: Images, tmp_path: Path) -> None:
    own = replace(METHODS["gpm"], name="own", changes={"pmnist": {"batch": 20, "cosine": True}})
    results = Run(own.on(small(digits)), own, 1, digits, tmp_path).finish()
    assert results["settings"]["batch"] == 20 and results["settings"]["cosine"] is True
    assert not as_published(results)
    with pytest.raises(ExperimentError, match="made with batch=20, this run has"):
        Run(small(digits, cosine=True), own, 1, digits, tmp_path).finish()
    with pytest.raises(ExperimentError, match="own: has settings for pmnist only"):
        own.on(PROTOCOLS["cifar100"])


def test_the_penalty_on_norms_is_ewcs_formula() -> None:
    torch.manual_seed(0)
    model = SmallResNet()
    session = KeptNorms(NullSpaceOptimizer(torch.optim.Adam(model.parameters()), model), model)
    assert session.penalty() == 0 and len(session.norms) == 6
    expected = torch.zeros((), dtype=torch.float64)
    terms = []
    for task in range(2):
        samples = torch.randn(70, 3, 8, 8)
        session.begin(task, (samples, samples), (samples, samples))
        session.end()
        model.eval()
        fisher = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in session.norms.items()}
        for batch in (samples[:32], samples[32:64], samples[64:]):
            model.zero_grad()
            logits = model(batch, task)
            functional.nll_loss(logits.log_softmax(1), logits.max(1).indices).backward()
            for name, parameter in session.norms.items():
                fisher[name] += len(batch) * parameter.grad.double() ** 2 / 3  # type: ignore[union-attr]
        terms.append((fisher, {name: p.detach().clone().double() for name, p in session.norms.items()}))
        with torch.no_grad():
            for parameter in session.norms.values():
                parameter += 0.1 * torch.randn_like(parameter)
    for fisher, centre in terms:
        for name, parameter in session.norms.items():
            expected += 100 * (fisher[name] * (parameter.detach().double() - centre[name]) ** 2).sum()
    assert float(expected) > 0 and float(torch.as_tensor(session.penalty()).detach()) == pytest.approx(
        float(expected), rel=1e-4
    )


def test_adam_nscl_steps_as_published(colours: Images) -> None:
    """Three steps of the second task against Adam with L2 decay and `P / ||P||_F` behind it, in float64."""
    protocol, row = nscl_protocol(colours), METHODS["adam-nscl"]
    torch.manual_seed(1)
    model = SmallResNet()
    optimizer = row.optimizer(model, protocol)
    assert isinstance(optimizer, NullSpaceOptimizer)
    weight = model.blocks[0].conv2.weight
    with torch.no_grad():  # inputs of lower rank, so that some directions are free
        model.blocks[0].norm2.weight[:3], model.blocks[0].norm2.bias[:3] = 0, 0
    tasks = SplitCIFAR100(colours, seed=1)
    images, labels = tasks.part(0, "train")
    with pytest.warns(NullSpaceWarning, match="cannot be protected are trained"):
        optimizer.consolidate([images], forward=lambda x: model.eval()(x, 0), progress=False)
    row.set_rates(optimizer, protocol, 1)
    basis = optimizer.bases["blocks.0.conv2.weight"].U.double()
    projector = torch.eye(54, dtype=torch.float64) - basis @ basis.T
    assert 27 <= projector.trace().round() < 54
    group = next(g for g in optimizer.param_groups if g["params"][0] is weight)
    assert group["lr"] == pytest.approx(5e-5 / float(projector.norm()), rel=1e-6)
    expected, first, second = weight.detach().double().flatten(1), 0.0, 0.0
    norm_before = model.norm.weight.detach().clone()
    for step in range(1, 4):
        optimizer.zero_grad()
        functional.cross_entropy(model(images, 1), labels).backward()
        gradient = weight.grad.double().flatten(1) + 5e-5 * weight.detach().double().flatten(1)  # type: ignore[union-attr]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = expected - 5e-5 * direction @ projector / projector.norm()
        optimizer.step()
    assert torch.allclose(weight.detach().double().flatten(1), expected, atol=2e-7)
    assert not torch.equal(model.norm.weight, norm_before)  # held by the penalty alone
    assert optimizer.verify().worst < 1e-5


def test_adam_nscl_goes_on_to_the_same_numbers(
    colours: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, row = nscl_protocol(colours), METHODS["adam-nscl"]
    whole = killed_and_taken_up(protocol, "adam-nscl", colours, tmp_path, monkeypatch, stops=(2,))
    half = Run(replace(protocol, precision="bfloat16"), row, 1, colours, tmp_path / "half").finish()
    assert half["settings"]["precision"] == "bfloat16" and half["losses"] != whole["losses"]
    assert half["losses"][0][0] == pytest.approx(whole["losses"][0][0], abs=0.05)
    with pytest.raises(ExperimentError, match="made with precision='bfloat16', this run has None"):
        Run(protocol, row, 1, colours, tmp_path / "half").finish()


@pytest.mark.parametrize(
    ("name", "precision", "products"),
    [
        ("adamw-update", "float32", "exact"),
        ("adamw-update", "bfloat16", "fast"),
        ("adamw-gradient", "bfloat16", "exact"),
        ("gpm", "bfloat16", "fast"),
    ],
)
def test_products_are_fast_where_weights_are_corrected_in_bfloat16(
    name: str, precision: Literal["float32", "bfloat16"], products: str
) -> None:
    optimizer = METHODS[name].optimizer(PermutedMLP(), replace(PROTOCOLS["pmnist"], precision=precision))
    assert isinstance(optimizer, NullSpaceOptimizer)
    assert f"precision='{products}'" in repr(optimizer)


@pytest.mark.parametrize("name", ["gpm", "sgp", "code-cl-plain"])
def test_runs_in_bfloat16_correct_weights_and_come_to_the_same(name: str, digits: Images) -> None:
    exact = small(digits)
    tasks, row = PermutedMNIST(digits, seed=1), METHODS[name]
    made = []
    for protocol in (exact, replace(exact, precision="bfloat16")):
        torch.manual_seed(1)
        model = PermutedMLP()
        optimizer = row.optimizer(model, protocol)
        assert isinstance(optimizer, NullSpaceOptimizer)
        for task in range(2):
            images, labels = (part[:200] for part in tasks.part(task, "train"))
            for first in range(0, 200, 10):
                optimizer.zero_grad()
                functional.cross_entropy(model(images[first : first + 10]), labels[first : first + 10]).backward()
                optimizer.step()
            optimizer.consolidate([images[:30]], progress=False)
        made.append((row.project_in(protocol), optimizer.bases, model))
    (before, bases, one), (after, _, two) = made
    assert (before, after) == ("gradient", "update") and all(basis.rank for basis in bases.values())
    fresh = PermutedMLP()
    for w, other, start in zip(one.parameters(), two.parameters(), fresh.parameters()):
        assert torch.allclose(w, other, atol=1e-5) and not torch.allclose(w, start, atol=3e-3)


def test_patience_halves_the_rate_ends_and_restores_the_best_weights() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plan = Patience(replace(PROTOCOLS["cifar100"], patience=2, least_rate=0.004), optimizer)
    rates, ended = [], []
    for loss in (1.0, 1.1, 1.2, 0.9, 1.1, 1.2):
        nn.init.constant_(model.weight, 10 * loss)
        ended.append(plan.exhausted(model, loss))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.01, 0.01, 0.005, 0.005, 0.005, 0.005]
    assert ended == [False] * 5 + [True]
    plan.restore(model)
    assert model.weight.item() == 9.0  # as they were when the loss was 0.9


def test_validation_images_come_in_a_new_order_in_each_epoch(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Tensor, Tensor]] = []

    def loss_on(model: nn.Module, data: tuple[Tensor, Tensor], batch: int, task: int) -> float:
        shown.append(data)
        return 1.0

    monkeypatch.setattr("reference.published.training.loss_on", loss_on)
    protocol = small(digits, epochs=3, patience=6)
    validation = (torch.arange(784 * 20.0).view(20, 784), torch.arange(20) % 10)
    for _ in range(2):
        model = PermutedMLP()
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), (torch.randn(20, 784), torch.arange(20) % 10),
              validation, protocol, task=1, seed=4)  # fmt: skip
    orders = [images[:, 0].div(784).long() for images, _ in shown]
    assert all(torch.equal(order.sort().values, torch.arange(20)) for order in orders)
    assert all(torch.equal(order % 10, labels) for order, (_, labels) in zip(orders, shown))
    assert all(torch.equal(first, again) for first, again in zip(orders[:3], orders[3:], strict=True))
    different = {tuple(order.tolist()) for order in orders}
    assert len(different) == 3 and tuple(range(20)) not in different
    assert protocol.settings()["shuffled"] and "shuffled" not in replace(protocol, patience=None).settings()


# runs


def _killed(model: nn.Module, optimizer: torch.optim.Optimizer, *_: object) -> list[float]:
    """Train a little, then die."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    raise KeyboardInterrupt


def killed_and_taken_up(
    protocol: Protocol, method: str, images: Images, folder: Path, monkeypatch: pytest.MonkeyPatch, stops: Sequence[int]
) -> dict[str, Any]:
    """The results of a run that is never killed, equal to those of one killed in the training of each of `stops`."""
    whole = Run(protocol, METHODS[method], 1, images, folder / "whole").finish()
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs, "train", lambda *a, stop=stop: train(*a) if a[5] < stop else _killed(*a))
            Run(protocol, METHODS[method], 1, images, folder / "parts").finish()
    resumed = Run(protocol, METHODS[method], 1, images, folder / "parts").finish()
    for key in ("accuracy", "losses", "ranks", "ACC", "BWT"):
        assert resumed[key] == whole[key], key
    return whole


@pytest.mark.parametrize("method", ["sgd", "gpm", "trgp", "trgp-released", "sgp", "code-cl", "adamw-both"])
def test_a_run_goes_on_after_each_task_to_the_same_numbers(
    method: str, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = killed_and_taken_up(small(digits), method, digits, tmp_path, monkeypatch, stops=(1, 2))
    assert [len(r) for r in whole["accuracy"]] == [1, 2, 3]
    assert whole["ACC"] == pytest.approx(np.mean(whole["accuracy"][-1]), abs=1e-3)
    assert whole["BWT"] == pytest.approx(
        np.mean([whole["accuracy"][-1][i] - whole["accuracy"][i][i] for i in range(2)]), abs=1e-3
    )
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [f"{method}-seed1.json"]


@pytest.mark.parametrize("method", ["trgp", "trgp-released", "code-cl", "code-cl-released"])
def test_a_run_with_a_head_for_each_task_goes_on_to_the_same_numbers(
    method: str, colours: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = nscl_protocol(colours, thresholds={"": 0.9}, augment=False, milestones=())
    killed_and_taken_up(protocol, method, colours, tmp_path, monkeypatch, stops=(2,))


def test_a_run_of_other_settings_is_not_taken_up(digits: Images, tmp_path: Path) -> None:
    Run(small(digits, tasks=1), METHODS["sgd"], 1, digits, tmp_path).finish()
    with pytest.raises(ExperimentError, match=r"made with tasks=1, this run has 3.*--output"):
        Run(small(digits), METHODS["sgd"], 1, digits, tmp_path).finish()


def test_validation_runs_say_so_and_leave_the_test_images_alone(digits: Images, tmp_path: Path) -> None:
    del digits["test"]
    results = Run(small(digits), METHODS["sgd"], 1, digits, tmp_path, part="validation").finish()
    assert results["evaluated_on"] == "validation" and "held_out" not in results["settings"]
    more = Run(small(digits, held_out=0.5), METHODS["sgd"], 1, digits, tmp_path / "half", part="validation").finish()
    assert more["settings"]["held_out"] == 0.5 and more["losses"] != results["losses"] and not comparable(more)


def test_alexnet_runs_with_heads_dropout_and_patience(tmp_path: Path) -> None:
    pixels, labels = torch.randint(0, 255, (100, 3, 32, 32), dtype=torch.uint8), torch.arange(20).repeat(5)
    images = {"train": (pixels, labels), "test": (pixels, labels)}
    settings = {"read": lambda root: images, "tasks": 2, "epochs": 2, "samples": 6, "patience": 1}
    protocol = replace(PROTOCOLS["cifar100"], **settings)  # type: ignore[arg-type]
    run = Run(protocol, METHODS["gpm"], 1, images, tmp_path)
    results = run.finish()
    assert len(results["losses"]) == 2 and all(len(row) <= 2 for row in results["losses"])
    assert set(results["ranks"][0]) == {
        *(f"convolutions.{i}.0.weight" for i in range(3)),
        *(f"layers.{i}.0.weight" for i in range(2)),
        "heads.0.weight",
    }


# command line and report


def test_the_command_runs_what_is_missing_and_prints_the_table(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROTOCOLS, "pmnist", small(digits))
    words = ["pmnist", "--output", str(tmp_path), "--methods", "gpm,sgd", "--seeds", "1,2", "--tasks", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| GPM (`gpm`) | 1, 2 |" in printed and "93.91 ± 0.16 (-3), CUBER paper" in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert main([*words, "--report"]) == 0 and main(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} and len(before) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "gmp"], "unknown method 'gmp'; choose from sgd, gpm"),
        (["--seeds", "one"], "--seeds one: expected whole numbers"),
        (["--thresholds", "a,b,c"], "--thresholds a,b,c: expected numbers separated by commas, such as 0.95"),
        (["--thresholds", "0.9,0.9"], "--thresholds 0.9,0.9: pmnist has one each for: lin1, lin2, fc1"),
        (["--thresholds", "0.9,1.5,0.9"], "each is a share of energy"),
        (["--methods", "sgd-tuned", "--epochs", "0"], "epochs=0 must be at least 1"),
        (["--epochs", "0"], "epochs=0 must be at least 1"),
        (["--tasks", "11"], "ten tasks"),
        (["--held-out", "1"], "held_out=1.0 is a share of the training images, from 0.01 to 0.9"),
        (["--rate", "-1"], "rate=-1.0 of gpm must be positive"),
        (["--data-root", "nowhere"], "nowhere holds neither mnist"),
        (["--report"], "holds no finished run of pmnist"),
    ],
)
def test_mistakes_on_the_command_line_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pmnist", "--output", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_foreign_file_among_the_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "gpm-seed1.json").write_text(json.dumps({"method": "gpm"}))
    with pytest.raises(ExperimentError, match=r"gpm-seed1\.json is not a results file"):
        read_runs(tmp_path, "pmnist")


def test_what_counts_as_reproduced() -> None:
    published = Published(93.91, 0.16, -3)
    assert verdict(93.70, 0.06, published) == "-0.21: reproduced"
    assert verdict(93.70, 0.04, published) == "-0.21: not reproduced"
    assert "one seed" in verdict(93.91, None, published)
    assert "no published deviation" in verdict(96.5, 0.1, Published(96.56))
    assert verdict(50.0, 0.1, None) == "no published figure"


def test_the_report_gives_mean_and_deviation_over_seeds() -> None:
    settings = {**PROTOCOLS["pmnist"].settings(), "base": "sgd"}
    common = {"table": "pmnist", "method": "gpm", "evaluated_on": "test", "settings": settings}
    finished = [
        {**common, "seed": seed, "ACC": value, "BWT": -3.0, "losses": [[0.2], [0.4]], "seconds": 10.0}
        for seed, value in ((2, 94.0), (1, 93.8))
    ]
    line = report(finished, "pmnist").splitlines()[-1]
    assert line.startswith("| GPM (`gpm`) | 1, 2 | 93.90 ± 0.14 | -3.00 ± 0.00 | 0.200 / 0.400 | 10 |")
    assert line.endswith("-0.01: reproduced |")
    short = [{**run, "settings": {**settings, "epochs": 1}} for run in finished]
    assert not as_published({**finished[0], "settings": {**settings, "precision": "bfloat16"}})
    assert report(short, "pmnist").endswith("| not the published settings |")
    low = report([{**run, "settings": {**settings, "precision": "bfloat16"}} for run in finished], "pmnist")
    assert "| GPM (`gpm`), in bfloat16 | 1, 2 |" in low and low.endswith("-0.01: reproduced |")
    with pytest.raises(ExperimentError, match="different settings"):
        report([finished[0], short[1]], "pmnist")


@pytest.mark.parametrize("table", ["pmnist", "cifar100"])
def test_committed_results_are_whole_and_consistent(table: str) -> None:
    folder = Path(__file__).parents[2] / "reference" / "results" / table
    for run in read_runs(folder, table):
        row = METHODS[run["method"]]
        settings = {**row.on(PROTOCOLS[table]).settings(), "rate": row.rate_in(row.on(PROTOCOLS[table]))}
        assert settings.items() <= run["settings"].items() and run["evaluated_on"] == "test", run["method"]
        assert comparable(run) != bool(row.changes.get(table, {}).keys() - {"rate"})
        matrix = run["accuracy"]
        assert [len(row) for row in matrix] == list(range(1, 11)) and len(run["losses"]) == 10
        assert run["ACC"] == pytest.approx(np.mean(matrix[-1]), abs=1e-3)
        assert run["BWT"] == pytest.approx(np.mean([matrix[-1][i] - matrix[i][i] for i in range(9)]), abs=1e-3)


def test_papers_own_rates_on_split_cifar100() -> None:
    for name, rate in (("sgp", 0.05), ("code-cl", 0.01), ("gpm", 0.01), ("trgp", 0.01)):
        method = METHODS[name]
        assert method.rate_in(method.on(PROTOCOLS["cifar100"])) == rate
        assert method.rate_in(method.on(PROTOCOLS["pmnist"])) == 0.01
    with pytest.raises(ExperimentError, match="--methods sgp: has settings for pmnist, cifar100 only"):
        METHODS["sgp"].on(PROTOCOLS["cifar100-resnet"])


def test_a_layers_longest_name_decides_and_thresholds_grow() -> None:
    protocol = replace(PROTOCOLS["pmnist"], thresholds={"": 0.9, "lin": 0.8, "lin1": 0.7}, growth=0.01)
    values = torch.full((100,), 1.0)
    for name, tasks, rank in (
        ("lin1.weight", 0, 70),
        ("lin2.weight", 0, 80),
        ("fc1.weight", 0, 90),
        ("fc1.weight", 2, 92),
    ):
        spectrum = Spectrum(values, 100.0, 1.0, 0.0, 0, 100, tasks=tasks, name=name)
        assert abs(methods.by_layer(Energy(), protocol).rank(spectrum) - rank) <= 1, name
    assert [method.name for method in chosen_methods("sgd,gpm,sgd")] == ["sgd", "gpm"]
