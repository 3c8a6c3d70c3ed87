"""Steps that end in the middle: out of memory, an interrupt, an error of the base or of a closure."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import nullspace_optim
from nullspace_optim import OSF, SGP, FixedRank, NullSpaceOptimizer, NumericalRank, StaleAnchorError
from nullspace_optim.errors import NullSpaceWarning

OLD = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
MOST = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))
NEW = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))


def unhooked(optimizer: AdamW, closure: Any) -> Any:
    """Step as the class does, without the hooks that torch puts there once a plain AdamW was made."""
    step: Any = AdamW.step
    return (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer, closure)


class Breaking(AdamW):
    """Raises after it has moved the weights, once it is told to; at `half`, after it has moved the first one."""

    error: BaseException | None = None
    half = False

    def step(self, closure: Any = None) -> Any:
        error, self.error = self.error, None
        if error is not None and self.half:
            hidden = [p for group in self.param_groups for p in group["params"]][1:]
            kept = [p.grad for p in hidden]
            for p in hidden:
                p.grad = None
            unhooked(self, closure)
            for p, gradient in zip(hidden, kept):
                p.grad = gradient
            raise error
        loss = unhooked(self, closure)
        if error is not None:
            raise error
        return loss


class ThroughData(torch.optim.Optimizer):
    """Writes through `.data`, which leaves no mark, and may stop after the first parameter."""

    error: BaseException | None = None

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        error, self.error = self.error, None
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad + parameter.data, alpha=-0.1)
            if error is not None:
                raise error


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)


def wrap(model: nn.Module, base: Any, rows: Tensor = OLD, **options: Any) -> NullSpaceOptimizer:
    optimizer = NullSpaceOptimizer(base, model, **{"policy": NumericalRank(), **options})
    optimizer.consolidate([rows], progress=False)
    return optimizer


def train(stepper: Any, model: nn.Module, steps: int = 3) -> None:
    for _ in range(steps):
        stepper.zero_grad()
        (model(NEW.to(model[0].weight.dtype)) - 1).square().mean().backward()
        stepper.step()


def drift(now: Tensor, then: Tensor) -> float:
    return float((now - then).detach().norm() / then.detach().norm())


ERRORS = [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory"), SystemExit(1)]


NEARLY_FULL = "ignore:.*(nearly full|no free direction):nullspace_optim.NullSpaceWarning"
ANNOUNCED = "ended before its correction"


@pytest.mark.filterwarnings("error", NEARLY_FULL)
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("rows", [OLD, MOST], ids=["few kept", "most kept"])
@pytest.mark.parametrize("kind", [Breaking, ThroughData])
@pytest.mark.parametrize("wrapped", [True, False], ids=["opt.step", "base.step"])
def test_training_goes_on_from_the_anchors_after_a_step_that_broke_off(
    error: BaseException, rows: Tensor, kind: Any, wrapped: bool
) -> None:
    model = mlp()
    base = kind(model.parameters(), lr=1e-2)
    optimizer = wrap(model, base, rows)
    before = model(rows).detach()
    stepper = optimizer if wrapped else base
    train(stepper, model)
    base.error = error
    with pytest.raises(type(error)):
        train(stepper, model, 1)
    moved = drift(model(rows), before)
    assert moved <= 1e-5 if wrapped else moved > 1e-4, "the base moved nothing: this test tests nothing"
    with nullcontext() if wrapped else pytest.warns(NullSpaceWarning, match=ANNOUNCED):
        train(stepper, model, 1)
    train(stepper, model)
    assert drift(model(rows), before) <= 1e-5
    assert optimizer.verify().ok
    optimizer.consolidate([NEW], progress=False)


@pytest.mark.fault(128)
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("half", [False, True], ids=["all moved", "half moved"])
@pytest.mark.parametrize(
    "use", ["evaluate", "consolidate", "verify", "save", "checkpoint", "copy", "detach", "release"]
)
def test_whatever_comes_next_sees_the_anchors(half: bool, use: str, tmp_path: Any) -> None:
    model = mlp()
    base = Breaking(model.parameters(), lr=1e-2)
    optimizer = wrap(model, base)
    before = model(OLD).detach()
    train(base, model)
    base.error, base.half = KeyboardInterrupt(), half
    with pytest.raises(KeyboardInterrupt):
        train(base, model, 1)
    assert drift(model(OLD), before) > 1e-4, "the base moved nothing: this test tests nothing"
    if use == "evaluate":
        model.eval()(OLD)
    elif use == "consolidate":
        optimizer.consolidate([NEW], progress=False)
    elif use == "verify":
        assert optimizer.verify().ok
    elif use == "save":
        optimizer.save(tmp_path / "bases.safetensors")
    elif use == "copy":
        copy.deepcopy(optimizer)
    elif use == "detach":
        optimizer.detach()
    elif use == "release":
        optimizer.release("2.bias")
    else:
        optimizer.checkpoint().state_dict()
    assert drift(model(OLD), before) <= 1e-5


def test_after_opt_step_broke_off_weights_and_gradients_are_there_at_once() -> None:
    model = mlp()
    base = Breaking(model.parameters(), lr=1e-2)
    optimizer = wrap(model, base)
    before, bias = model(OLD).detach(), model[0].bias.detach().clone()
    base.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        train(optimizer, model, 1)
    assert drift(model(OLD), before) <= 1e-5
    assert torch.equal(model[0].bias, bias)
    assert all(p.grad is not None for p in model.parameters())


def test_an_edit_after_a_step_of_the_wrapper_broke_off_is_found() -> None:
    model = mlp()
    base = Breaking(model.parameters(), lr=1e-2)
    optimizer = wrap(model, base)
    base.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        train(optimizer, model, 1)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(StaleAnchorError, match="changed outside"):
        train(optimizer, model, 1)


def test_an_error_of_the_base_before_it_moves_anything_leaves_every_bit() -> None:
    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("nothing moved")

    model = mlp()
    optimizer = wrap(model, Failing(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="nothing moved"):
        train(optimizer, model, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_kept_bit_for_bit_goes_back_from_a_move_within_rounding() -> None:
    class Nudging(SGD):
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(1 + 2**-22)  # leaves no mark
            raise RuntimeError("nudged")

    model, old = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3)), torch.tensor([[0, 1], [2, 1]])
    optimizer = NullSpaceOptimizer(Nudging(model.parameters(), lr=0.1), model, policy=NumericalRank())
    optimizer.consolidate([old], progress=False)
    bias, rows = model[2].bias.detach().clone(), model[0].weight[:3].detach().clone()
    model(old).square().sum().backward()
    with pytest.raises(RuntimeError, match="nudged"):
        optimizer.step()
    assert torch.equal(model[2].bias, bias) and torch.equal(model[0].weight[:3], rows)


def test_an_edit_that_a_step_refuses_is_not_undone_by_the_refusal() -> None:
    model = mlp()
    optimizer = wrap(model, AdamW(model.parameters()))
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    edited = model[0].weight.detach().clone()
    for _ in range(2):
        with pytest.raises(StaleAnchorError, match=r"opt\.reanchor\(\).*opt\.restore\(\)"):
            train(optimizer, model, 1)
        assert torch.equal(model[0].weight, edited)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_closure_that_raises_leaves_a_step_that_can_be_taken_again(fails_at: int) -> None:
    model = mlp()
    base = torch.optim.LBFGS(model.parameters(), max_iter=4)
    optimizer = wrap(model, base)
    before = model(OLD).detach()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = (model(NEW) - 1).square().mean()
        loss.backward()
        if calls == fails_at:
            raise RuntimeError("in the closure")
        return loss

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(closure)
    assert drift(model(OLD), before) <= 1e-5
    assert optimizer.verify().ok


def test_an_evaluation_inside_a_closure_does_not_end_the_step() -> None:
    model = mlp()
    optimizer = wrap(model, torch.optim.LBFGS(model.parameters(), max_iter=4))
    twin = mlp()
    other = wrap(twin, torch.optim.LBFGS(twin.parameters(), max_iter=4))
    before = model(OLD).detach()

    def closure(opt: NullSpaceOptimizer, net: nn.Module, evaluating: bool) -> Callable[[], Tensor]:
        calls = []

        def evaluate() -> Tensor:
            opt.zero_grad()
            calls.append(1)
            if evaluating and len(calls) == 3:
                net.eval()(OLD)
                net.train()
            loss = (net(NEW) - 1).square().mean()
            loss.backward()
            return loss

        return evaluate

    for _ in range(3):
        optimizer.step(closure(optimizer, model, True))
        other.step(closure(other, twin, False))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert drift(model(OLD), before) <= 1e-5


def test_a_base_whose_step_calls_that_of_its_class_is_corrected_to_the_end() -> None:
    class Decaying(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_mul_(group["params"], 0.99)
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_mul_(group["params"], 0.99)
            return loss

    model = mlp()
    optimizer = wrap(model, Decaying(model.parameters(), lr=0.1))
    before = model(OLD).detach()
    train(optimizer, model, 5)
    assert drift(model(OLD), before) <= 1e-5 and optimizer.verify().ok


def broken_off() -> tuple[nn.Module, Breaking, NullSpaceOptimizer]:
    """Return a protected model whose base was interrupted in a step of its own."""
    model = mlp()
    base = Breaking(model.parameters(), lr=1e-2)
    optimizer = wrap(model, base)
    base.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        train(base, model, 1)
    return model, base, optimizer


def test_an_edit_after_a_step_of_the_base_broke_off_is_said() -> None:
    """Nobody can tell the writes of a step that broke off from later ones, so they are announced together."""
    model, base, optimizer = broken_off()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.warns(NullSpaceWarning, match=r"what \d parameters keep was put back now.*opt\.reanchor\(\)"):
        train(base, model, 1)
    assert optimizer.verify().ok


def test_reanchor_accepts_what_a_step_that_broke_off_left() -> None:
    model, base, optimizer = broken_off()
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    meant = copy.deepcopy(model.state_dict())
    optimizer.reanchor()
    assert all(torch.equal(value, meant[name]) for name, value in model.state_dict().items())
    before = model[0](OLD).detach()
    train(base, model)
    assert drift(model[0](OLD), before) <= 1e-5 and optimizer.verify().ok


@pytest.mark.parametrize("where", [0, 1])
def test_one_of_several_bases_breaks_off(where: int) -> None:
    model = mlp()
    bases = [Breaking(model[0].parameters(), lr=1e-2), Breaking(model[2].parameters(), lr=1e-2)]
    optimizer = wrap(model, bases)
    before = model(OLD).detach()
    train(optimizer, model)
    bases[where].error = MemoryError()
    with pytest.raises(MemoryError):
        train(optimizer, model, 1)
    assert drift(model(OLD), before) <= 1e-5
    assert all(p.grad is not None for p in model.parameters())
    train(optimizer, model)
    assert drift(model(OLD), before) <= 1e-5 and optimizer.verify().ok


@pytest.mark.parametrize("ours_first", [True, False])
def test_hooks_of_somebody_else_may_fail(ours_first: bool) -> None:
    model = mlp()
    base = AdamW(model.parameters(), lr=1e-2)
    fail = False

    def hook(*_: Any) -> None:
        if fail:
            raise RuntimeError("a hook of somebody else")

    if not ours_first:
        base.register_step_post_hook(hook)
    optimizer = wrap(model, base)
    base.register_step_post_hook(hook)
    before = model(OLD).detach()
    fail = True
    with pytest.raises(RuntimeError, match="somebody else"):
        train(optimizer, model, 1)
    assert drift(model(OLD), before) <= 1e-5 and all(p.grad is not None for p in model.parameters())
    fail = False
    train(optimizer, model)
    assert drift(model(OLD), before) <= 1e-5 and optimizer.verify().ok


@pytest.mark.parametrize("wrapped", [True, False], ids=["opt.step", "base.step"])
def test_the_weights_that_schedule_free_keeps_survive_an_interrupt(wrapped: bool) -> None:
    schedulefree = pytest.importorskip("schedulefree")

    class Breaking(schedulefree.SGDScheduleFree):  # type: ignore[misc, name-defined]
        error: BaseException | None = None

        def step(self, closure: Any = None) -> Any:
            kind = schedulefree.SGDScheduleFree.step
            loss = (kind.__wrapped__ if getattr(kind, "hooked", False) else kind)(self, closure)
            error, self.error = self.error, None
            if error is not None:
                raise error
            return loss

    model = mlp()
    base = Breaking(model.parameters(), lr=0.5)
    base.train()
    optimizer = wrap(model, base)
    train(optimizer, model, 5)
    before = model(OLD).detach()
    base.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        train(optimizer if wrapped else base, model, 1)
    if not wrapped:
        model.eval()(OLD)
    assert drift(model(OLD), before) <= 1e-5
    base.eval()
    assert drift(model(OLD), before) <= 1e-5


# ---- an interrupt at any line ----


class Interrupting:
    """Raises a KeyboardInterrupt at the `line`-th line of this library, or of a base, that runs inside."""

    def __init__(self, line: int) -> None:
        self.left, self.raised = line, False

    def __enter__(self) -> Interrupting:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDERS):
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0 and not self.raised:
                self.raised = True
                raise KeyboardInterrupt
        return self.trace


FOLDERS = (str(Path(nullspace_optim.__file__).parent), str(Path(torch.optim.__file__).parent / "sgd.py"))
SETTINGS: dict[str, dict[str, Any]] = {
    "anchor form": {},
    "difference form": {"policy": FixedRank(20)},
    "fast": {"precision": "fast"},
    "both": {"project": "both"},
    "joint": {"bias": "joint"},
    "two sides": {"policy": OSF(0.4)},
    "soft": {"policy": SGP(0.9)},
    "soft on two sides": {"policy": SGP(0.9)},
    "stacks": {},
}


class Tied(nn.Sequential):
    """One weight for both directions, so that it has a basis on each side."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self[0](x).tanh() @ self[0].weight
        return result


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "soft on two sides": lambda: Tied(nn.Linear(24, 32)),
    "stacks": lambda: nn.Sequential(*[nn.Linear(24, 24) for _ in range(4)]),
}


