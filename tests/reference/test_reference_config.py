from __future__ import annotations

import pytest

from reference.config import for_method, load_config, parse_overrides
from reference.errors import ExperimentError
from reference.methods import chosen_methods
from reference.run import main
from reference.tasks import ORDERS, chosen, templates_of


def test_overrides_are_typed() -> None:
    config = load_config(
        "demo", {"output": "o", **parse_overrides(["learning_rate=1e-4", "seeds=1,2", "tasks=shapes"])}
    )
    assert (config.learning_rate, config.seeds, config.tasks) == (1e-4, (1, 2), ("shapes",))


def test_a_method_may_have_settings_of_its_own() -> None:
    config = load_config("demo", {"output": "o", "of_method": {"finetune": {"learning_rate": "1e-5"}}})
    assert for_method(config, "finetune").learning_rate == 1e-5
    assert for_method(config, "nullspace").learning_rate == config.learning_rate == 7e-4


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
        (["methods=[]"], "at least one method"),
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
