"""The seam between optimizer and mode: a registry, few methods, and all or nothing at the end of a task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from synthetic import Layer, SyntheticTask, make, train
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from nullspace_optim import IGSP, NullSpaceOptimizer, NullSpaceWarning
from nullspace_optim.errors import OptionError
from nullspace_optim.igsp.mode import IgspMode
from nullspace_optim.optimizer.mode import MODES, Host, register_mode
from nullspace_optim.subspace.basis import Extension


@dataclass(frozen=True)
class Options:
    """Options of the smallest mode: it holds the bias and pulls the weight."""

    pull: float = 0.0


class HoldBias:
    """A mode that notes in which order it is called."""

    def __init__(self, options: Options) -> None:
        self.options, self.calls, self.state = options, list[str](), Extension({"mode": "hold"}, {})

    def attach(self, host: Host) -> None:
        self.model: Any = host.owner()

    def detach(self) -> None:
        self.calls.append("detach")

    def before_step(self, base: Optimizer) -> list[Tensor]:
        self.calls.append("before")
        return [self.model.bias]

    def add_penalty(self) -> None:
        self.calls.append("penalty")
        assert self.model.bias.grad is not None, "nothing is hidden yet"
        self.model.weight.grad += self.options.pull

    def after_step(self, base: Optimizer) -> None:
        self.calls.append("after")

    def consolidate(self, work: Any) -> Any:
        raise NotImplementedError

    def task(self, name: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
        return nullcontext()

    def status(self) -> Any:
        return self.calls

    def regularization(self) -> Tensor:
        return torch.zeros(())


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in dict(MODES).items():
        monkeypatch.setitem(MODES, name, entry)
    monkeypatch.setitem(MODES, "hold", (Options, HoldBias))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("closure", [False, True])
def test_a_registered_mode_is_called_around_each_step_and_its_penalty_once(closure: bool) -> None:
    model = nn.Linear(3, 2)
    opt = NullSpaceOptimizer(SGD(model.parameters(), 1.0), model, mode=Options(pull=0.5))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def loss() -> Tensor:
        opt.zero_grad()
        value: Tensor = model(torch.ones(4, 3)).sum()
        value.backward()
        return value

    if closure:
        opt.step(loss)
    else:
        loss()
        opt.step()
    assert opt.status() == ["before", "penalty", "after"]
    assert torch.equal(model.bias, before["bias"]) and torch.equal(model.bias.grad, torch.full((2,), 4.0))
    torch.testing.assert_close(model.weight, before["weight"] - 4.5)
    opt.detach()
    assert opt.status()[-1] == "detach"


@pytest.mark.usefixtures("registry")
def test_a_line_search_gets_the_penalty_in_every_evaluation() -> None:
    model, evaluations = nn.Linear(3, 2), []
    opt = NullSpaceOptimizer(LBFGS(model.parameters(), 0.1), model, mode="hold")

    def loss() -> Tensor:
        evaluations.append(1)
        opt.zero_grad()
        value: Tensor = model(torch.ones(4, 3)).square().sum()
        value.backward()
        return value

    opt.step(loss)
    assert opt.status() == ["before", *["penalty"] * len(evaluations), "after"] and len(evaluations) > 1


@pytest.mark.usefixtures("registry")
def test_a_mode_is_found_by_its_name_or_by_its_options() -> None:
    model = nn.Linear(3, 2)
    for mode in ("hold", Options(1.0)):
        opt = NullSpaceOptimizer(SGD(model.parameters(), 1.0), model, mode=mode)
        assert isinstance(opt.mode, HoldBias) and opt.mode.options == (Options() if mode == "hold" else mode)
        opt.detach()
    with pytest.raises(OptionError, match=r"mode=3: expected one of 'null-space', 'igsp', 'hold'"):
        NullSpaceOptimizer(SGD(model.parameters(), 1.0), model, mode=3)


def test_igsp_is_registered_by_its_own_package() -> None:
    assert MODES["igsp"] == (IGSP, IgspMode)
    copies = dict(MODES)
    register_mode("igsp", IGSP, IgspMode)
    assert copies == MODES


def test_status_task_and_penalty_of_the_optimizer_are_those_of_its_mode() -> None:
    model, opt = make()
    train(model, opt, SyntheticTask(0), 3)
    assert str(opt.status()) == str(opt.mode.status())
    assert torch.equal(opt.regularization(), opt.mode.regularization())
    x = SyntheticTask(0).inputs(0)
    with torch.no_grad(), opt.task("never"):
        one = model(x)
    with torch.no_grad(), opt.mode.task("never"):
        assert torch.equal(model(x), one)
    plain = Layer()
    with pytest.raises(OptionError, match="needs a mode"):
        _ = NullSpaceOptimizer(AdamW(plain.parameters(), lr=1e-4), plain).mode


def test_detach_may_be_called_twice_and_leaves_no_hook_of_the_mode() -> None:
    model, opt = make()
    train(model, opt, SyntheticTask(0), 2)
    base = opt._core.bases[0]
    opt.detach()
    opt.detach()
    assert len(base.param_groups) == 1 and not model.fc._forward_hooks and not hasattr(model, "igsp")
    assert not base._optimizer_step_pre_hooks and not base._optimizer_step_post_hooks
    before = model.fc.weight.detach().clone()
    model(SyntheticTask(0).inputs(0)).square().mean().backward()
    base.step()
    assert not torch.equal(model.fc.weight, before), "the backbone trains again"


def fingerprint(model: nn.Module, opt: NullSpaceOptimizer) -> dict[str, Any]:
    """Everything a failed consolidation must leave alone, by object where objects matter."""
    state = opt.state_dict()["nullspace"]
    return {
        "parameters": {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        "group": [id(p) for p in opt.param_groups[-1]["params"]],
        "state": {id(p): {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()},
        "tensors": {name: value.clone() for name, value in state["tensors"].items()},
        "metadata": state["metadata"],
        "status": str(opt.status()),
        "bases": list(opt.bases),
        "probes": list(opt._core.store.probes),
    }


def alike(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(alike(*pair) for pair in zip(one, two))
    return bool(one == two)


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("late")


@pytest.mark.parametrize("where", ["record_task", "report_task", "IgspMode._begin", "IgspMode._protect", "run_batches"])
@pytest.mark.parametrize("steps", [5, 25], ids=["in phase 1", "in phase 2"])
@pytest.mark.parametrize(
    "options", [{}, {"orthogonal": "structural", "router": "shared", "router_after": "train"}], ids=["default", "other"]
)
def test_a_consolidation_that_fails_late_changes_nothing(
    where: str, steps: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = [make(**{"cap": 15, "window": 5, "on_cap": "prune", **options}) for _ in range(2)]
    for model, opt in twins:
        train(model, opt, SyntheticTask(0), 25)
        opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
        train(model, opt, SyntheticTask(2), steps)
    (model, opt), (twin, other) = twins
    assert opt.status().phase == (1 if steps == 5 else 2)
    before = fingerprint(model, opt)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="late"):
        patch.setattr(f"nullspace_optim.igsp.mode.{where}", fail)
        opt.consolidate(SyntheticTask(2).loader(), name="two", progress=False)
    assert alike(before, fingerprint(model, opt))
    for one, wrapper in twins:
        train(one, wrapper, SyntheticTask(2), 20, first=steps)
        wrapper.consolidate(SyntheticTask(2).loader(), name="two", progress=False)
    mine, yours = dict(model.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == yours.keys() and all(torch.equal(value, yours[name]) for name, value in mine.items())
    assert str(opt.status()) == str(other.status())


def messages(consolidate: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        consolidate()
    return [str(w.message) for w in caught if issubclass(w.category, NullSpaceWarning)]


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 60, r"60 steps of the task (cap=200): phase 2 never ran, 0 of 2 candidates were pruned; "),
        ({}, 60, r"set IGSP(cap=...) to at most a third of a task's steps, here 20; on_cap='prune' then prunes"),
        ({"on_cap": "prune", "threshold": 0.5}, 1, "phase 2 never ran, 1 of 2 candidates were pruned; "),
        ({"on_cap": "prune", "threshold": 0.5}, 1, "with IGSP(cap=1) two in all"),
        ({"cap": 10}, 10, "phase 1 took all 10 steps of the task (cap=10): phase 2 never ran"),
    ],
)
def test_a_task_without_a_second_phase_is_announced(options: dict[str, object], steps: int, expected: str) -> None:
    model, opt = make(**{"cap": 200, **options})
    train(model, opt, SyntheticTask(0), steps)
    found = messages(lambda: opt.consolidate(SyntheticTask(0).loader(), progress=False))
    assert len(found) == 1 and expected in found[0] and "\n" not in found[0]


def test_a_task_that_reaches_its_second_phase_is_not_announced() -> None:
    model, opt = make(cap=10)
    train(model, opt, SyntheticTask(0), 11)
    assert messages(lambda: opt.consolidate(SyntheticTask(0).loader(), progress=False)) == []