def kept(optimizer: NullSpaceOptimizer) -> bool:
    """True if every anchor holds and everything frozen is bitwise what it was."""
    guards = optimizer._core.protection.guards.values()
    return all(torch.equal(g.parameter, g.basis.kept) if g.immovable else g.drift() <= 1e-5 for g in guards)


@pytest.mark.fault(128)
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("evaluating", [False, True], ids=["step", "evaluation"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["opt.step", "base.step"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_may_be_interrupted_at_any_line(setting: str, wrapped: bool, evaluating: bool) -> None:
    model = MODELS.get(setting, mlp)()
    base = SGD(model.parameters(), lr=1e-2, momentum=0.9)
    optimizer = wrap(model, base, **SETTINGS[setting])
    stepper: Any = optimizer if wrapped else base
    assert bool(optimizer._core.protection.forms.stacks) == (setting == "stacks")
    train(stepper, model)
    line, raised = 0, True
    while raised:
        optimizer.zero_grad()
        (model(NEW) - 1).square().mean().backward()
        try:
            with Interrupting(line) as interrupt:
                stepper.step()
        except KeyboardInterrupt:
            pass
        raised = interrupt.raised
        if evaluating:
            model.eval()(OLD)
            model.train()
            assert kept(optimizer), line
        else:
            train(stepper, model, 1)
            optimizer._core.protection.make_exact()
            assert kept(optimizer), line
        assert all(p.grad is not None for p in model.parameters()), line
        line += 3
    assert line > 20
    assert optimizer.verify().ok
