"""What a user of `torch.optim` expects of any optimizer, point by point: identity, schedulers, scaling, groups."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import Setting, take_steps
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer, lr_scheduler
from training import relative_drift
from wrapped import wrap

from nullspace_optim import NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import OptionError

# ---- identity ----


def test_is_a_torch_optimizer_with_all_hook_tables(task: Setting) -> None:
    optimizer = wrap(AdamW(task.model.parameters()), task)
    assert isinstance(optimizer, Optimizer)
    for register in (
        "register_step_pre_hook", "register_step_post_hook", "register_state_dict_pre_hook",
        "register_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_load_state_dict_post_hook",
    ):  # fmt: skip
        getattr(optimizer, register)(lambda *args: None)
    task.loss().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_hooks_on_the_wrapper_run_in_order_around_the_step(task: Setting) -> None:
    optimizer, seen = wrap(AdamW(task.model.parameters(), lr=0.1), task), []
    weight = task.model[0].weight
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", weight.detach().clone())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", weight.detach().clone())))
    task.loss().backward()
    optimizer.step()
    assert [word for word, _ in seen] == ["before", "after"]
    assert torch.equal(seen[1][1], weight)
    assert not torch.equal(seen[0][1], weight)


def test_state_dict_hooks_may_replace_the_dictionary(task: Setting) -> None:
    optimizer = wrap(AdamW(task.model.parameters()), task)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    loaded = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state.pop("mine")))
    optimizer.load_state_dict(saved)
    assert loaded == [1]
    assert "mine" in saved


def test_param_groups_state_and_defaults_are_the_bases_own(task: Setting) -> None:
    base = AdamW(task.model.parameters(), lr=0.1)
    optimizer = wrap(base, task)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    optimizer.param_groups = base.param_groups[:1]
    optimizer.defaults = {**base.defaults, "extra": 1}
    assert base.defaults["extra"] == 1


def test_param_groups_are_one_live_list(task: Setting) -> None:
    optimizer = wrap(AdamW(task.model.parameters(), lr=0.1), task)
    groups = list(optimizer.param_groups[0]["params"])
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": groups, "lr": 0.2})
    assert optimizer.param_groups is optimizer._core.bases[0].param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [0.2]


def test_nothing_of_a_fused_base_leaks_through_the_wrapper(task: Setting) -> None:
    optimizer = wrap(AdamW(task.model.parameters(), fused=True), task)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert not hasattr(optimizer, "no_such_attribute")


def test_zero_grad_sets_to_none_like_torch(task: Setting) -> None:
    optimizer = wrap(AdamW(task.model.parameters()), task)
    assert inspect.signature(optimizer.zero_grad).parameters["set_to_none"].default is True
    task.loss().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in task.model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in task.model.parameters())


def test_repr_shows_base_and_protection(task: Setting) -> None:
    optimizer = wrap(AdamW(task.model.parameters()), task, consolidated=False)
    assert "nothing protected yet" in repr(optimizer)
    optimizer.consolidate([task.old], progress=False)
    text = repr(optimizer)
    assert "AdamW" in text
    assert "NumericalRank" in text
    assert "2 protected" in text
    assert "tasks: 1" in text


def test_train_and_eval_reach_bases_that_have_modes(task: Setting) -> None:
    class Modes(SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    base = Modes(task.model.parameters(), lr=0.1)
    optimizer = wrap(base, task)
    optimizer.eval()
    assert base.mode == "eval"
    optimizer.train()
    assert base.mode == "train"


# ---- schedulers and scaling ----

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 15)], [5]
    ),
    "Plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("early", [True, False], ids=["before-wrapping", "after-wrapping"])
@pytest.mark.fault(22)
def test_schedulers_move_the_bases_rate(task: Setting, holds: Callable[[], None], name: str, early: bool) -> None:
    base, twin = (SGD(copy.deepcopy(task.model).parameters() if t else task.model.parameters(), lr=0.02, momentum=0.5)
                  for t in (False, True))  # fmt: skip
    expected = SCHEDULERS[name](twin)
    scheduler = SCHEDULERS[name](base) if early else None
    optimizer = wrap(base, task)
    scheduler = scheduler or SCHEDULERS[name](optimizer)
    for _ in range(15):
        take_steps(optimizer, task.loss, 1)
        twin.step()
        for one in (scheduler, expected):
            one.step(1.0) if name == "Plateau" else one.step()
        assert optimizer.param_groups[0]["lr"] == base.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    holds()


@pytest.mark.parametrize("through", ["wrapper", "base"])
@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscaled-first"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.fault(6, 7)
def test_grad_scaler(task: Setting, holds: Callable[[], None], through: str, unscale: bool, fused: bool) -> None:
    base = AdamW(task.model.parameters(), lr=0.01, **({"fused": True} if fused else {"foreach": True}))
    optimizer = wrap(base, task)
    twin = copy.deepcopy(task.model)
    plain = NullSpaceOptimizer(AdamW(twin.parameters(), lr=0.01), twin, policy=NumericalRank())
    plain.consolidate([task.old], progress=False)
    target: Optimizer = optimizer if through == "wrapper" else base
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(10):
        target.zero_grad()
        scaler.scale(task.loss()).backward()
        if unscale:
            scaler.unscale_(target)
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1e6)
        scaler.step(target)
        scaler.update()
        take_steps(plain, lambda: (twin(task.inputs) - task.targets).square().mean(), 1)
    holds()
    assert relative_drift(task.model[0].weight.detach(), twin[0].weight.detach()) < 1e-4


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.fault(5)
def test_a_skipped_scaler_step_changes_nothing(task: Setting, holds: Callable[[], None], fused: bool) -> None:
    base = AdamW(task.model.parameters(), lr=0.01, fused=fused)
    optimizer = wrap(base, task)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for target in (optimizer, base):
        before = copy.deepcopy(task.model.state_dict())
        scaler.scale(task.loss()).backward()
        task.model[0].weight.grad[0, 0] = float("inf")
        scaler.step(target)
        scaler.update()
        target.zero_grad()
        drift = max(relative_drift(p.detach(), before[name]) for name, p in task.model.named_parameters())
        assert drift <= (1e-6 if fused else 0.0)
    for _ in range(3):
        scaler.scale(task.loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    holds()


@pytest.mark.fault(9)
def test_clipping_sees_the_users_norm(task: Setting, holds: Callable[[], None]) -> None:
    optimizer = wrap(AdamW(task.model.parameters(), lr=0.01), task)
    for _ in range(5):
        optimizer.zero_grad()
        task.loss().backward()
        raw = torch.stack([p.grad.norm() for p in task.model.parameters()]).norm()
        assert torch.allclose(torch.nn.utils.clip_grad_norm_(task.model.parameters(), 0.1), raw)
        optimizer.step()
    holds()


def test_gradients_are_left_as_the_user_had_them(task: Setting) -> None:
    optimizer = wrap(AdamW(task.model.parameters(), lr=0.01), task)
    task.loss().backward()
    before = {name: (p.grad, p.grad.clone()) for name, p in task.model.named_parameters()}
    optimizer.step()
    for name, p in task.model.named_parameters():
        assert p.grad is before[name][0]
        assert torch.equal(p.grad, before[name][1])
        assert p.requires_grad


@pytest.mark.parametrize("project", ["update", "both"])
@pytest.mark.fault(8)
def test_accumulation_equals_one_big_batch(task: Setting, holds: Callable[[], None], project: str) -> None:
    twin = copy.deepcopy(task)
    small, big = (wrap(SGD(t.model.parameters(), lr=0.1, momentum=0.9), t, project=project) for t in (task, twin))
    for _ in range(10):
        small.zero_grad()
        for part, target in zip(task.inputs.split(4), task.targets.split(4)):
            ((task.model(part) - target).square().mean() / 4).backward()
        small.step()
        take_steps(big, twin.loss, 1)
    assert relative_drift(task.model[0].weight.detach(), twin.model[0].weight.detach()) < 1e-5
    holds()


# ---- groups and several bases ----


@pytest.mark.fault(25)
def test_added_parameters_are_free_until_the_next_consolidation(task: Setting, holds: Callable[[], None]) -> None:
    head = nn.Linear(8, 3)
    whole = nn.Sequential(*task.model, head)
    optimizer = NullSpaceOptimizer(AdamW(task.model.parameters(), lr=0.01), whole, policy=NumericalRank())
    optimizer.consolidate([task.old], progress=False)
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.1})
    assert optimizer.param_groups[1]["lr"] == 0.1
    start, old = head.weight.detach().clone(), whole(task.old).detach()
    take_steps(optimizer, lambda: whole(task.inputs).square().mean(), 20)
    assert not torch.equal(head.weight, start)
    assert not torch.equal(head.bias, torch.zeros(3))
    report = optimizer.consolidate([task.old], progress=False)
    assert {row.name: row.fate.value for row in report.parameters}["3.weight"] == "protected"
    old = whole(task.old).detach()
    take_steps(optimizer, lambda: whole(task.inputs).square().mean(), 20)
    assert relative_drift(whole(task.old).detach(), old) <= 1e-5
    holds()


def _two(task: Setting, **options: Any) -> NullSpaceOptimizer:
    matrices = [p for p in task.model.parameters() if p.ndim == 2]
    rest = [p for p in task.model.parameters() if p.ndim != 2]
    first = torch.optim.Muon(matrices, lr=0.01) if hasattr(torch.optim, "Muon") else SGD(matrices, lr=0.01)
    return wrap([first, AdamW(rest, lr=0.02)], task, **options)


@pytest.mark.parametrize("rank", [6, 20], ids=["anchor-form", "difference-form"])
def test_several_bases_share_one_store(task: Setting, rank: int) -> None:
    task.old = torch.randn(rank, 24)
    optimizer = _two(task)
    outputs = task.outputs()
    start, first = task.model[0].weight.detach().clone(), task.loss().item()
    scheduler = lr_scheduler.StepLR(optimizer, 5)
    for _ in range(40):
        take_steps(optimizer, task.loss, 1)
        scheduler.step()
        assert optimizer._core.protection.inexact_steps < 16
    assert [base.param_groups[0]["lr"] < 1e-8 for base in optimizer._core.bases] == [True, True]
    assert not torch.equal(task.model[0].weight, start)
    assert task.loss().item() < first
    assert optimizer.verify().ok
    assert relative_drift(task.outputs(), outputs) <= 1e-5 or optimizer.bases["2.weight"].fate.value == "full"
    returned = optimizer.step(lambda: torch.tensor(3.0))
    assert float(returned) == 3.0
    with pytest.raises(OptionError, match="several base optimizers"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_difference_form_becomes_exact_for_every_base_in_turn(task: Setting) -> None:
    task.old = torch.randn(20, 24)
    one, two = ([task.model[0].weight], [task.model[2].weight])
    optimizer = wrap([SGD(one, lr=0.1, momentum=0.9), AdamW(two, lr=0.01)], task, precision="fast")
    pending = []
    for _ in range(40):
        take_steps(optimizer, task.loss, 1)
        pending.append(tuple(optimizer._core.protection.owed["pending"]))
    assert () in pending[:20]
    assert optimizer._core.protection.guards["0.weight"].drift() < 1e-3


# ---- refusals ----


@pytest.mark.fault(35)
def test_a_wrapper_in_a_wrapper_is_refused(task: Setting) -> None:
    with pytest.raises(OptionError, match="already"):
        NullSpaceOptimizer(NullSpaceOptimizer(SGD(task.model.parameters())))


def test_a_base_is_wrapped_once_until_it_is_detached(task: Setting) -> None:
    base = SGD(task.model.parameters())
    first = NullSpaceOptimizer(base)
    with pytest.raises(OptionError, match=r"wrapped already.*detach"):
        NullSpaceOptimizer(base)
    assert first.detach() is base
    NullSpaceOptimizer(base)


@pytest.mark.fault(30)
def test_a_parameter_in_two_bases_is_refused(task: Setting) -> None:
    with pytest.raises(OptionError, match=r"\(16, 24\) is in bases 0 and 1"):
        NullSpaceOptimizer([SGD(task.model.parameters()), AdamW(task.model[:1].parameters())])


def test_a_parameter_twice_in_a_group_is_named_so(task: Setting) -> None:
    with pytest.warns(UserWarning, match="duplicate"):
        base = SGD([*task.model.parameters(), task.model[0].weight], lr=0.1)
    with pytest.raises(OptionError, match="in the groups of its optimizer twice"):
        NullSpaceOptimizer(base)


def test_a_base_of_second_order_says_so(task: Setting) -> None:
    base = SGD(task.model.parameters(), lr=0.1)
    assert not wrap(base, task).is_second_order
    base = SGD(task.model.parameters(), lr=0.1)
    base.is_second_order = True  # as AdaHessian has it
    assert NullSpaceOptimizer(base, task.model).is_second_order


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ([], "list of optimizers"),
        (nn.Linear(1, 1), "torch.optim.Optimizer"),
        (SGD([nn.Parameter(torch.zeros(1))], differentiable=True), "differentiable"),
    ],
    ids=["nothing", "a module", "differentiable"],
)
@pytest.mark.fault(21)
def test_what_cannot_be_wrapped_is_refused(base: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        NullSpaceOptimizer(base)


def test_lbfgs_does_not_share_a_step(task: Setting) -> None:
    with pytest.raises(OptionError, match="LBFGS"):
        NullSpaceOptimizer([LBFGS(task.model[:1].parameters()), SGD(task.model[2:].parameters())])


@pytest.mark.parametrize(
    "option", ["project", "precision", "uncovered", "bias", "norm_stats", "rows", "on_full", "policy"]
)
def test_an_unknown_option_value_names_the_option(task: Setting, option: str) -> None:
    base = SGD(task.model.parameters())
    with pytest.raises(OptionError, match=option):
        NullSpaceOptimizer(base, **{option: "other"})
    assert not base._optimizer_step_pre_hooks


# ---- frameworks ----


@pytest.mark.fault(36)
def test_a_framework_that_subclasses_and_delegates_reads(task: Setting, holds: Callable[[], None]) -> None:
    """Lightning and Fabric wrap an optimizer in a class that derives from its class and hands reads on."""

    class Delegate:
        def __init__(self, optimizer: Optimizer) -> None:
            self.__class__ = type("Delegate" + type(optimizer).__name__, (Delegate, type(optimizer)), {})
            self._optimizer = optimizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._optimizer, name)

        def step(self, closure: Any = None) -> Any:
            return self._optimizer.step(closure)

    optimizer = wrap(AdamW(task.model.parameters(), lr=0.01), task, consolidated=False)
    outside: Any = Delegate(optimizer)
    assert isinstance(outside, NullSpaceOptimizer)
    outside.consolidate([task.old], progress=False)
    assert outside.param_groups[0] is optimizer.param_groups[0]
    scheduler = lr_scheduler.StepLR(outside, 2)
    for _ in range(5):
        take_steps(outside, task.loss, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0.001
    assert optimizer.bases["0.weight"].rank == 6
    assert outside.verify().ok
    outside.load_state_dict(outside.state_dict())
    holds()
