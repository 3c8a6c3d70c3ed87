"""Activation checkpointing, empty batches, keyword calls and half precision: each works, or one error says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from nullspace_optim import IGSP, ConsolidationError, NullSpaceOptimizer
from nullspace_optim.errors import OptionError, PruningError

OPTIONS: dict[str, Any] = {"target_modules": ["0.mlp", "1.mlp"], "rank": 2, "candidates": 2, "cap": 8, "steps": 20}


class Block(nn.Module):
    """A residual MLP that takes keywords only, another tensor first."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, *, mask: Tensor, hidden: Tensor) -> Tensor:
        return hidden + mask * self.mlp(hidden)


class Encoder(nn.Module):
    """Two blocks, each repeated by backward where `reentrant` says how."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, *, mask: Tensor, hidden: Tensor) -> Tensor:
        for block in self.blocks:

            def run(h: Tensor, block: nn.Module = block) -> Tensor:
                return block(mask=mask, hidden=h)

            hidden = run(hidden) if self.reentrant is None else checkpoint(run, hidden, use_reentrant=self.reentrant)
        return hidden


class Net(nn.Module):
    """An encoder called by keywords, and a head."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(reentrant), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(mask=torch.ones(24), hidden=x))


def inputs(place: float, seed: int, count: int = 16) -> Tensor:
    drawn = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))
    return drawn + place * torch.sin(torch.arange(24) * (1.0 + place))


def step(model: Net, opt: NullSpaceOptimizer, x: Tensor, by_hand: bool = False) -> Tensor:
    loss = (model(x) - 1).square().mean()
    opt.zero_grad()
    (loss + opt.regularization() if by_hand else loss).backward()
    opt.step()
    return loss.detach()


def story(
    reentrant: bool | None, grad: bool = True, by_hand: bool = False, steps: int = 20, **options: Any
) -> tuple[Net, NullSpaceOptimizer, list[Tensor]]:
    """Two tasks; losses of all steps. `steps` of the second one."""
    torch.manual_seed(0)
    model, losses = Net(reentrant), []
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=IGSP(**{**OPTIONS, **options}))
    for task, count in ((0, 20), (1, steps)):
        for number in range(count):
            x = inputs(3.0 * task, 100 * task + number).requires_grad_(grad)
            losses.append(step(model, opt, x, by_hand))
        if count == 20:
            opt.consolidate([inputs(3.0 * task, 900 + i, 64) for i in range(2)], name=f"task {task}", progress=False)
    return model, opt, losses


@pytest.mark.parametrize("kind", ["mass", "function"])
def test_training_is_bitwise_the_same_where_backward_repeats_blocks(kind: str) -> None:
    plain, repeated = (story(way, regularization=kind) for way in (None, False))
    assert all(torch.equal(one, other) for one, other in zip(plain[2], repeated[2], strict=True))
    layers = [run[1].mode.experts.layers for run in (plain, repeated)]
    for one, other in zip(*layers):
        assert torch.equal(one.emitted, other.emitted)
        assert all(torch.equal(value, other.history[part]) for part, value in one.history.items())


@pytest.mark.parametrize("by_hand", [False, True])
def test_reentrant_checkpointing_sees_every_forward_once_and_is_regularized(by_hand: bool) -> None:
    """Five steps into the second task, before rounding of another order of sums has grown."""
    runs = [story(way, by_hand=by_hand, steps=5, strength=50.0, warmup=0, window=20) for way in (None, True)]
    torch.testing.assert_close(torch.stack(runs[0][2]), torch.stack(runs[1][2]), rtol=1e-3, atol=1e-4)
    for one, other in zip(*(run[1].mode.experts.layers for run in runs)):
        assert torch.equal(one.watch.window[-1], other.watch.window[-1]), "samples in this window"
        torch.testing.assert_close(one.router, other.router, rtol=1e-3, atol=1e-4)


def test_reentrant_checkpointing_without_gradients_says_so() -> None:
    with (
        pytest.warns(UserWarning, match="requires_grad=True"),
        pytest.raises(ConsolidationError, match="use_reentrant"),
    ):
        story(True, grad=False)


def gradient(model: Net, opt: NullSpaceOptimizer, task: Any, inside: bool) -> Tensor:
    x = torch.cat([inputs(0.0, 7, 4), inputs(3.0, 8, 4)]).requires_grad_()
    with opt.task(task):
        loss = model(x).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("task", ["task 0", "task 1", ["task 0", None] * 4])
def test_named_tasks_have_the_same_gradients_or_are_refused(reentrant: bool, task: Any) -> None:
    model, opt, _ = story(None)
    expected = gradient(model, opt, task, inside=True)
    model.encoder.reentrant = reentrant
    torch.testing.assert_close(gradient(model, opt, task, inside=True), expected)
    with pytest.raises(OptionError, match=r"backward\(\) repeats a forward pass .* call backward\(\) inside"):
        gradient(model, opt, task, inside=False)
    torch.testing.assert_close(gradient(model, opt, task, inside=True), expected)
    step(model, opt, inputs(3.0, 1).requires_grad_())


