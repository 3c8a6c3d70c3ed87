"""`verify` is honest both ways: it calls broken what is broken, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nullspace_optim import Energy, NullSpaceOptimizer, NumericalRank

pytestmark = pytest.mark.filterwarnings("ignore")


def wrap(model: nn.Module, policy: Any = None, lr: float = 1e-2, base: Any = torch.optim.AdamW) -> NullSpaceOptimizer:
    optimizer = NullSpaceOptimizer(base(model.parameters(), lr=lr), model, policy=policy or NumericalRank())
    optimizer.kept_alive = model
    return optimizer


def train(optimizer: NullSpaceOptimizer, loss: Any, steps: int = 20) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))


X, NEW = torch.randn(5, 24), torch.randn(64, 24)


def test_nothing_consolidated_is_nothing_protected() -> None:
    report = wrap(mlp()).verify()
    assert not report.ok and str(report) == "nothing is protected: no task has been consolidated"


@pytest.mark.parametrize("same_shape", [True, False])
def test_a_replaced_module_is_named(same_shape: bool) -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([X], progress=False)
    assert optimizer.verify([X]).ok
    model[2] = nn.Linear(16, 8 if same_shape else 6)
    for report in (optimizer.verify(), optimizer.verify([X])):
        assert not report.ok and set(report.lost) == {"2.weight", "2.bias"}
        assert "'2.weight' is protected but no longer in the model" in str(report)


def test_a_loader_without_any_known_sample_shows_nothing() -> None:
    data, model = TensorDataset(torch.randn(40, 24), torch.zeros(40)), mlp()
    optimizer = wrap(model)
    optimizer.consolidate(DataLoader(data, 8), progress=False)
    other = optimizer.verify([torch.randn(5, 24)])
    assert not other.ok and "not shown" in str(other) and other.missing == ("task 1",)
    assert optimizer.verify(DataLoader(data, 8, shuffle=True)).ok


def test_one_known_task_of_two_is_enough() -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([X], progress=False)
    optimizer.consolidate([NEW[:3]], progress=False)
    report = optimizer.verify([NEW[:3]])
    assert report.ok and report.missing == ("task 1",) and list(report.layers) == ["task 2"]


def test_outputs_that_moved_beyond_the_threshold_are_not_ok() -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([X], progress=False)
    for name in list(optimizer.bases):
        optimizer.release(name)
    train(optimizer, lambda: (model(NEW) - 1).square().mean())
    report = optimizer.verify([X])
    assert not report.ok and report.drifted == ("task 1",) and "more than the bound 1.0e-03" in str(report)


def test_a_threshold_may_let_outputs_drift() -> None:
    model, rows = mlp(), torch.randn(200, 24)
    optimizer = wrap(model, Energy(0.9))
    optimizer.consolidate([rows], progress=False)
    train(optimizer, lambda: (model(NEW) - 1).square().mean())
    report = optimizer.verify([rows])
    assert report.drift("task 1") > 1e-3 and report.ok
    assert report.bounds["task 1"] == pytest.approx(3 * 0.1**0.5, rel=0.3)


class Vae(nn.Module):
    """Draws random numbers in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.mu, self.lv, self.d = nn.Linear(24, 16), nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.e(x))
        mu, lv = self.mu(h), self.lv(h)
        return self.d(mu + torch.randn_like(mu) * (lv * 0.5).exp())


def test_random_models_show_no_drift_and_random_state_stays() -> None:
    optimizer = wrap(Vae())
    optimizer.consolidate([X], progress=False)
    torch.randn(7)
    before = torch.get_rng_state()
    report = optimizer.verify([X])
    assert report.ok and report.drift("task 1") == 0.0
    assert torch.equal(torch.get_rng_state(), before)


