"""Gradients of stacked weights wait for the end of their backward pass; who reads them then finds them projected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from nullspace_optim import FixedRank, NullSpaceOptimizer
from nullspace_optim.errors import NullSpaceWarning
from nullspace_optim.protection.weight_stack import GradientQueue, WeightStack

ROWS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


class Deep(nn.Module):
    """Six layers `[16, 16]`, of which one can be left out or recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(6))
        self.without: int | None = None
        self.reentrant: bool | None = None

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x + layer(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number == self.without:
                continue
            if self.reentrant is None or not self.training:
                x = self.block(layer, x)
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return x


def loss_of(model: nn.Module, x: Tensor = NEW) -> Tensor:
    return (model(x) - 1).square().mean()


def protected(dtype: torch.dtype = torch.float32) -> tuple[Deep, NullSpaceOptimizer]:
    """A model with six stacked weights after a consolidation and a step."""
    torch.manual_seed(0)
    model = Deep().to(dtype)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), 1e-3), model, policy=FixedRank(5), project="both")
    optimizer.consolidate([ROWS.to(dtype)], progress=False)
    loss_of(model, NEW.to(dtype)).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert [len(stack.guards) for stack in optimizer._core.protection.forms.stacks] == [6]
    return model, optimizer


def kept(optimizer: NullSpaceOptimizer) -> list[float]:
    """Return the share of each gradient that lies in kept directions."""
    found = []
    for guard in optimizer._core.protection.guards.values():
        gradient, basis = guard.parameter.grad, guard.basis.subspaces["right"].basis[0]
        if gradient is not None and float(gradient.norm()):
            wide = gradient.to(basis.dtype)
            found.append(float((wide @ basis).norm() / wide.norm()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_that_each_hook_would_have_left(dtype: torch.dtype, monkeypatch: Any) -> None:
    model, optimizer = protected(dtype)
    x = NEW.to(dtype)
    loss_of(model, x).backward()
    together = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    optimizer.zero_grad()
    monkeypatch.setattr("nullspace_optim.protection.weight_stack.GradientQueue.add", lambda queue, guard: False)
    loss_of(model, x).backward()
    eps = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for one, p in zip(together, model.parameters()):
        assert p.grad is not None and float((one - p.grad).norm()) <= eps * float(p.grad.norm())


def test_one_product_a_side_projects_all_gradients(monkeypatch: Any) -> None:
    calls: list[int] = []
    original = WeightStack.project
    model, optimizer = protected()
    monkeypatch.setattr(
        WeightStack, "project", lambda stack, waiting: calls.append(len(waiting)) or original(stack, waiting)
    )
    loss_of(model).backward()
    assert calls == [6] and max(kept(optimizer)) < 1e-5
    optimizer.zero_grad()
    loss_of(model).backward()
    assert calls == [6, 6]


def test_the_free_share_of_a_new_task_is_that_of_each_hook(monkeypatch: Any) -> None:
    norms = []
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(GradientQueue, "add", lambda queue, guard: False)
        model, optimizer = protected()
        optimizer.consolidate([ROWS[:3]], progress=False)
        loss_of(model).backward()
        norms.append([torch.stack(guard.norms) for guard in optimizer._core.protection.guards.values()])  # type: ignore[arg-type]
        optimizer.step()
        assert all(guard.measured and guard.norms is None for guard in optimizer._core.protection.guards.values())
    assert len(norms[0]) == 6 and torch.allclose(torch.stack(norms[0]), torch.stack(norms[1]), rtol=1e-5)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("without", [None, 2])
def test_parts_of_the_model_and_recomputed_blocks(reentrant: bool | None, without: int | None) -> None:
    model, optimizer = protected()
    model.reentrant, model.without = reentrant, without
    before = [p.detach().clone() for p in model.parameters()]
    x = NEW.clone().requires_grad_()
    for _ in range(3):  # gradients accumulate
        loss_of(model, x).backward()
        assert len(kept(optimizer)) == (6 if without is None else 5) and max(kept(optimizer)) < 1e-5
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert without is None or model.layers[without].weight.grad is None


def test_a_pass_that_fails_leaves_nothing_that_a_later_one_or_a_step_forgets() -> None:
    model, optimizer = protected()

    def interrupt(gradient: Tensor) -> Tensor:
        raise RuntimeError("stop")

    handle = model.layers[1].weight.register_hook(interrupt)
    with pytest.raises(RuntimeError, match="stop"):
        loss_of(model).backward()
    handle.remove()
    assert max(kept(optimizer)) > 0.01  # the engine calls nothing after an error
    once = copy.deepcopy([p.grad for p in model.parameters()])
    loss_of(model).backward()
    assert max(kept(optimizer)) < 1e-5
    for p, gradient in zip(model.parameters(), once):
        p.grad = gradient
    handle = model.layers[1].weight.register_hook(interrupt)
    with pytest.raises(RuntimeError, match="stop"):
        loss_of(model).backward()
    handle.remove()
    optimizer.step()
    assert max(kept(optimizer)) < 1e-5


def test_clipping_and_a_step_within_the_pass_find_gradients_projected() -> None:
    model, optimizer = protected()
    loss_of(model).backward()
    whole = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)) == pytest.approx(float(whole))
    assert max(kept(optimizer)) < 1e-5
    optimizer.zero_grad()
    seen: list[float] = []

    def step(parameter: Tensor) -> None:
        optimizer.step()
        seen.append(max(kept(optimizer)))

    model.layers[0].weight.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    loss_of(model).backward()
    assert seen[0] < 1e-5
    assert max(guard.drift() for guard in optimizer._core.protection.guards.values()) < 1e-5


