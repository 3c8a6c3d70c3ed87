"""What both callbacks share: options are checked, and the experts of a mode do not pass to a new optimizer."""

from __future__ import annotations

from typing import Any

import pytest
from two_tasks import build_net, loader, wrap

from nullspace_optim.errors import OptionError
from nullspace_optim.integrations.callback import TaskOptions, Tasks


@pytest.mark.parametrize(("options", "text"), [({"max_batches": 0}, "max_batches=0"), ({"forward": 3}, "forward=3")])
def test_a_wrong_option_is_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        TaskOptions(**options)


def test_experts_of_a_mode_do_not_pass_to_a_new_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_net()
    tasks, first = Tasks(TaskOptions(progress=False)), wrap(model)
    tasks.begin(first)
    tasks.end(first, loader(0), None)
    monkeypatch.setattr(first._core, "mode", object())
    with pytest.raises(OptionError, match=r"with experts \(a mode\) trains beside these parameters"):
        tasks.begin(wrap(model))


def test_an_optimizer_with_tasks_of_its_own_keeps_them() -> None:
    model = build_net()
    tasks, first = Tasks(TaskOptions(progress=False, max_batches=1)), wrap(model)
    report = tasks.end(first, loader(0), None)
    assert report.batches == 1 and tasks.reports == [report]
    first.detach()
    second = wrap(model)
    second.consolidate(loader(0), name="own", progress=False)
    tasks.begin(second)
    assert [task["name"] for task in second._core.store.tasks] == ["own"]
