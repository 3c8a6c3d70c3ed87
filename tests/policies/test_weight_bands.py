"""Bands of a weight's spectrum: against a dense decomposition, `OSF`, and no protection at all."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from nullspace_optim import OSF, Energy, NullSpaceOptimizer
from nullspace_optim.errors import OptionError
from nullspace_optim.policies import Policy, WeightBands
from nullspace_optim.policies.parse import parse_policy

ROWS = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


def layer(values: list[float], shape: tuple[int, int] = (8, 12)) -> nn.Linear:
    """A layer whose weight has these singular values."""
    m, d = shape
    left, right = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (m, d))
    model = nn.Linear(d, m, bias=False)
    with torch.no_grad():
        model.weight.copy_(left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T)
    return model


def wrapped(model: nn.Module, policy: Policy, base: type[Any] = SGD, **options: Any) -> NullSpaceOptimizer:
    optimizer = NullSpaceOptimizer(base(model.parameters(), **options), model, policy=policy, project="update")
    optimizer.consolidate([torch.zeros(1, 12)], progress=False)
    return optimizer


def train(optimizer: NullSpaceOptimizer, model: nn.Module, steps: int, target: float = 1.0) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(ROWS) - target).square().mean().backward()
        optimizer.step()


def dense(weight: Tensor, scales: list[float]) -> tuple[Tensor, Tensor]:
    """`U D U^T` and `V D V^T` of the leading directions, by a full decomposition."""
    left, _, right = torch.linalg.svd(weight.double())
    D, k = torch.diag(torch.tensor(scales, dtype=torch.float64)), len(scales)
    return left[:, :k] @ D @ left[:, :k].T, right[:k].T @ D @ right[:k]


@pytest.mark.parametrize(
    "bands, scales, expected",
    [
        # Energies 16, 9, 4, 1 of 30: a direction belongs to the band in which the energy ahead of it lies.
        ((0.5, 0.3, 0.2), (1.0, 0.9, 0.0), [1.0, 0.9]),
        ((0.5, 0.4, 0.1), (1.0, 0.4, 0.2), [1.0, 0.4, 0.4, 0.2]),
        ((0.9, 0.1), (0.0, 0.7), [0.0, 0.0, 0.0, 0.7]),
        ((16 / 30, 14 / 30), (1.0, 0.5), [1.0, 0.5, 0.5, 0.5]),
    ],
)
@pytest.mark.parametrize("shape", [(8, 12), (12, 12), (16, 12)])
def test_a_step_leaves_each_band_its_share_on_both_sides(
    bands: tuple[float, ...], scales: tuple[float, ...], expected: list[float], shape: tuple[int, int]
) -> None:
    model = layer([4.0, 3.0, 2.0, 1.0], shape)
    before = model.weight.detach().double().clone()
    optimizer = wrapped(model, WeightBands(bands, scales), lr=0.5)
    Q, P = dense(before, expected)
    train(optimizer, model, 1)
    assert model.weight.grad is not None
    step = -0.5 * model.weight.grad.double()
    wanted = step - Q @ step - step @ P + Q @ step @ P
    assert float(step.norm()) > 0.1
    torch.testing.assert_close(model.weight.detach().double() - before, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_scales_of_one_and_zero_are_osf_of_the_same_rank(base: type[Any]) -> None:
    weights = []
    for policy in (WeightBands((0.8, 0.2), (1, 0)), OSF(0.25)):  # 16 + 9 of 30 are 0.83: two directions of eight
        torch.manual_seed(0)
        model = layer([4.0, 3.0, 2.0, 1.0, 0.1, 0.1, 0.1, 0.1])
        optimizer = wrapped(model, policy, base, lr=0.05)
        train(optimizer, model, 20)
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_all_zero_protects_nothing_and_all_one_what_the_weight_has() -> None:
    torch.manual_seed(0)
    plain = layer([4.0, 3.0, 2.0, 1.0])
    torch.manual_seed(0)
    free = layer([4.0, 3.0, 2.0, 1.0])
    base, optimizer = SGD(plain.parameters(), lr=0.1), wrapped(free, WeightBands((1.0,), (0.0,)), lr=0.1)
    assert not any(subspace.rank for subspace in optimizer.bases["weight"].subspaces.values())
    train(optimizer, free, 5)
    for _ in range(5):
        base.zero_grad()
        (plain(ROWS) - 1).square().mean().backward()
        base.step()
    assert torch.equal(plain.weight, free.weight)
    held = layer([1.0] * 12, (16, 12))
    before = held.weight.detach().clone()
    train(wrapped(held, WeightBands((1.0,), (1.0,)), lr=0.1), held, 5)
    torch.testing.assert_close(held.weight.detach(), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "policy", [OSF(), WeightBands((0.8, 0.2), (1, 0)), Energy(0.99)], ids=lambda p: type(p).__name__
)
def test_the_report_speaks_of_samples_only_where_they_were_looked_at(policy: Policy) -> None:
    model = layer([5.0, 0.1, 0.1, 0.1])  # one direction holds over 99 % of the energy
    rows = ROWS + 30  # as it does here
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=policy)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = optimizer.consolidate(DataLoader(TensorDataset(rows), batch_size=4), max_batches=1, progress=False)
    of_inputs = ("4 of the 16 samples", "fewer than 10 rows", "inputs of ordinary size")
    found = [any(text in line for line in (*report.notes, *report.warnings)) for text in of_inputs]
    of_weights = [note for note in report.notes if "looks at no sample: old outputs may move" in note]
    assert (found, len(of_weights)) == (([False] * 3, 1) if policy.from_weights else ([True] * 3, 0))


def test_later_tasks_keep_the_same_and_verify_holds_under_adamw(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    optimizer = wrapped(model, WeightBands(), AdamW, lr=0.01, weight_decay=0.1)
    first = optimizer.bases["0.weight"].subspaces["right"]
    for task in range(3):
        before = model[0].weight.detach().clone()
        train(optimizer, model, 30, target=task)
        assert optimizer.verify().ok, str(optimizer.verify())
        assert float((model[0].weight - before).norm()) > 0.05
        optimizer.consolidate([torch.zeros(1, 12)], progress=False)
    last = optimizer.bases["0.weight"].subspaces["right"]
    assert torch.equal(last.basis, first.basis) and torch.equal(last.scale, first.scale)
    optimizer.save(tmp_path / "bases")
    again = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=WeightBands())
    again.load(tmp_path / "bases")
    assert again.verify().ok


@pytest.mark.parametrize(
    "options, told",
    [
        ({"bands": (0.5, 0.5)}, "a scale for each band"),
        ({"bands": (0.5, 0.4, 0.2)}, "add up to 1"),
        ({"bands": (), "scales": ()}, "a scale for each band"),
        ({"scales": (1.0, 1.5, 0.0)}, r"scales\[1\]=1.5.*\[0, 1\]"),
        ({"bands": (1.5, -0.5, 0.0)}, r"bands\[0\]=1.5.*\[0, 1\]"),
        ({"bands": 1.0}, r"bands=1.0\): expected a tuple"),
        ({"bands": ("a", 0.5, 0.5)}, r"bands\[0\]='a'"),
    ],
)
def test_wrong_bands_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=f"WeightBands.*{told}"):
        WeightBands(**options)


def test_bands_are_plain_numbers_however_they_are_given() -> None:
    expected = WeightBands((0.5, 0.5), (1, 0))
    for bands in ([0.5, 0.5], (np.float64(0.5), 0.5)):
        policy = WeightBands(bands, [1, 0])  # type: ignore[arg-type]
        assert policy == expected and hash(policy) == hash(expected)
        assert parse_policy(repr(policy), "--policy") == expected