def test_bases_that_change_between_passes_are_followed() -> None:
    model, optimizer = protected()
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.consolidate([NEW], progress=False)
    loss_of(model).backward()
    assert len(kept(optimizer)) == 6 and max(kept(optimizer)) < 1e-5
    optimizer.release("layers.0.weight")
    optimizer.zero_grad()
    loss_of(model).backward()
    assert len(kept(optimizer)) == 5 and max(kept(optimizer)) < 1e-5
    optimizer.detach()
    optimizer.zero_grad()
    loss_of(model).backward()
    assert model.layers[3].weight.grad is not None


def interrupted_pass(model: Deep) -> None:
    """A backward pass that fails after four of six gradients have accumulated."""

    def interrupt(gradient: Tensor) -> Tensor:
        raise RuntimeError("stop")

    handle = model.layers[1].weight.register_hook(interrupt)
    with pytest.raises(RuntimeError, match="stop"):
        loss_of(model).backward()
    handle.remove()


@pytest.mark.parametrize("size", [0, 20])
def test_weights_taken_away_or_grown_leave_the_others_to_project(size: int) -> None:
    model, optimizer = protected()
    weight = model.layers[0].weight
    weight.data = torch.cat([weight.data, torch.zeros(4, 16)]) if size else torch.empty(0)
    model.without = 0
    loss_of(model).backward()
    assert len(kept(optimizer)) == 5 and max(kept(optimizer)) < 1e-5


def test_a_weight_that_grows_while_gradients_wait_does_not_stop_the_step() -> None:
    model, optimizer = protected()
    interrupted_pass(model)
    weight = model.layers[5].weight
    weight.grad, weight.data = None, torch.cat([weight.data, torch.zeros(4, 16)])
    with pytest.warns(NullSpaceWarning, match="has grown from 16 to 20 rows"):
        optimizer.step()
    assert len(kept(optimizer)) == 3 and max(kept(optimizer)) < 1e-5


@pytest.mark.parametrize("everywhere", [False, True])
def test_later_hooks_of_a_parameter_find_gradients_projected(everywhere: bool) -> None:
    model, optimizer = protected()
    seen: list[float] = []
    for layer in model.layers if everywhere else model.layers[:1]:
        layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append(max(kept(optimizer))))
    loss_of(model).backward()
    assert len(seen) == (6 if everywhere else 1) and max(seen) < 1e-5


@pytest.mark.parametrize("change", ["consolidate", "release", "load_state_dict", "detach", "closure"])
def test_what_waits_after_a_failed_pass_is_projected_in_time(change: str) -> None:
    model, optimizer = protected()
    bases = {name: guard.basis.subspaces["right"].basis[0] for name, guard in optimizer._core.protection.guards.items()}
    saved = optimizer.state_dict()
    if change == "closure":
        optimizer.step(lambda: interrupted_pass(model) or 0.0)  # type: ignore[arg-type, return-value, func-returns-value]
    else:
        interrupted_pass(model)
        arguments = {"consolidate": ([NEW],), "release": ("layers.5.weight",), "load_state_dict": (saved,)}
        getattr(optimizer, change)(*arguments.get(change, ()))
    gradients = [(p.grad, bases[name]) for name, p in model.named_parameters() if p.grad is not None]
    assert len(gradients) == 4
    assert max(float((gradient @ basis).norm() / gradient.norm()) for gradient, basis in gradients) < 1e-5


@pytest.mark.parametrize("view", [False, True])
def test_data_parallel_training_in_one_process_hands_projected_gradients_on(view: bool, tmp_path: Any) -> None:
    model, optimizer = protected()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        loss_of(wrapped).backward()
    finally:
        dist.destroy_process_group()
    assert len(kept(optimizer)) == 6 and max(kept(optimizer)) < 1e-5


def test_compiled_autograd_projects_gradients() -> None:
    model, optimizer = protected()
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss_of(model).backward()
    assert len(kept(optimizer)) == 6 and max(kept(optimizer)) < 1e-5
