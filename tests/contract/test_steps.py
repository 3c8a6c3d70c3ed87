"""One step of the wrapper: closures, errors, no gradients, rate zero, a compiled step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import Setting, take_steps
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from wrapped import wrap


@pytest.mark.fault(10)
def test_step_returns_the_closures_loss_and_calls_it_as_often_as_the_base(task: Setting) -> None:
    twin, counts = copy.deepcopy(task), [0, 0]
    base = LBFGS(twin.model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    optimizer = wrap(
        LBFGS(task.model.parameters(), max_iter=4, line_search_fn="strong_wolfe"), task, consolidated=False
    )

    def closure(which: int, own: Setting) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            counts[which] += 1
            own.model.zero_grad()
            loss = own.loss()
            loss.backward()
            return loss

        return evaluate

    for _ in range(3):
        assert torch.equal(base.step(closure(0, twin)), optimizer.step(closure(1, task)))
    assert counts[0] == counts[1] > 3
    optimizer.consolidate([task.old], progress=False)
    assert float(optimizer.step(closure(1, task))) > 0


@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.fault(10)
def test_base_step_with_a_closure_is_protected(task: Setting, holds: Callable[[], None], by_keyword: bool) -> None:
    base = SGD(task.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    wrap(base, task)

    def evaluate() -> Tensor:
        base.zero_grad()
        loss = task.loss()
        loss.backward()
        return loss

    for _ in range(10):
        loss = base.step(closure=evaluate) if by_keyword else base.step(evaluate)
        assert isinstance(loss, Tensor)
    holds()


@pytest.mark.parametrize("at", [1, 3], ids=["first-call", "inside-the-line-search"])
@pytest.mark.fault(11)
def test_a_closure_that_raises_leaves_hooks_and_gradients_right(
    task: Setting, holds: Callable[[], None], at: int
) -> None:
    base = LBFGS(task.model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    optimizer, calls = wrap(base, task), [0]
    hooks = (list(base._optimizer_step_pre_hooks), list(base._optimizer_step_post_hooks))

    def evaluate() -> Tensor:
        calls[0] += 1
        base.zero_grad()
        loss = task.loss()
        loss.backward()
        if calls[0] == at:
            raise KeyError("mine")
        return loss

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(evaluate)
    assert all(p.grad is not None for p in task.model.parameters())
    assert (list(base._optimizer_step_pre_hooks), list(base._optimizer_step_post_hooks)) == hooks
    bias = task.model[0].bias.detach().clone()
    for _ in range(5 if at == 1 else 0):  # LBFGS itself cannot go on after an error inside its line search
        optimizer.step(evaluate)
    assert torch.equal(task.model[0].bias, bias)
    holds()


def test_a_base_that_raises_gives_hidden_gradients_back(task: Setting) -> None:
    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("out of memory")

    optimizer = wrap(Failing(task.model.parameters(), lr=0.1), task)
    task.loss().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert all(p.grad is not None for p in task.model.parameters())


@pytest.mark.parametrize("build", [
    lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    lambda p: LBFGS(p),
], ids=["SGD", "AdamW", "LBFGS"])  # fmt: skip
@pytest.mark.fault(2)
def test_without_any_gradient_a_step_is_a_no_op(task: Setting, build: Callable[..., Optimizer]) -> None:
    optimizer = wrap(build(task.model.parameters()), task)
    before = copy.deepcopy(task.model.state_dict())
    optimizer.step(lambda: torch.zeros(()))
    if not isinstance(optimizer._core.bases[0], LBFGS):
        optimizer.step()
        assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(p.grad is None for p in task.model.parameters())


@pytest.mark.parametrize("rank", [6, 20], ids=["anchor-form", "difference-form"])
@pytest.mark.parametrize("bias", ["freeze", "joint"])
@pytest.mark.fault(4)
def test_zero_gradients_at_rate_zero_are_a_bitwise_no_op(task: Setting, rank: int, bias: str) -> None:
    task.old = torch.randn(rank, 24)
    optimizer = wrap(AdamW(task.model.parameters(), lr=0.01), task, bias=bias)
    take_steps(optimizer, task.loss, 3)
    before, owed = copy.deepcopy(task.model.state_dict()), optimizer._core.protection.owed
    rates = [group["lr"] for group in optimizer.param_groups]
    for _ in range(20):  # what torch.distributed.checkpoint does before it loads
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert optimizer._core.protection.owed == owed


def test_rprop_moves_at_rate_zero_and_is_corrected_all_the_same(task: Setting, holds: Callable[[], None]) -> None:
    optimizer = wrap(torch.optim.Rprop(task.model.parameters(), lr=0.01), task)
    take_steps(optimizer, task.loss, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, task.loss, 5)
    holds()


@pytest.mark.fault(22)
def test_compiled_step(task: Setting, holds: Callable[[], None]) -> None:
    optimizer = wrap(AdamW(task.model.parameters(), lr=torch.tensor(0.01), weight_decay=0.1), task)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    for number in range(8):
        optimizer.zero_grad()
        task.loss().backward()
        step()
        if number == 3:
            frames = counter.frame_count
    holds()
    assert counter.frame_count == frames
    torch._dynamo.reset()
