"""What keeps an optimizer alive, and how often hooks of others see its steps."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from training import NEW, OLD, mlp, relative_drift, train, wrap

from nullspace_optim import IGSP, NullSpaceOptimizer


def protected(model: nn.Module, bases: Any, **options: Any) -> NullSpaceOptimizer:
    optimizer = wrap(model, bases, **options)
    train(optimizer, model, 2)
    optimizer.consolidate([OLD], progress=False)
    return optimizer


OPTIONS: dict[str, dict[str, Any]] = {
    "anchors": {},
    "gradient hooks": {"project": "both"},
    "fast": {"precision": "fast"},
    "joint": {"bias": "joint"},
    "experts": {"mode": IGSP(target_modules=("0",), rank=2)},
}


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_an_optimizer_is_freed_with_its_last_reference(options: str, count: int) -> None:
    model = mlp()
    parts = [model.parameters()] if count == 1 else [model[0].parameters(), model[2].parameters()]
    bases = [SGD(part, lr=0.1, momentum=0.9) for part in parts]
    optimizer = protected(model, bases if count == 2 else bases[0], **OPTIONS[options])
    train(optimizer, model)
    optimizer.verify()
    optimizer.state_dict()
    core = optimizer._core
    found = [weakref.ref(thing) for thing in (optimizer, *bases, core, core.protection)]
    del core
    gc.collect()
    gc.disable()
    try:
        del optimizer, bases, parts
        assert [reference() for reference in found] == [None] * len(found)
        weight = weakref.ref(next(model.parameters()))
        del model
        assert options == "experts" or weight() is None
    finally:
        gc.enable()


def test_a_step_that_broke_off_keeps_nothing_alive() -> None:
    class Broken(SGD):
        def step(self, closure: Any = None) -> Any:
            raise MemoryError

    model = mlp()
    optimizer = wrap(model, base := Broken(model.parameters(), lr=0.1))
    optimizer.consolidate([OLD], progress=False)
    with pytest.raises(MemoryError):
        train(base, model, 1)
    found = [weakref.ref(thing) for thing in (optimizer, base, optimizer._core)]
    gc.collect()
    gc.disable()
    try:
        del optimizer, base
        assert [reference() for reference in found] == [None] * 3
    finally:
        gc.enable()


def test_a_scheduler_leaves_no_reference_to_the_optimizer() -> None:
    """`test_no_cyclic_references` of torch."""
    parameter = nn.Parameter(torch.empty(10))
    optimizer = NullSpaceOptimizer(SGD([parameter], lr=0.5))
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    del scheduler
    found = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert found() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kept", ["base", "wrapper", "one of two bases", "checkpoint"])
def test_any_part_that_is_left_keeps_the_protection(kept: str) -> None:
    model = mlp()
    parts = [model[0].parameters(), model[2].parameters()] if kept == "one of two bases" else [model.parameters()]
    bases: list[Any] = [AdamW(part, lr=0.01) for part in parts]
    optimizer: Any = protected(model, bases)
    checkpoint = optimizer.checkpoint()
    before = model(OLD).detach()
    if kept == "wrapper":
        bases.clear()
    elif kept == "checkpoint":
        del optimizer
        bases.clear()
        assert set(checkpoint.state_dict()) == {"model", "optimizer", "protection"}
        return
    else:
        del optimizer, checkpoint, bases[1:]
    gc.collect()
    train(optimizer if kept == "wrapper" else bases[0], model, 20)
    assert relative_drift(model(OLD), before) <= 1e-5


# ---- global step hooks ----


class Seen:
    """Global step hooks that note the optimizers they are called with."""

    def __enter__(self) -> list[tuple[str, Any]]:
        calls: list[tuple[str, Any]] = []
        self.handles = [
            register_optimizer_step_pre_hook(lambda opt, args, kwargs: calls.append(("before", opt))),  # type: ignore[func-returns-value]
            register_optimizer_step_post_hook(lambda opt, args, kwargs: calls.append(("after", opt))),  # type: ignore[func-returns-value]
        ]
        return calls

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("how", ["step", "closure", "scaler", "scheduled"])
def test_global_step_hooks_see_one_step_of_the_optimizer_that_was_stepped(how: str, count: int) -> None:
    model = mlp()
    parts = [model.parameters()] if count == 1 else [model[0].parameters(), model[2].parameters()]
    bases = [SGD(part, lr=0.1) for part in parts]
    optimizer = protected(model, bases)
    if how == "scheduled":  # patches `step` of the object
        lr_scheduler.StepLR(bases[0], 1)
        lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = scaler.scale(model(NEW).square().mean()) if how == "scaler" else model(NEW).square().mean()
    loss.backward()
    with Seen() as calls:
        if how == "scaler":
            scaler.step(optimizer)
        elif how == "closure":
            optimizer.step(lambda: loss.detach())
        else:
            optimizer.step()
        assert calls == [("before", optimizer), ("after", optimizer)]
        calls.clear()
        bases[0].step()
        assert calls == [("before", bases[0]), ("after", bases[0])]


def test_global_step_hooks_see_every_step_of_an_optimizer_inside_a_closure() -> None:
    model, other = mlp(), SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer = protected(model, SGD(model.parameters(), lr=0.1))
    with Seen() as calls:
        optimizer.step(lambda: other.step())
        assert [opt for _, opt in calls] == [optimizer, other, other, optimizer]
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        other.step()
        assert [opt for _, opt in calls] == [optimizer, other, other]


def test_a_global_step_hook_may_remove_itself_within_a_step() -> None:
    model = mlp()
    optimizer = protected(model, SGD(model.parameters(), lr=0.1))
    calls: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: calls.append(opt))  # type: ignore[func-returns-value]

    def closure() -> Any:
        handle.remove()
        return model(NEW).sum()

    optimizer.step(closure)
    optimizer.step()
    assert calls == []


def test_local_hooks_run_once_for_their_object_and_may_change_arguments() -> None:
    model = mlp()
    optimizer = protected(model, base := SGD(model.parameters(), lr=0.1))
    seen: list[Any] = []

    def before(opt: Any, args: Any, kwargs: Any) -> Any:
        seen.append((opt, args[0]))
        return (args[0], lambda: torch.tensor(7.0)), kwargs

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append((opt, args[0])))
    base.register_step_post_hook(lambda opt, args, kwargs: seen.append((opt, args[0])))
    assert float(optimizer.step(lambda: torch.tensor(3.0))) == 7.0
    assert seen == [(optimizer, optimizer), (base, base), (optimizer, optimizer)]
