"""Optimizers with two sets of weights: kept directions hold in both, in either mode, and switching stays theirs."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Setting, layer_rows, setting, span_drift, take_steps
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import relative_drift

from nullspace_optim import SGP, FixedRank, NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import CaptureError, OptionError

schedulefree = pytest.importorskip("schedulefree")
Build = Callable[[Any], Optimizer]

BASES: dict[str, tuple[Build, bool]] = {
    "AdamW": (lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=0.01), False),
    "AdamW-loop-warmup": (lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, foreach=False, warmup_steps=5), False),
    "RAdam": (lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01), False),
    "SGD": (lambda p: schedulefree.SGDScheduleFree(p, lr=0.1, weight_decay=1e-3), False),
    "AdamW-closure": (lambda p: schedulefree.AdamWScheduleFreeClosure(p, lr=0.01), True),
    "SGD-closure": (lambda p: schedulefree.SGDScheduleFreeClosure(p, lr=0.1), True),
}
EVERY = pytest.mark.parametrize("name", BASES)


def build(name: str, model: nn.Module) -> Any:
    return BASES[name][0](model.parameters())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def trained(name: str, steps: int = 10, **options: Any) -> tuple[Setting, Any, NullSpaceOptimizer]:
    """A task after some steps in training mode, its base and the wrapper."""
    task = setting(Case("SGD"))
    base = build(name, task.model)
    optimizer = NullSpaceOptimizer(base, task.model, **{"policy": NumericalRank(), **options})
    optimizer.train()
    take_steps(optimizer, task.loss, steps, BASES[name][1])
    return task, base, optimizer


@EVERY
def test_without_bases_every_bit_is_the_base_optimizers(name: str) -> None:
    plain = setting(Case("SGD"))
    base: Any = build(name, plain.model)
    task, _, optimizer = trained(name)
    for mode in ("train", "eval", "train"):
        getattr(base, mode, lambda: None)()
        if mode == "train":
            take_steps(base, plain.loss, 10 if not base.param_groups[0]["k"] else 5, BASES[name][1])
    optimizer.eval()
    optimizer.train()
    take_steps(optimizer, task.loss, 5, BASES[name][1])
    assert same(weights(plain.model), weights(task.model))


@EVERY
@pytest.mark.parametrize("bias", ["freeze", "joint"])
@pytest.mark.parametrize("rank", [None, 20], ids=["few", "most"])
def test_kept_directions_stay_in_both_modes_and_the_new_task_is_learned(name: str, bias: str, rank: int | None) -> None:
    task, _, optimizer = trained(name, bias=bias, policy=NumericalRank() if rank is None else FixedRank(rank))
    optimizer.consolidate([task.old], progress=False)
    optimizer.eval()
    before, rows = weights(task.model), layer_rows(task.model, task.old)
    outputs, start = task.outputs(), task.loss().item()
    for _ in range(3):
        optimizer.train()
        take_steps(optimizer, task.loss, 50, BASES[name][1])
        assert relative_drift(task.outputs(), outputs) <= 1e-5, "the weights of training"
        optimizer.eval()
        assert relative_drift(task.outputs(), outputs) <= 1e-5, "the averaged weights"
        if bias == "freeze":
            assert span_drift(task.model, before, rows) <= 1e-5
    assert optimizer.verify([task.old]).worst <= 1e-5
    assert task.loss().item() <= 0.7 * start


@EVERY
def test_the_weights_beside_the_parameters_meet_the_published_condition(name: str) -> None:
    """`z U = A` and `x U = A`, with `x` from `y = (1 - b) z + b x` (Defazio et al. 2024) in float64."""
    task, base, optimizer = trained(name)
    optimizer.consolidate([task.old], progress=False)
    take_steps(optimizer, task.loss, 40, BASES[name][1])
    group = base.param_groups[0]
    momentum = group["betas"][0] if "betas" in group else group["momentum"]
    for key, basis in optimizer.bases.items():
        now, z = task.model.get_parameter(key).detach().double(), base.state[task.model.get_parameter(key)]["z"]
        x = now if BASES[name][1] else (now - (1 - momentum) * z.double()) / momentum
        if basis.kept is not None:
            assert torch.equal(z, basis.kept) and torch.equal(now.float(), basis.kept)
        else:
            subspace = basis.subspaces["right"]
            u, anchor = subspace.basis[0].double(), subspace.anchor[0].double()
            assert relative_drift(z.double() @ u, anchor) <= 1e-6
            assert relative_drift(x @ u, anchor) <= 1e-6
            assert relative_drift(z, x) > 1e-4, "the two sets of weights differ elsewhere"


@EVERY
def test_consolidation_measures_the_averaged_weights_and_changes_no_others(name: str) -> None:
    task, base, optimizer = trained(name)
    z = {key: base.state[p]["z"].clone() for key, p in task.model.named_parameters()}
    training = weights(task.model)
    optimizer.eval()
    averaged, rows = weights(task.model), layer_rows(task.model, task.old)
    optimizer.train()
    optimizer.consolidate([task.old], progress=False)
    optimizer.eval()
    for key, p in task.model.named_parameters():
        assert relative_drift(p.detach(), averaged[key]) <= 1e-6
        if key in rows:
            u = torch.linalg.svd(rows[key], full_matrices=False).Vh.T
            moved = (base.state[p]["z"] - z[key]).double()
            assert float((moved - moved @ u @ u.T).norm()) <= 1e-6 * float(z[key].norm())
            assert relative_drift(base.state[p]["z"].double() @ u, averaged[key].double() @ u) <= 1e-5
    if not BASES[name][1]:
        assert not same(training, averaged)


def test_a_consolidation_in_training_mode_equals_one_in_evaluation_mode() -> None:
    reports = []
    for mode in ("train", "eval"):
        task, _, optimizer = trained("AdamW")
        getattr(optimizer, mode)()
        reports.append(optimizer.consolidate([task.old], progress=False))
        assert optimizer.param_groups[0]["train_mode"] is (mode == "train")
    one, two = ({row.name: (row.rank, row.energy) for row in report.parameters} for report in reports)
    assert one == two


@pytest.mark.parametrize("what", ["consolidate", "verify"])
def test_a_failed_consolidation_and_verify_leave_every_bit_and_the_mode(what: str) -> None:
    task, base, optimizer = trained("AdamW")
    optimizer.consolidate([task.old], progress=False)
    take_steps(optimizer, task.loss, 3)
    before, z = weights(task.model), [base.state[p]["z"].clone() for p in task.model.parameters()]
    if what == "verify":
        assert optimizer.verify([task.old]).ok
    else:
        with pytest.raises(CaptureError):
            optimizer.consolidate([task.old * float("nan")], progress=False)
    assert same(before, weights(task.model)) and base.param_groups[0]["train_mode"]
    assert all(torch.equal(base.state[p]["z"], kept) for p, kept in zip(task.model.parameters(), z))


def test_verification_does_not_hide_an_edit() -> None:
    task, _, optimizer = trained("AdamW")
    optimizer.consolidate([task.old], progress=False)
    with torch.no_grad():
        task.model[0].weight.mul_(1.5)
    assert not optimizer.verify().ok
    with pytest.raises(Exception, match="reanchor"):
        optimizer.step()
    optimizer.reanchor()
    take_steps(optimizer, task.loss, 5)
    assert optimizer.verify().ok


def test_switching_many_times_adds_nothing_to_rounding() -> None:
    task, base, optimizer = trained("AdamW")
    optimizer.consolidate([task.old], progress=False)
    optimizer.eval()
    outputs = task.outputs()
    optimizer.train()
    for number in range(200):
        (optimizer if number % 2 else base).eval()  # through the wrapper or past it
        optimizer.train()
    optimizer.eval()
    assert relative_drift(task.outputs(), outputs) <= 1e-5
    assert optimizer.verify().worst <= 1e-5


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise() -> None:
    task, _, optimizer = trained("AdamW")
    optimizer.consolidate([task.old], progress=False)
    take_steps(optimizer, task.loss, 7)
    buffer = io.BytesIO()
    torch.save({"model": task.model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = setting(Case("SGD"))
    resumed = NullSpaceOptimizer(build("AdamW", other.model), other.model)
    other.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for one, its in ((task, optimizer), (other, resumed)):
        take_steps(its, one.loss, 5)
        its.eval()
    assert same(weights(task.model), weights(other.model))
    assert resumed.verify([task.old]).worst <= 1e-5


class _Averaging(AdamW):
    """An optimizer that exchanges weights for a running average of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.param_groups[0]["train_mode"] = True