@pytest.mark.parametrize("reentrant", [False, True])
def test_unnamed_tasks_work_where_the_encoder_is_repeated_as_a_whole(reentrant: bool) -> None:
    model, opt, _ = story(None)
    expected = gradient(model, opt, None, inside=True)
    named = gradient(model, opt, ["task 0"] * 4 + ["task 1"] * 4, inside=True)
    torch.testing.assert_close(expected, named)
    model.encoder.reentrant = reentrant
    with pytest.raises(OptionError, match="chooses once per call of an encoder, so name the tasks"):
        gradient(model, opt, None, inside=True)
    model.encoder.reentrant, encode = None, model.encoder

    class Repeated(nn.Module):
        def forward(self, *, mask: Tensor, hidden: Tensor) -> Tensor:
            return checkpoint(lambda h: encode(mask=mask, hidden=h), hidden, use_reentrant=reentrant)

    head = model.head
    x = torch.cat([inputs(0.0, 7, 4), inputs(3.0, 8, 4)]).requires_grad_()
    with opt.task(None):
        head(Repeated()(mask=torch.ones(24), hidden=x)).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_another_forward_between_a_forward_and_its_backward_is_no_matter() -> None:
    model, opt, _ = story(False)
    x = inputs(3.0, 1)
    loss = model(x).square().mean()
    with torch.no_grad(), opt.task("task 0"):
        teacher = model(x)
    (loss + (model(x) - teacher).square().mean()).backward()
    opt.step()


def test_an_encoder_called_by_keywords_is_recognised() -> None:
    model, opt, _ = story(None)
    x = torch.cat([inputs(0.0, 7, 4), inputs(3.0, 8, 4)])
    found = []
    for task in (None, ["task 0"] * 4 + ["task 1"] * 4):
        with torch.no_grad(), opt.task(task):
            found.append(model(x))
    torch.testing.assert_close(*found)


def test_a_block_called_by_keywords_takes_the_tensor_of_its_width() -> None:
    torch.manual_seed(0)
    model = Net()
    opt = NullSpaceOptimizer(
        AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(**{**OPTIONS, "target_modules": ["0"]})
    )
    step(model, opt, inputs(0.0, 1))
    with pytest.raises(OptionError, match=r"'encoder\.blocks\.0' was called without a tensor \[n, \.\.\., 24\]"):
        model(torch.zeros(24))


@pytest.mark.parametrize("task", ["task 0", "never", None, []])
@pytest.mark.parametrize("grad", [False, True])
def test_an_empty_batch_gives_an_empty_output(task: Any, grad: bool) -> None:
    model, opt, _ = story(None)
    with torch.set_grad_enabled(grad), opt.task(task):
        assert model(torch.zeros(0, 24)).shape == (0, 5) and model(torch.zeros(0, 3, 24)).shape == (0, 3, 5)


@pytest.mark.parametrize("kind", ["mass", "function"])
def test_empty_batches_change_nothing_in_training_and_consolidation(kind: str) -> None:
    runs = []
    for empty in (False, True):
        torch.manual_seed(0)
        model = Net()
        opt = NullSpaceOptimizer(
            AdamW(model.parameters(), lr=1e-4), model, mode=IGSP(**OPTIONS, regularization=kind, warmup=0)
        )
        for task in (0, 1):
            for number in range(20):
                loss = (model(inputs(3.0 * task, number)) - 1).square().mean()
                opt.zero_grad()
                (loss + model(torch.zeros(0, 24)).sum() if empty else loss).backward()
                opt.step()
            batches = [inputs(3.0 * task, 900, 64), *([torch.zeros(0, 24)] if empty else [])]
            opt.consolidate(batches, name=f"task {task}", progress=False)
        opt.mode.calibrate([inputs(9.0, 5, 64), *([torch.zeros(0, 24)] if empty else [])], progress=False)
        runs.append(opt)
    for one, other in zip(*(run.mode.experts.layers for run in runs)):
        assert all(torch.equal(value, other.history[part]) for part, value in one.history.items())
        assert all(torch.equal(value, other.known[name]) for name, value in one.known.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_experts_of_half_precision_are_consolidated_or_refused_by_name(dtype: torch.dtype) -> None:
    for eps in (1e-4, 1e-8):
        torch.manual_seed(0)
        model = Net()
        opt = NullSpaceOptimizer(
            AdamW(model.parameters(), lr=1e-4, eps=eps), model, mode=IGSP(**{**OPTIONS, "candidates": 1})
        )
        model.to(dtype)
        model.forward = lambda x, model=model: model.head(model.encoder(mask=torch.ones(24).to(x), hidden=x))  # type: ignore[method-assign]
        for number in range(20):
            step(model, opt, inputs(0.0, number).to(dtype))
        finite = all(bool(torch.isfinite(p).all()) for p in model.igsp.parameters())  # type: ignore[union-attr]
        assert finite is (dtype == torch.bfloat16 or eps == 1e-4)
        if finite:
            opt.consolidate([inputs(0.0, 900).to(dtype)], name="one", progress=False)
            assert opt.mode.experts.layers[0].inputs.shape[1] == 2
            continue
        with pytest.raises(
            ConsolidationError, match=r"'encoder\.blocks\.0\.mlp': fresh\.0\.\w+ \(float16\) is not finite"
        ):
            opt.consolidate([inputs(0.0, 900).to(dtype)], name="one", progress=False)
        assert opt.status().finished == ()


def test_experts_that_diverge_in_phase_1_are_refused() -> None:
    torch.manual_seed(0)
    model = Net()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=IGSP(**OPTIONS))
    with pytest.raises(PruningError, match=r"routing probabilities are not finite, .* lower IGSP\(lr=\.\.\.\)"):
        for number in range(20):
            step(model, opt, inputs(0.0, number) * float("nan"))