class Rope(nn.Module):
    """A table that grows with the sequence, and a counter of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 40)
        self.register_buffer("table", self.make(4), persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def make(self, n: int) -> Tensor:
        return torch.cos(torch.arange(n)[:, None] * 0.1).expand(n, 40).clone()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.table):
            self.register_buffer("table", self.make(x.shape[1]), persistent=False)
        self.calls += 1
        return self.a(x) * self.table[: x.shape[1]] + 0 * self.calls


def test_buffers_that_change_without_meaning_are_told_apart() -> None:
    model, x = Rope(), torch.randn(2, 3, 8)
    optimizer = wrap(model)
    optimizer.consolidate([x], progress=False)
    train(optimizer, lambda: model(torch.randn(2, 9, 8)).square().mean(), 3)
    for report in (optimizer.verify(), optimizer.verify([x])):
        assert report.ok and report.buffers == () and report.harmless == ("calls",)
    with torch.no_grad():
        model.table[:2] += 1
    report = optimizer.verify([x])
    assert not report.ok and "table" in report.buffers
    assert not optimizer.verify().ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.1, 0.01, 0.001])
def test_half_precision_is_held_to_the_documented_bound(dtype: torch.dtype, std: float) -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8)).to(dtype)
    nn.init.normal_(model[2].weight, std=std)
    x, new = torch.randn(6, 24).to(dtype), torch.randn(64, 24).to(dtype)
    optimizer = wrap(model, lr=0.3, base=torch.optim.SGD)
    optimizer.consolidate([x], progress=False)
    train(optimizer, lambda: (model(new) - new[:, :8]).float().square().mean(), 30)
    assert optimizer.verify().ok
    with torch.no_grad():
        model[2].weight *= 3
    assert not optimizer.verify().ok or std < 0.01  # a weight that has grown a hundredfold rounds as much as that


def test_the_loader_is_read_once_for_all_tasks() -> None:
    class Passes:
        count = 0

        def __iter__(self) -> Any:
            self.count += 1
            yield from (torch.full((2, 24), float(k)) + torch.eye(2, 24) for k in range(10))

    model, loader = nn.Linear(24, 8), Passes()
    optimizer = wrap(model, Energy(0.01))
    for k in range(5):
        optimizer.consolidate([torch.full((2, 24), float(k)) + torch.eye(2, 24)], progress=False)
    report = optimizer.verify(loader)
    assert loader.count == 1 and len(report.layers) == 5


class TwoOutputs(nn.Module):
    """One forward returns logits, another features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(24, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize(
    "other",
    [
        lambda m, x: m.body(x),
        lambda m, x: m(x)[:, :4],
        lambda m, x: m(x).softmax(-1),
        lambda m, x: (m(x), m.body(x)),
    ],
    ids=["fewer layers", "narrower", "softmax", "two outputs"],
)
def test_another_forward_is_recognised(other: Any) -> None:
    model = TwoOutputs()
    optimizer = wrap(model)
    optimizer.consolidate([X], progress=False)
    report = optimizer.verify([X], forward=lambda x: other(model, x))
    assert report.layers == {} and report.foreign == ("task 1",)
    assert not report.ok and "another forward" in str(report)
    assert optimizer.verify([X]).ok


def test_a_wider_output_is_no_drift_of_the_old_one() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.heads = nn.Linear(24, 16), nn.ModuleList([nn.Linear(16, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([head(torch.tanh(self.body(x))) for head in self.heads], -1)

    model = Heads()
    optimizer = wrap(model)
    optimizer.consolidate([X], progress=False)
    before = model(X).detach()
    model.heads.append(nn.Linear(16, 4))
    optimizer.add_param_group({"params": model.heads[1].parameters()})
    train(optimizer, lambda: (model(NEW) - 1).square().mean())
    torch.testing.assert_close(model(X)[:, :4], before, rtol=1e-4, atol=1e-5)
    report = optimizer.verify([X])
    assert report.ok and report.drift("task 1") <= 1e-4


@pytest.mark.parametrize("narrow_first", [True, False])
def test_each_task_is_judged_by_what_was_cut_off_of_its_own_energy(narrow_first: bool, tmp_path: Any) -> None:
    model = nn.Linear(24, 8, bias=False)
    optimizer = wrap(model, Energy(0.6))
    wide, narrow = torch.randn(64, 24), torch.randn(64, 1) @ torch.randn(1, 24)
    tasks = {"narrow": narrow, "wide": wide} if narrow_first else {"wide": wide, "narrow": narrow}
    expected = {}
    for name, rows in tasks.items():
        optimizer.consolidate([rows], name=name, progress=False)
        kept = optimizer.bases["weight"].subspaces["right"].basis[0]
        expected[name] = max(1e-3, 3 * (1 - float((rows @ kept).square().sum() / rows.square().sum())) ** 0.5)
    assert expected["narrow"] < 1e-2 and expected["wide"] > 1
    assert optimizer.verify([*tasks.values()]).bounds == pytest.approx(expected, rel=1e-2, abs=1e-3)
    optimizer.save(tmp_path / "bases.safetensors")
    other = wrap(model, Energy(0.6))
    other.load(tmp_path / "bases.safetensors")
    assert other.verify().bounds == optimizer.verify().bounds


def test_what_prune_gives_up_counts_for_every_task() -> None:
    model = nn.Linear(24, 8, bias=False)
    optimizer = wrap(model)
    tasks = {name: torch.randn(64, 24) @ torch.diag(10.0 ** -torch.arange(24.0)) for name in "ab"}
    for name, rows in tasks.items():
        optimizer.consolidate([rows], name=name, progress=False)
    assert set(optimizer.verify().bounds.values()) == {1e-3}
    report = optimizer.prune({name: [rows] for name, rows in tasks.items()}, bound=0.05)
    lost = max(row.lost for row in report.parameters)
    assert lost > 1e-4 and optimizer.verify().bounds == pytest.approx(dict.fromkeys("ab", 3 * lost**0.5), rel=0.05)


def test_a_table_of_which_nothing_was_read_does_not_loosen_the_bound() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.table = nn.Linear(24, 8), nn.Embedding(10, 8)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.line(x) + self.table(index).sum(0)

    model = Model()
    optimizer = wrap(model)
    batch = X, torch.zeros(0, dtype=torch.int64)
    report = optimizer.consolidate([batch], forward=lambda both: model(*both), progress=False)
    assert next(row for row in report.parameters if row.name == "table.weight").energy == 1.0
    assert optimizer.verify().bounds == {"task 1": 1e-3}
