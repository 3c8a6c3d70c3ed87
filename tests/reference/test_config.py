from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch

from reference.command import read_config
from reference.config import for_method, load_config, parse_overrides
from reference.data.tasks import ORDERS, chosen, templates_of
from reference.errors import ExperimentError
from reference.experiment import prepare
from reference.methods import chosen_methods
from reference.run import main, parse


def test_overrides_are_typed() -> None:
    config = load_config(
        "demo", {"output": "o", **parse_overrides(["learning_rate=1e-4", "seeds=1,2", "tasks=shapes"])}
    )
    assert (config.learning_rate, config.seeds, config.tasks) == (1e-4, (1, 2), ("shapes",))


def test_a_method_may_have_settings_of_its_own() -> None:
    config = load_config("demo", {"output": "o", "of_method": {"finetune": {"learning_rate": "1e-5"}}})
    assert for_method(config, "finetune").learning_rate == 1e-5
    assert for_method(config, "nullspace").learning_rate == config.learning_rate == 7e-4


def test_settings_of_a_method_join_those_of_the_preset() -> None:
    paths = {"output": "o", "data_root": "d", "model": "m"}
    preset = load_config("mini", paths)
    assert for_method(preset, "ewc").ewc_weight == 1e4 and for_method(preset, "finetune").learning_rate == 1.5e-4
    pairs = ["of_method={ewc: {learning_rate: 1e-4}, igsp: {learning_rate: 2e-3}}"]
    joined = load_config("mini", {**paths, **parse_overrides(pairs)})
    assert (for_method(joined, "ewc").ewc_weight, for_method(joined, "ewc").learning_rate) == (1e4, 1e-4)
    assert for_method(joined, "igsp").learning_rate == 2e-3
    assert for_method(joined, "igsp").igsp == for_method(preset, "igsp").igsp != {}
    assert for_method(joined, "finetune").learning_rate == 1.5e-4
    bare = load_config("mini", {**paths, **parse_overrides(["of_method={}"])})
    assert bare.of_method == {} and for_method(bare, "finetune").learning_rate == 3e-4


def test_a_given_setting_is_not_lost_to_the_presets_own_values() -> None:
    paths = {"output": "o", "data_root": "d", "model": "m"}
    given = load_config("mini", {**paths, **parse_overrides(["learning_rate=2e-4", "igsp={rank: 6}", "ewc_weight=3"])})
    for method, preset in load_config("mini", paths).of_method.items():
        own = for_method(given, method)
        assert (own.learning_rate, own.igsp, own.ewc_weight) == (2e-4, {"rank": 6}, 3), method
        assert all(getattr(own, key) == preset[key] for key in preset.keys() - {"learning_rate", "igsp", "ewc_weight"})
    pairs = ["learning_rate=2e-4", "of_method={ewc: {learning_rate: 5e-4}, gradient: {energy: 0.9}}"]
    both = load_config("mini", {**paths, **parse_overrides(pairs)})
    rates = {method: for_method(both, method).learning_rate for method in ("finetune", "ewc", "gradient", "igsp")}
    assert rates == {"finetune": 2e-4, "ewc": 5e-4, "gradient": 2e-4, "igsp": 2e-4}
    assert for_method(both, "gradient").energy == 0.9 and for_method(both, "ewc").ewc_weight == 1e4


def test_settings_of_no_method_are_refused() -> None:
    with pytest.raises(ExperimentError, match=r"'ewcc', which is no method: did you mean 'ewc'\?"):
        prepare(load_config("demo", {"output": "o", "of_method": {"ewcc": {"ewc_weight": 1}}}))


@pytest.mark.parametrize(
    "pairs, message",
    [
        (["learning_rat=1"], "did you mean 'learning_rate'"),
        (["iterations=2.5"], "iterations=2.5 must be of type int"),
        (["iterations=many"], "must be of type int"),
        (["iterations=0"], "iterations=0 must be at least 1"),
        (["order=III"], "must be one of I, II"),
        (["energy=1.5"], "energy=1.5 must lie between"),
        (["energy=true"], "must be of type float"),
        (["energy"], "expected key=value"),
        (["energy=0.9", "energy=0.8"], "energy is given twice"),
        (["methods=[]"], "at least one method"),
        (["seeds=1,0,1"], "seeds=1,0,1 must differ"),
        (["of_method={finetune: {learning_rat: 1}}"], "did you mean 'learning_rate'"),
        (["of_method={finetune: 1}"], "must map names of methods to settings"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_config("demo", {"output": "o", **parse_overrides(pairs)})


def test_unknown_preset_method_and_task_list_the_known_ones() -> None:
    with pytest.raises(ExperimentError, match="demo, mini"):
        load_config("maxi", {"output": "o"})
    with pytest.raises(ExperimentError, match="finetune"):
        chosen_methods(("fine-tune",))
    with pytest.raises(ExperimentError, match="unknown task 'mnits'"):
        chosen(["mnits"], ["mnist"])


def test_mini_needs_a_data_root(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "mini", "--model", "x", "--output", "unused"]) == 2
    assert capsys.readouterr().err == "error: preset mini needs --data-root\n"


def test_both_orders_hold_the_same_eleven_tasks_with_templates() -> None:
    assert len(ORDERS["I"]) == 11 and set(ORDERS["I"]) == set(ORDERS["II"])
    assert all("{}" in template for task in ORDERS["I"] for template in templates_of(task))


@pytest.mark.parametrize(("preset", "given", "threads"), [("demo", None, 1), ("demo", "2", 2), ("mini", None, 2)])
def test_the_demo_gets_one_thread_unless_the_environment_names_a_number(
    preset: str, given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suppress(ExperimentError):  # of the preset that needs folders
            read_config(parse(["--preset", preset, "--output", str(tmp_path)]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
