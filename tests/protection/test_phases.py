"""Parts of a step that are called by hand, as `first_step` and `second_step` of SAM."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import NEW, OLD, mlp, relative_drift

from nullspace_optim import NullSpaceOptimizer, NumericalRank, StaleAnchorError
from nullspace_optim.errors import OptionError


class SAM(Optimizer):
    """Sharpness-aware minimization as its first public implementation writes it."""

    def __init__(self, parameters: Any, inner: Any = SGD, rho: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = inner(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for p in found:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad, alpha=0.05 / float(norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if "old_p" in self.state[p]):
            p.data = self.state[p].pop("old_p")
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class Late(SAM):
    """Moves the weights once more after the inner optimizer (decoupled weight decay by hand)."""

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        super().second_step(zero_grad)
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data.mul_(0.99)


def wrap(model: nn.Module, base: Any, **options: Any) -> NullSpaceOptimizer:
    optimizer = NullSpaceOptimizer(base, model, **{"policy": NumericalRank(), **options})
    optimizer.consolidate([OLD], progress=False)
    return optimizer


def loss(model: nn.Module) -> Tensor:
    value: Tensor = (model(NEW) - 1).square().mean()
    return value


def by_hand(stepper: Any, model: nn.Module, steps: int = 30) -> None:
    for _ in range(steps):
        loss(model).backward()
        stepper.first_step(zero_grad=True)
        loss(model).backward()
        stepper.second_step(zero_grad=True)


@pytest.mark.parametrize("inner", [SGD, AdamW])
@pytest.mark.parametrize("kind", [SAM, Late])
@pytest.mark.parametrize("options", [{}, {"bias": "joint"}, {"precision": "fast"}], ids=str)
@pytest.mark.parametrize("wrapped", [True, False], ids=["opt", "base"])
def test_two_steps_by_hand_keep_old_outputs(wrapped: bool, options: dict[str, Any], kind: Any, inner: Any) -> None:
    model = mlp()
    base = kind(model.parameters(), inner, lr=1e-2)
    optimizer = wrap(model, base, **options)
    before, first = model(OLD).detach(), float(loss(model))
    bias = model[0].bias.detach().clone()
    by_hand(optimizer if wrapped else base, model)
    assert optimizer.verify().ok
    assert relative_drift(model(OLD), before) <= 1e-5
    assert "bias" in options or torch.equal(model[0].bias, bias)
    assert float(loss(model)) < first


@pytest.mark.parametrize("name", ["SAM", "WSAM", "FriendlySAM", "LookSAM"])
def test_two_steps_of_installed_optimizers_keep_old_outputs(name: str) -> None:
    library: Any = pytest.importorskip("pytorch_optimizer")
    model = mlp()
    arguments = (model, model.parameters()) if name == "WSAM" else (model.parameters(),)
    optimizer = wrap(model, getattr(library, name)(*arguments, SGD, lr=1e-2))
    before, first = model(OLD).detach(), float(loss(model))
    by_hand(optimizer, model)
    assert relative_drift(model(OLD), before) <= 1e-5 and optimizer.verify().ok
    assert float(loss(model)) < first


def test_a_step_with_a_closure_calls_its_phases_untouched() -> None:
    """The numbers of `step(closure)` are those of the optimizer as it is: corrected once, at its end."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = wrap(model, SAM(model.parameters(), SGD, lr=1e-2))

    class Sealed(SAM):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            SAM.first_step.__wrapped__(self, zero_grad=True)  # type: ignore[attr-defined]
            with torch.enable_grad():
                closure()
            SAM.second_step.__wrapped__(self)  # type: ignore[attr-defined]

    other = wrap(twin, Sealed(twin.parameters(), SGD, lr=1e-2))
    for opt, net in ((optimizer, model), (other, twin)):

        def closure(opt: Any = opt, net: Any = net) -> Tensor:
            opt.zero_grad()
            value = loss(net)
            value.backward()
            return value

        for _ in range(5):
            closure()
            opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert optimizer.verify().ok