class _Silent(Optimizer):
    """A class that skips `Optimizer.__init__`, so that its step runs no hooks."""

    def __init__(self, inner: Optimizer) -> None:
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class _InBackward(SGD):
    """An optimizer that moves weights while gradients are computed."""

    def fused_backward(self, loss: Tensor, lr: float) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (_Averaging, "_Averaging exchanges the weights in train"),
        (lambda p: _Silent(AdamW(p)), "_Silent.step.. runs no step hooks"),
        (_InBackward, "_InBackward moves the weights during the backward pass"),
    ],
    ids=["unknown averages", "no hooks", "in backward"],
)
def test_what_would_fail_in_silence_is_refused_by_name(base: Any, text: str) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(OptionError, match=text):
        NullSpaceOptimizer(base(model.parameters()), model)


def test_a_soft_policy_holds_in_both_sets_of_weights() -> None:
    """What a soft direction may move, all sets of weights move together: averaging acts in the free directions."""
    task, base, optimizer = trained("AdamW", policy=SGP())
    optimizer.consolidate([task.old], progress=False)
    start = task.loss().item()
    take_steps(optimizer, task.loss, 40)
    assert optimizer.verify().worst <= 1e-5
    assert task.loss().item() < start
    for name, basis in optimizer.bases.items():
        for subspace in basis.subspaces.values():
            z = base.state[task.model.get_parameter(name)]["z"].double()
            assert relative_drift(z @ subspace.basis[0].double(), subspace.anchor[0].double()) <= 1e-6
