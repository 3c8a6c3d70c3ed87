"""Rows are left out by position only: no zero, gate, hook or cast of today hides what a later task can reach."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nullspace_optim import ConsolidationReport, NullSpaceOptimizer, NumericalRank
from nullspace_optim.capture.capture import Capture
from nullspace_optim.settings import Settings

Loss = Callable[[], Tensor]


def wrap(model: nn.Module, lr: float = 3e-2) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=lr), model, policy=NumericalRank())


def learn(optimizer: NullSpaceOptimizer, loss: Loss, steps: int = 100) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def drift(now: Tensor, then: Tensor) -> float:
    return float((now.detach() - then).norm() / then.norm().clamp_min(1e-30))


def all_rows_notes(report: ConsolidationReport) -> list[str]:
    return [note for note in report.notes if "all rows" in note]


# --- weights that are zero in part -----------------------------------------------------------------------------------


class NewBranch(nn.Module):
    """A branch was added; its columns of the output layer start at zero."""

    shape = (12,)

    def __init__(self) -> None:
        super().__init__()
        self.old, self.new, self.out = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(32, 4)
        nn.init.zeros_(self.out.weight[:, 16:])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([functional.relu(self.old(x)), functional.relu(self.new(x))], -1))


class NewChannels(nn.Module):
    """A mask encoder feeds new channels of the first convolution, whose weights start at zero."""

    shape = (3, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.new, self.first, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 8, 3, padding=1), nn.Linear(8, 4)
        nn.init.zeros_(self.first.weight[:, 3:])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(torch.cat([x, functional.relu(self.new(x))], 1))
        return self.out(functional.relu(y).mean((2, 3)))


class NewGroup(nn.Module):
    """One group of a grouped convolution is zero."""

    shape = (12,)

    def __init__(self) -> None:
        super().__init__()
        self.new, self.grouped, self.out = nn.Linear(12, 16), nn.Conv1d(16, 8, 1, groups=2), nn.Linear(8, 4)
        nn.init.zeros_(self.grouped.weight[4:])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.grouped(torch.tanh(self.new(x))[..., None])[..., 0])


class LowRank(nn.Module):
    """An adapter `x A B` beside a layer, with half of `B` zero, and a wholly zero head beside the old one."""

    shape = (12,)

    def __init__(self) -> None:
        super().__init__()
        self.base, self.new, self.out = nn.Linear(12, 4), nn.Linear(12, 3, bias=False), nn.Linear(4, 4)
        self.up = nn.Parameter(torch.randn(3, 4))
        self.second = nn.Linear(4, 2)
        nn.init.zeros_(self.second.weight)
        with torch.no_grad():
            self.up[1:] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.new(x) @ self.up
        return torch.cat([self.out(y), self.second(y)], -1)


@pytest.mark.parametrize("kind", [NewBranch, NewChannels, NewGroup, LowRank])
def test_what_lies_before_a_zero_block_is_protected(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, shape = kind(), kind.shape  # type: ignore[attr-defined]
    x, later = torch.randn(2, *shape), torch.randn(64, *shape)
    optimizer = wrap(model, 1e-2)
    report = optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    goal = torch.randn(64, before.shape[1])
    learn(optimizer, lambda: (model(later) - goal).square().mean(), 200)
    assert drift(model(x), before) <= 1e-5 and optimizer.bases["new.weight"].rank > 0
    assert not all_rows_notes(report)


def test_a_branch_behind_a_gate_of_zero_is_protected() -> None:
    model = nn.ModuleDict({"branch": nn.Linear(6, 6), "out": nn.Linear(6, 2)})
    model.gate = nn.Parameter(torch.zeros(6))
    run = lambda x: model["out"](x + model.gate * torch.tanh(model["branch"](x)))  # noqa: E731
    optimizer = wrap(model)
    optimizer.consolidate([torch.randn(4, 6)], forward=run, progress=False)
    assert optimizer.bases["branch.weight"].rank == 4


# --- stationary points -----------------------------------------------------------------------------------------------


class FourMaps(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.function(self, q, k, v, functional.relu(q - 3), functional.relu(k - 3))


sdpa = functional.scaled_dot_product_attention
STATIONARY: dict[str, Callable[..., Tensor]] = {
    "relu linear attention": lambda m, q, k, v, a, c: m.o((a @ c.mT) @ v) + v,
    "addcmul": lambda m, q, k, v, a, c: torch.addcmul(v, a, c),
    "gate": lambda m, q, k, v, a, c: v + a * c,
    "einsum": lambda m, q, k, v, a, c: v + torch.einsum("bte,bse->bts", a, c) @ v,
    "bilinear": lambda m, q, k, v, a, c: v + functional.bilinear(a, c, torch.ones(8, 8, 8)),
    "baddbmm": lambda m, q, k, v, a, c: torch.baddbmm(v, a @ c.mT, v),
    "norm": lambda m, q, k, v, a, c: v * (1 + a.norm(dim=-1, keepdim=True)),
    "std": lambda m, q, k, v, a, c: v * (1 + a.std(-1, keepdim=True)),
    "prod": lambda m, q, k, v, a, c: v + a.prod(-1, keepdim=True),
    "exp": lambda m, q, k, v, a, c: v + torch.exp(-1e4 * q.square()),
    "logaddexp": lambda m, q, k, v, a, c: torch.logaddexp(v, 1e3 * q - 1e4),
    "radial": lambda m, q, k, v, a, c: v + torch.exp(-1e3 * torch.cdist(q, k)).sum(-1, keepdim=True),
    "sdpa, logits x300": lambda m, q, k, v, a, c: m.o(sdpa(q, k, v, scale=300.0)),
    "sdpa of heads": lambda m, q, k, v, a, c: m.o(sdpa(q[:, None], k[:, None], v[:, None], scale=300.0)[:, 0]),
    "softmax, logits x300": lambda m, q, k, v, a, c: m.o(torch.softmax(300 * q @ k.mT, -1) @ v),
}


@pytest.mark.parametrize("name", STATIONARY)
@pytest.mark.parametrize(("goal", "lr", "steps"), [(8, 3e-2, 400), (2, 1e-2, 200)])
def test_products_and_norms_of_switched_off_units_are_protected(name: str, goal: int, lr: float, steps: int) -> None:
    torch.manual_seed(0)
    model = FourMaps(STATIONARY[name])
    x, later = torch.randn(1, 4, 8), torch.randn(32, 4, 8)
    optimizer = wrap(model, lr)
    report = optimizer.consolidate([x], progress=False)
    before = model(x).detach()

    def loss() -> Tensor:
        q, k = (later.roll(1, 2), later.flip(2)) if goal == 8 else (torch.ones_like(later), 1 - later.flip(2))
        far = (model.q(later) - goal * q).square().mean() + (model.k(later) - goal * k).square().mean()
        return far + (1e-3 if goal == 8 else 1) * (model(later) - later.flip(1)).square().mean()

    learn(optimizer, loss, steps)
    assert drift(model(x), before) <= 1e-5
    assert optimizer.bases["q.weight"].rank == 4 and not all_rows_notes(report)


# --- what leaves autograd --------------------------------------------------------------------------------------------


class Sneaks(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.e, self.function = nn.Linear(20, 8), nn.Linear(20, 6), nn.Embedding(64, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.a(x), self.b(x))


def by_address(h: Tensor) -> Tensor:
    """Copy a tensor with C, into memory that no operator has filled."""
    found = torch.empty(h.shape)
    ctypes.memmove(found.data_ptr(), h.untyped_storage().data_ptr(), 4 * h.numel())
    return found


def into_zeros(h: Tensor) -> Tensor:
    found = torch.zeros(h.shape)
    ctypes.memmove(found.data_ptr(), h.contiguous().data_ptr(), 4 * h.numel())
    return found


LEAVING: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "long": (lambda m, h, b: b + m.e((h[:, 0] * 3).long() % 64), "aten._to_copy"),
    "bool mask": (lambda m, h, b: b * (h.relu().bool()[:, :6].float() + 0.5), "aten._to_copy"),
    "any": (lambda m, h, b: b * (h.relu()[:, :2].any(1, keepdim=True).float() + 0.5), "aten.any"),
    "count_nonzero": (lambda m, h, b: b * h.relu().count_nonzero(1)[:, None], "aten.count_nonzero"),
    "div floor": (lambda m, h, b: b + torch.div(h[:, :6], 0.2, rounding_mode="floor"), None),
    "numpy": (lambda m, h, b: b + torch.from_numpy(np.sign(h.detach().numpy()[:, :6])), "Tensor.numpy"),
    "asarray": (lambda m, h, b: b + torch.from_numpy(np.sign(np.asarray(h.detach()))[:, :6]), "Tensor.__array__"),
    "tolist": (lambda m, h, b: b + torch.tensor(h.tolist())[:, :6].round(), "Tensor.tolist"),
    "dlpack": (lambda m, h, b: b + torch.from_dlpack(h.detach())[:, :6].round(), "Tensor.__dlpack__"),
    "deepcopy": (lambda m, h, b: b + copy.deepcopy(h.detach())[:, :6], "Tensor.__deepcopy__"),
    "address": (lambda m, h, b: b + by_address(h)[:, :6], "Tensor.untyped_storage"),
    "zeros": (lambda m, h, b: b + into_zeros(h)[:, :6], "Tensor.data_ptr"),
    "item": (lambda m, h, b: b * torch.tensor([float(row[0] > 0) + 0.5 for row in h])[:, None], "aten.gt"),
    "sign": (lambda m, h, b: b + torch.sign(h[:, :6]), "aten.sign"),
    "round": (lambda m, h, b: b + h[:, :6].round(), "aten.round"),
    "detach": (lambda m, h, b: b * h.detach()[:, :6], None),
}


@pytest.mark.parametrize("name", LEAVING)
def test_what_leaves_autograd_is_protected_or_named(name: str) -> None:
    function, operator = LEAVING[name]
    torch.manual_seed(0)
    model, x, later = Sneaks(function), torch.randn(8, 20), torch.randn(64, 20)
    optimizer = wrap(model)
    report = optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    aims: list[Loss] = [
        lambda: (model.a(later) - 3).square().mean() + (model.b(later) - 1).square().mean(),
        lambda: (model.e.weight - 1).square().mean(),
    ]
    learn(optimizer, lambda: aims[0]() + aims[1](), 60)
    assert drift(model(x), before) <= 1e-5 and optimizer.bases["a.weight"].rank == 8
    assert [operator in note for note in all_rows_notes(report)] == ([True] if operator else [])


def rows_and_note(model: nn.Module, run: Callable[[], Any], name: str) -> tuple[int, str | None]:
    observer = Capture(dict(model.named_parameters()), Settings(), buffers=dict(model.named_buffers()))
    with observer:
        observer.batch(run)
    return int(observer.captured[name].sides["right"].rows.sum()), observer.relevance_note


def test_memory_that_no_operator_has_filled_counts_all_rows_before_it() -> None:
    """A kernel that takes its addresses in C is seen by nobody; what it filled is."""
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(9, 4)
    memory: dict[int, Tensor] = {}

    def run(create: Callable[..., Tensor], late: int) -> Tensor:
        y = layer(x)
        memory[0] = create(9, 4)
        secret = memory[0].numpy()  # of a tensor that is no activation: not noted
        secret[:] = 1.0
        return y[:late] + memory[0].mean()

    for create in (torch.empty, torch.zeros):
        count, note = rows_and_note(layer, lambda create=create: run(create, 2), "weight")
        assert count == 9 and note is not None and "aten.mean: it reads memory" in note
    count, note = rows_and_note(layer, lambda: layer(x)[:2] + torch.zeros(1), "weight")
    assert (count, note) == (2, None)


def test_rows_behind_an_operator_without_a_rule_are_still_told_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    run = lambda: model[1](torch.sign(model[0](x)))[:2]  # noqa: E731
    x = torch.randn(9, 4)
    count, note = rows_and_note(model, run, "0.weight")
    assert count == 9 and note is not None and "all rows count before aten.sign" in note
    assert rows_and_note(model, run, "1.weight")[0] == 2


# --- backward passes that do not tell the truth ----------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def hooked(f: Tensor) -> Tensor:
    if f.requires_grad:
        f.register_hook(lambda gradient: gradient * 0)
    return f


LYING: dict[str, Callable[[Tensor], Tensor]] = {
    "reversal": lambda f: Reverse.apply(f, 0.0),
    "own function": StraightThrough.apply,
    "hook": hooked,
    "detach": lambda f: f.detach() + 0 * f,
}


@pytest.mark.parametrize("name", LYING)
def test_gradients_that_are_zeroed_hide_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    x, later = torch.randn(4, 12), torch.randn(128, 12)
    run = lambda x: model[2](torch.tanh(LYING[name](model[0](x))))  # noqa: E731
    optimizer = wrap(model, 1e-2)
    optimizer.consolidate([x], forward=run, progress=False)
    before = run(x).detach()
    learn(optimizer, lambda: (model(later) - 1).square().mean(), 200)
    assert drift(run(x), before) <= 1e-5 and optimizer.bases["0.weight"].rank == 4


def test_a_forward_pass_that_differentiates_counts_all_rows() -> None:
    layer = nn.Linear(4, 1, bias=False)

    def forces(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(torch.tanh(layer(x)).sum(), x)[0][:2]

    observer = Capture(dict(layer.named_parameters()), Settings())
    x = torch.randn(9, 4)
    for _ in range(2):
        observer.batch(lambda: forces(x))
    note = observer.relevance_note
    assert observer.captured["weight"].sides["right"].rows.tolist() == [18]
    assert note is not None and "differentiates" in note


# --- losses ----------------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multi_margin": functional.multi_margin_loss,
    "multilabel_margin": lambda z, y: functional.multilabel_margin_loss(z, functional.one_hot(y, 4) * 2 - 1),
    "hinge": lambda z, y: functional.relu(1 - z.gather(1, y[:, None])).mean(),
    "hinge embedding": lambda z, y: functional.hinge_embedding_loss(z, functional.one_hot(y, 4) * 2 - 1),
    "triplet": lambda z, y: functional.triplet_margin_loss(z, z.roll(4, 0), z.roll(1, 0)),
    "cosine": lambda z, y: functional.cosine_embedding_loss(z, z.roll(1, 0), -torch.ones(len(z))),
    "cross entropy": functional.cross_entropy,
    "ignored": lambda z, y: functional.cross_entropy(z, torch.where(y < 3, y, -100)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_zero_today_protects_what_it_reads(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 128), nn.ReLU(), nn.Linear(128, 4))
    x, y, later = torch.randn(64, 80), torch.arange(64) % 4, torch.randn(64, 80)
    optimizer = wrap(model, 1e-2)
    learn(optimizer, lambda: functional.multi_margin_loss(model(x), y), 200)
    optimizer.consolidate([(x, y)], forward=lambda b: LOSSES[name](model(b[0]), b[1]), progress=False)
    before = model(x).detach()
    learn(optimizer, lambda: functional.cross_entropy(model(later), (y + 1) % 4))
    assert drift(model(x), before) <= 1e-5


# --- outputs ---------------------------------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_outputs_in_objects_that_nothing_can_look_into_count() -> None:
    layer, x = nn.Linear(4, 5), torch.randn(9, 4)
    for hide in (Slotted, lambda t: lambda: t, lambda t: {Slotted(t)}):
        assert rows_and_note(layer, lambda hide=hide: hide(layer(x)), "weight")[0] == 9


def test_activations_that_are_kept_after_the_pass_count_and_are_noted() -> None:
    model, x, kept = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(9, 4), []

    def base(x: Tensor) -> Tensor:
        y = model[1](model[0](x))
        kept.append(y)
        return y[:1]

    def between(x: Tensor) -> Tensor:
        y = model[0](x)
        kept.append(y)
        return model[1](y)[:1]

    for run, counts in ((base, (9, 9)), (between, (9, 1))):
        for name, expected in zip(("0.weight", "1.weight"), counts, strict=True):
            count, note = rows_and_note(model, lambda run=run: run(x), name)
            assert count == expected and note is not None and "kept after the forward pass" in note
            kept.clear()
    returned = lambda: {"all": (y := model[0](x)), "first": y[:1]}  # noqa: E731
    assert rows_and_note(model, returned, "0.weight") == (9, None)


def test_a_returned_view_counts_the_rows_it_shows() -> None:
    layer, x = nn.Linear(4, 5), torch.randn(9, 4)
    for view, rows in ((lambda y: y[2:4], 2), (lambda y: y.T[1:, :3], 3), (lambda y: y[::2].detach(), 5)):
        assert rows_and_note(layer, lambda view=view: view(layer(x)), "weight") == (rows, None)


def test_outputs_without_numbers_to_differentiate_count() -> None:
    layer, x = nn.Linear(4, 5).requires_grad_(False), torch.randn(9, 4)
    assert rows_and_note(layer, lambda: layer(x)[:3], "weight") == (3, None)
    assert rows_and_note(layer, lambda: layer(x)[:3].argmax(-1), "weight")[0] == 3


# --- masks -----------------------------------------------------------------------------------------------------------


def masked_rows(function: Callable[[Tensor, Tensor], Tensor], mask: Any) -> int:
    layer, x = nn.Linear(4, 4), torch.randn(6, 4)
    layer.gate = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    made = mask(layer, x) if callable(mask) else mask
    return rows_and_note(layer, lambda: function(layer(x), made), "weight")[0]


KEEP = torch.arange(6) < 2


@pytest.mark.parametrize(
    "function",
    [
        lambda y, m: y * m[:, None],
        lambda y, m: y * m[:, None].float(),
        lambda y, m: y.masked_fill(~m[:, None].bool(), -1),
        lambda y, m: torch.where(m[:, None].bool(), y, 3),
        lambda y, m: y[m.bool()],
    ],
)
def test_masks_by_position_cut_off(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert masked_rows(function, KEEP) == 2


@pytest.mark.parametrize(
    "mask",
    [
        lambda m, x: m.gate,  # a parameter of zeros and ones
        lambda m, x: m.gate.detach() * 1,
        lambda m, x: torch.tensor([0.9, 0.5, 0.0, 0.0, 0.0, 0.0]),  # other numbers
        lambda m, x: torch.zeros(6),
        lambda m, x: torch.zeros(()).expand(6),
    ],
)
def test_gates_cut_nothing_off(mask: Callable[..., Tensor]) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(6, 4)
    layer.gate = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert rows_and_note(layer, lambda: layer(x) * mask(layer, x)[:, None], "weight")[0] == 6


def test_masks_drawn_at_random_or_made_from_activations_cut_nothing_off() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(6, 4)
    for make in (
        lambda h: torch.rand(6) < 0.5,
        lambda h: torch.randperm(6) < 3,
        lambda h: h[:, 0] > 0,
        lambda h: (h[:, 0] > 0).float(),
        lambda h: torch.softmax(1e6 * h[:, 0], 0),
    ):
        run = lambda make=make: model[1](x) * make(model[0](x))[:, None]  # noqa: E731
        assert rows_and_note(model, run, "1.weight")[0] == 6
    for choose in (lambda h: h[:, 0].argsort()[:2], lambda h: torch.randperm(6)[:2]):
        run = lambda choose=choose: model[1](x)[choose(model[0](x))]  # noqa: E731
        assert rows_and_note(model, run, "1.weight")[0] == 6