def test_phases_of_an_optimizer_that_nobody_wrapped_are_as_they_were() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    free = SAM(model.parameters(), SGD, lr=1e-2)
    by_hand(free, model, 3)
    protected = mlp()
    wrap(protected, SAM(protected.parameters(), SGD, lr=1e-2))  # hooks the class
    other = SAM(twin.parameters(), SGD, lr=1e-2)
    by_hand(other, twin, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    pickle.loads(pickle.dumps(other))


def test_detach_leaves_phases_free() -> None:
    model = mlp()
    base = SAM(model.parameters(), SGD, lr=1e-2)
    optimizer = wrap(model, base)
    before = model(OLD).detach()
    by_hand(base, model, 5)
    assert relative_drift(model(OLD), before) <= 1e-5
    optimizer.detach()
    by_hand(base, model, 5)
    assert relative_drift(model(OLD), before) > 1e-4


def test_an_interrupt_in_a_phase_goes_back_to_the_anchors() -> None:
    class Breaking(SAM):
        broken = False

        def second_step(self, zero_grad: bool = False) -> None:
            super().second_step(zero_grad)
            if self.broken:
                self.broken = False
                raise KeyboardInterrupt

    model = mlp()
    base = Breaking(model.parameters(), SGD, lr=1e-2)
    optimizer = wrap(model, base)
    before = model(OLD).detach()
    by_hand(base, model, 2)
    base.broken = True
    with pytest.raises(KeyboardInterrupt):
        by_hand(base, model, 1)
    assert relative_drift(model(OLD), before) <= 1e-5
    by_hand(base, model, 3)
    assert optimizer.verify().ok and relative_drift(model(OLD), before) <= 1e-5


def test_phases_are_protected_again_after_a_step_with_a_closure_broke_off() -> None:
    class Breaking(SAM):
        broken = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.first_step(zero_grad=True)
            closure()
            self.second_step()
            raise MemoryError

    model = mlp()
    base = Breaking(model.parameters(), SGD, lr=1e-2)
    optimizer = wrap(model, base)
    before = model(OLD).detach()

    def closure() -> Tensor:
        value = loss(model)
        value.backward()
        return value

    closure()
    with pytest.raises(MemoryError):
        base.step(closure)
    by_hand(base, model, 3)
    assert relative_drift(model(OLD), before) <= 1e-5 and optimizer.verify().ok


def test_an_edit_is_refused_by_a_phase_as_by_a_step() -> None:
    model = mlp()
    base = SAM(model.parameters(), SGD, lr=1e-2)
    wrap(model, base)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(StaleAnchorError, match="changed outside"):
        by_hand(base, model, 1)


@pytest.mark.parametrize("inner", [SGD, AdamW])
@pytest.mark.parametrize("options", [{}, {"precision": "fast"}, {"project": "both"}], ids=str)
@pytest.mark.parametrize("how", ["by hand", "closure"])
def test_two_steps_around_a_wrapper_keep_old_outputs(how: str, options: dict[str, Any], inner: Any) -> None:
    """`base_optimizer` of SAM is this optimizer."""
    model = mlp()
    wrapped: list[NullSpaceOptimizer] = []

    def build(groups: Any, **settings: Any) -> NullSpaceOptimizer:
        wrapped.append(wrap(model, inner(groups, **settings), **options))
        return wrapped[0]

    sam = SAM(model.parameters(), build, lr=1e-2)
    before, first = model(OLD).detach(), float(loss(model).detach())
    if how == "by hand":
        by_hand(sam, model)
    else:
        for _ in range(30):
            loss(model).backward()
            sam.step(lambda: (sam.zero_grad(), loss(model).backward()))
    assert wrapped[0].verify().ok and relative_drift(model(OLD), before) <= 1e-5
    assert float(loss(model)) < first


def test_the_wrapper_has_the_phases_of_its_base_and_no_others() -> None:
    model = mlp()
    optimizer: Any = wrap(model, SGD(model.parameters(), lr=0.1))
    assert not hasattr(optimizer, "first_step")
    optimizer.detach()
    optimizer = wrap(model, SAM(model.parameters(), SGD, lr=0.1))
    assert hasattr(optimizer, "first_step") and not hasattr(optimizer, "third_step")
    with pytest.raises(AttributeError, match="'NullSpaceOptimizer' object has no attribute 'nothing'"):
        optimizer.nothing  # noqa: B018
    assert hasattr(pickle.loads(pickle.dumps(optimizer)), "first_step")


def test_phases_of_a_superseded_wrapper_refuse_as_its_steps_do() -> None:
    model = mlp()
    base = SAM(model.parameters(), SGD, lr=1e-2)
    wrap(model, base)
    newer = NullSpaceOptimizer(AdamW(model.parameters()), model)
    loss(model).backward()
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptionError, match="took the bases of this one over"):
        base.first_step()
    assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), weights))
    newer.detach()
    base.first_step()
