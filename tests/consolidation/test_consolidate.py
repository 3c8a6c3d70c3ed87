"""One consolidation: loaders, names, fates, warnings, embeddings, tied weights, joint biases, and the report."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, SparseAdam
from training import mlp, relative_drift, train, wrap

from nullspace_optim import (
    ConsolidationError,
    Energy,
    Fate,
    FixedRank,
    NullSpaceOptimizer,
    NullSpaceWarning,
    NumericalRank,
)


@pytest.mark.fault(43)
def test_an_empty_loader_adds_no_task() -> None:
    model = mlp()
    optimizer = wrap(model)
    with pytest.raises(ConsolidationError, match="'task 1' gave no batches; nothing was changed"):
        optimizer.consolidate([], progress=False)
    assert not optimizer.bases
    assert not model._forward_pre_hooks


@pytest.mark.fault(50)
def test_an_endless_loader_needs_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.randn(1, 24)

    optimizer = wrap(_model := mlp())
    monkeypatch.setattr("nullspace_optim.model.loader.ENDLESS", 20)
    with pytest.raises(ConsolidationError, match="max_batches="):
        optimizer.consolidate(endless(), progress=False)
    assert optimizer.consolidate(endless(), max_batches=3, progress=False).batches == 3
    assert _model is not None


@pytest.mark.fault(58)
def test_a_name_is_used_once_and_defaults_count_up() -> None:
    model, old = mlp(), torch.randn(4, 24)
    optimizer = wrap(model)
    assert optimizer.consolidate([old], name="birds", progress=False).task == "birds"
    with pytest.raises(ConsolidationError, match=r"'birds' has been consolidated already.*name="):
        optimizer.consolidate([old], name="birds", progress=False)
    assert optimizer.consolidate([old], progress=False).task == "task 2"
    assert optimizer.bases["0.weight"].tasks == ("birds", "task 2")


@pytest.mark.fault(58, 59)
def test_the_same_data_twice_adds_nothing() -> None:
    model, old = mlp(), torch.randn(4, 24)
    optimizer = wrap(model)
    optimizer.consolidate([old], progress=False)
    basis = optimizer.bases["0.weight"].U.clone()
    report = optimizer.consolidate([old], progress=False)
    assert [row.added for row in report.of(Fate.PROTECTED)] == [0, 0]
    assert torch.equal(optimizer.bases["0.weight"].U, basis)


def train_on(optimizer: NullSpaceOptimizer, model: nn.Module, inputs: Tensor, steps: int = 100) -> None:
    """Train on `inputs` and random targets."""
    train(optimizer, model, steps, inputs, targets=torch.randn_like(model(inputs)))


def test_bases_grow_over_tasks_and_every_task_stays_exact() -> None:
    model, tasks = mlp(), [torch.randn(2, 24) for _ in range(3)]
    optimizer, outputs = wrap(model), []
    for number, rows in enumerate(tasks, 1):
        optimizer.consolidate([rows], progress=False)
        outputs.append(model(rows).detach())
        assert optimizer.bases["0.weight"].rank == 2 * number
        train_on(optimizer, model, torch.randn(16, 24))
    for rows, before in zip(tasks, outputs):
        assert relative_drift(model(rows), before) <= 1e-5
    assert optimizer.bases["0.weight"].history == (2, 4, 6)
    assert optimizer.capacity()["0.weight"] == 1 - 6 / 24


def test_the_report_prints_every_fate_and_adds_up() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.small, self.norm = nn.Linear(24, 16), nn.Linear(16, 4), nn.LayerNorm(16)
            self.full, self.later = nn.Linear(4, 4, bias=False), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.full(self.small(self.norm(self.used(x))))
            return result

    model = Net()
    optimizer = wrap(model)
    with pytest.warns(UserWarning):
        report = optimizer.consolidate([torch.randn(6, 24)], progress=False)
    assert report.fates == {Fate.FREE: 2, Fate.PROTECTED: 2, Fate.FULL: 1, Fate.FROZEN: 4}
    assert sum(report.fates.values()) == len(list(model.parameters()))
    text = report.table()
    for name, _ in model.named_parameters():
        assert len(re.findall(rf"^{re.escape(name)} ", text, re.MULTILINE)) == 1, name
    assert text.splitlines()[0].startswith("consolidated 'task 1' of Net with NumericalRank")
    assert text.index("protected (2)") < text.index("full (1)") < text.index("free (2)") < text.index("frozen (4)")
    assert [row.free for row in report.of(Fate.PROTECTED)] == [18, 10]
    assert optimizer.capacity()["full.weight"] == optimizer.capacity()["norm.bias"] == 0.0
    assert optimizer.capacity()["later.weight"] == 1.0


def test_the_drift_of_earlier_tasks_is_measured_and_follows_the_threshold() -> None:
    drifts = []
    for policy in (Energy(0.5), Energy(0.95), NumericalRank()):
        torch.manual_seed(0)
        model, rows = mlp(), torch.randn(8, 24) * torch.logspace(0, -2, 24)
        optimizer = wrap(model, policy=policy)
        assert optimizer.consolidate([rows], progress=False).drift == {}
        before = model(rows).detach()
        train_on(optimizer, model, torch.randn(64, 24), 20)
        report = optimizer.consolidate([torch.randn(4, 24)], progress=False)
        true = float((model(rows) - before).norm() / before.norm())
        assert report.drift["task 1"] == pytest.approx(true, rel=0.5, abs=1e-6)
        assert f"{report.drift['task 1']:.2%}" in str(report)
        drifts.append(report.drift["task 1"])
    assert drifts[0] > drifts[1] > drifts[2]
    assert drifts[2] < 1e-5


@pytest.mark.fault(77)
def test_a_full_parameter_is_frozen_with_a_warning() -> None:
    model, rows = mlp(), torch.randn(64, 24)
    optimizer = wrap(model)
    with pytest.warns(UserWarning, match=r"no free direction left and .*\('0\.weight', '2\.weight'\): lower"):
        report = optimizer.consolidate([rows], progress=False)
    assert len(report.of(Fate.FULL)) == 2
    start = copy.deepcopy(model.state_dict())
    train_on(optimizer, model, rows, 5)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    optimizer.consolidate([rows + 1], progress=False)


@pytest.mark.fault(77)
def test_a_nearly_full_parameter_is_announced() -> None:
    optimizer = wrap(_model := mlp())
    with pytest.warns(UserWarning, match=r"'0\.weight': 22 of 24 directions are protected\): lower"):
        optimizer.consolidate([torch.randn(22, 24)], progress=False)
    assert _model is not None


@pytest.mark.fault(77)
def test_on_full_raise_changes_nothing() -> None:
    model = mlp()
    optimizer = wrap(model, on_full="raise")
    optimizer.consolidate([torch.randn(4, 24)], progress=False)
    before = {name: basis.rank for name, basis in optimizer.bases.items()}
    with pytest.raises(ConsolidationError, match=r"no free direction is left in '0\.weight'.*on_full=\"warn\""):
        optimizer.consolidate([torch.randn(64, 24)], progress=False)
    assert {name: basis.rank for name, basis in optimizer.bases.items()} == before
    assert len(optimizer._core.store.tasks) == 1


@pytest.mark.fault(17)
def test_uncovered_train_leaves_biases_free_and_says_so() -> None:
    model, old = mlp(), torch.randn(4, 24)
    optimizer = wrap(model, uncovered="train")
    with pytest.warns(UserWarning, match="old outputs may move"):
        report = optimizer.consolidate([old], progress=False)
    assert {row.name for row in report.of(Fate.FREE)} == {"0.bias", "2.bias"}
    bias = model[0].bias.detach().clone()
    train_on(optimizer, model, torch.randn(16, 24), 5)
    assert not torch.equal(model[0].bias, bias)
    assert optimizer.verify().worst <= 1e-5


@pytest.mark.parametrize("rows", [6, 14], ids=["few-rows", "many-rows"])
@pytest.mark.fault(17)
def test_joint_biases_train_and_old_outputs_are_exact(rows: int) -> None:
    model, old = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(rows, 24)
    optimizer = wrap(model, bias="joint")
    report = optimizer.consolidate([old], progress=False)
    assert not report.of(Fate.FROZEN)
    assert not report.warnings
    assert optimizer.bases["0.weight"].bias == "0.bias"
    assert optimizer.bases["0.weight"].U.shape == (25, rows)
    before, bias = model(old).detach(), model[0].bias.detach().clone()
    train_on(optimizer, model, torch.randn(16, 24), 300)
    assert relative_drift(model(old), before) <= 1e-5
    assert relative_drift(model[0].bias, bias) > 1e-2
    optimizer.consolidate([torch.randn(2, 24)], progress=False)
    train_on(optimizer, model, torch.randn(16, 24), 100)
    assert relative_drift(model(old), before) <= 1e-5


class Words(nn.Module):
    """Token embedding, and a head that may be tied to it."""

    def __init__(self, tied: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12, sparse=sparse)
        self.tied = tied

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).mean(1)
        return hidden @ self.embedding.weight.T if self.tied else hidden


@pytest.mark.parametrize("sparse", [False, True], ids=["AdamW", "SparseAdam"])
@pytest.mark.fault(12)
def test_used_embedding_rows_are_fixed_and_the_others_free(sparse: bool) -> None:
    model = Words(sparse=sparse)
    base = SparseAdam(model.parameters(), lr=0.1) if sparse else AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = wrap(model, base)
    start = model.embedding.weight.detach().clone()
    for task, used in enumerate(([7, 3, 5], [9, 3, 0]), 1):
        optimizer.consolidate([torch.tensor([used])], progress=False)
        assert optimizer.bases["embedding.weight"].rank == (3, 5)[task - 1]
        before = model.embedding.weight.detach().clone()
        train_on(optimizer, model, torch.randint(0, 20, (16, 4)), 20)
        now = model.embedding.weight.detach()
        assert torch.equal(now[used], before[used])
        assert torch.equal(now[[7, 3, 5]], start[[7, 3, 5]])
        assert not torch.equal(now[11], before[11])
    assert optimizer.bases["embedding.weight"].U.tolist() == [0, 3, 5, 7, 9]
    assert optimizer.verify().ok


@pytest.mark.fault(28)
def test_tied_embedding_and_head_keep_both_constraints() -> None:
    model, tokens = Words(tied=True), torch.tensor([[1, 2], [3, 4]])
    optimizer = wrap(model)
    optimizer.consolidate([tokens], progress=False)
    assert set(optimizer.bases["embedding.weight"].subspaces) == {"rows", "right"}
    before, start = model(tokens).detach(), model.embedding.weight.detach().clone()
    train_on(optimizer, model, torch.randint(5, 20, (16, 3)), 200)
    now = model.embedding.weight.detach()
    assert relative_drift(model(tokens), before) <= 1e-5
    assert torch.equal(now[1:5], start[1:5])
    assert relative_drift(now[5:], start[5:]) > 1e-2


def test_fates_only_get_stricter_until_released() -> None:
    model, old = mlp(), torch.randn(4, 24)
    optimizer = wrap(model)
    optimizer.consolidate([old], progress=False)
    optimizer.consolidate([old], forward=lambda rows: model[0](rows), name="trunk only", progress=False)
    assert optimizer.bases["2.weight"].fate is Fate.PROTECTED
    assert optimizer.bases["2.bias"].fate is Fate.FROZEN
    optimizer.consolidate([old], forward=lambda rows: model(rows) + model[0].weight.sum(), name="sum", progress=False)
    assert optimizer.bases["0.weight"].fate is Fate.FROZEN
    optimizer.consolidate([old], name="plain again", progress=False)
    assert optimizer.bases["0.weight"].fate is Fate.FROZEN


def test_a_protected_weight_is_not_given_up_by_uncovered_train() -> None:
    model, old = mlp(), torch.randn(4, 24)
    optimizer = wrap(model, uncovered="train")
    optimizer.consolidate([old], progress=False)
    kept = optimizer.bases["0.weight"].U.clone()
    optimizer.consolidate([old], forward=lambda rows: model(rows) + model[0].weight.sum(), name="sum", progress=False)
    assert optimizer.bases["0.weight"].fate is not Fate.FREE
    assert torch.equal(optimizer.bases["0.weight"].U, kept)


@pytest.mark.fault(24)
def test_a_parameter_frozen_by_the_user_keeps_its_basis() -> None:
    model, old = mlp(), torch.randn(4, 24)
    optimizer = wrap(model)
    optimizer.consolidate([old], progress=False)
    before = model(old).detach()
    model[0].weight.requires_grad_(False)
    optimizer.consolidate([old + 1], progress=False)
    assert optimizer.bases["0.weight"].rank == 4
    optimizer.load_state_dict(optimizer.state_dict())
    model[0].weight.requires_grad_(True)
    train_on(optimizer, model, torch.randn(16, 24))
    assert relative_drift(model(old), before) <= 1e-5


def test_a_joint_policy_sees_all_weights() -> None:
    from nullspace_optim.policies import RankBudget

    model = mlp()
    optimizer = wrap(model, policy=RankBudget(0.25))
    optimizer.consolidate([torch.randn(64, 24)], progress=False)
    assert sum(basis.rank for basis in optimizer.bases.values()) == int(0.25 * (24 + 16))


@pytest.mark.fault(19)
def test_zero_size_and_unused_parameters_are_no_obstacle() -> None:
    model = mlp()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.scale = nn.Parameter(torch.ones(()))
    optimizer = wrap(model, SGD(model.parameters(), lr=0.1), policy=FixedRank(3))
    optimizer.consolidate([torch.randn(6, 24)], forward=lambda rows: nn.Sequential.forward(model, rows), progress=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.bases["empty"].fate is Fate.FREE


def test_a_joint_bias_is_frozen_with_a_weight_that_is_used_without_it() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head, self.biased = nn.Linear(24, 24), nn.Linear(24, 4), True

        def forward(self, x: Tensor) -> Tensor:
            inner = self.inner(x) if self.biased else nn.functional.linear(x, self.inner.weight)
            result: Tensor = self.head(inner.tanh())
            return result

    model, rows = Partly(), torch.randn(4, 24)
    optimizer = wrap(model, bias="joint")
    optimizer.consolidate([rows], progress=False)
    before = model(rows)
    model.biased = False
    report = optimizer.consolidate([torch.randn(4, 24)], progress=False)
    model.biased = True
    train_on(optimizer, model, torch.randn(16, 24))
    assert {line.name for line in report.of(Fate.FROZEN)} == {"inner.weight", "inner.bias"}
    assert relative_drift(model(rows), before) <= 1e-5


def test_a_forward_that_reads_no_trained_parameter_is_announced() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    with pytest.warns(NullSpaceWarning, match="nothing of 'task 1' is protected: the forward pass read none"):
        wrap(model).consolidate([torch.randn(4, 24)], forward=twin, progress=False)


def test_an_embedding_with_max_norm_keeps_used_rows_and_trains_the_others() -> None:
    model = nn.Sequential(nn.Embedding(10, 12, max_norm=1.0), nn.Linear(12, 4))
    optimizer, used = wrap(model), torch.arange(4)
    report = optimizer.consolidate([used], progress=False)
    assert report.fates[Fate.PROTECTED] == 2
    before = model(used)
    train_on(optimizer, model, torch.arange(10))
    assert relative_drift(model(used), before) <= 1e-5
    assert optimizer.verify().ok


@pytest.mark.parametrize("how", ["requires_grad", "add_param_group", "after load"])
@pytest.mark.fault(33)
def test_a_parameter_read_before_it_was_trainable_does_not_train_in_silence(how: str, tmp_path: Any) -> None:
    model = mlp().append(nn.Linear(8, 4))
    backbone = list(model[0].parameters())
    model[0].requires_grad_(how == "add_param_group")
    trained = [p for p in model.parameters() if how != "add_param_group" or all(p is not q for q in backbone)]
    optimizer = wrap(model, SGD(trained, lr=0.1))
    report = optimizer.consolidate([torch.randn(4, 24)], progress=False)
    assert "2 parameters were read but are not trained" in str(report)
    if how == "after load":
        optimizer.save(tmp_path / "bases.safetensors")
        optimizer.detach()
        optimizer = wrap(model, SGD(trained, lr=0.1))
        optimizer.load(tmp_path / "bases.safetensors")
    train_on(optimizer, model, torch.randn(4, 24), 2)
    if how == "add_param_group":
        optimizer.add_param_group({"params": backbone})
    model[0].requires_grad_(True)
    with pytest.warns(NullSpaceWarning, match=r"2 parameters that consolidated tasks read begin .*0\.weight, 0\.bias"):
        train_on(optimizer, model, torch.randn(4, 24), 2)


def test_outputs_whose_shape_depends_on_the_weights_are_no_obstacle() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.score(x)
            return scores[scores[:, 0] > 0]

    model = Boxes()
    optimizer = wrap(model, SGD(model.parameters(), lr=0.1), policy=FixedRank(2))
    rows = torch.randn(64, 24)
    for _ in range(20):
        optimizer.zero_grad()
        (model.score(rows) - 0.1).square().mean().backward()
        optimizer.step()
    assert optimizer.consolidate([rows], progress=False).drift == {}
    assert optimizer.consolidate([rows + 1], progress=False).drift["task 1"] >= 0
