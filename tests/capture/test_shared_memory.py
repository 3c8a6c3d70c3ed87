"""Two parameters on one memory are one weight: one fate, one basis, whichever of them is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank
from nullspace_optim.model.storage import overlapping_groups


class Pair(nn.Module):
    """Parameters `one` and `two` with the memory that `tie` gives `two`; `use` computes the output."""

    def __init__(self, tie: Callable[[Tensor], Tensor], use: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(shape) * 0.2)
        self.two = nn.Parameter(tie(self.one.data))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.one, self.two)


def _autoencoder(x: Tensor, one: Tensor, two: Tensor) -> Tensor:
    return functional.linear(torch.tanh(functional.linear(x, one)), two)


TIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "transpose": (lambda w: w.t(), _autoencoder, (40, 24)),
    "same": (lambda w: w, lambda x, a, b: functional.linear(torch.tanh(functional.linear(x, a)), b.t()), (40, 24)),
    "one of two read": (lambda w: w.t(), lambda x, a, b: functional.linear(x, a), (40, 24)),
    "kernel": (
        lambda w: w[..., None],
        lambda x, a, b: functional.conv1d(x[..., None], b)[..., 0] + functional.linear(x, a),
        (40, 24),
    ),
    "stack": (lambda w: w.mT, lambda x, a, b: torch.bmm(torch.bmm(x.expand(2, -1, -1), a.mT), b.mT), (2, 40, 24)),
}


def _wrapped(model: nn.Module, **options: Any) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, policy=NumericalRank(), **options)


def _train(optimizer: NullSpaceOptimizer, model: nn.Module, steps: int = 10) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()


def _moved(model: nn.Module, x: Tensor, before: Tensor) -> float:
    return float((model(x).detach() - before).norm() / before.norm())


@pytest.mark.parametrize("rank", [4, 14])  # anchor form and difference form
@pytest.mark.parametrize("still", ["", "one", "two"])
@pytest.mark.parametrize("tie", TIES)
def test_both_names_are_protected_whichever_is_trained(tie: str, still: str, rank: int) -> None:
    model = Pair(*TIES[tie])
    x = torch.randn(rank, 24)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    assert {optimizer.bases[name].fate for name in ("one", "two")} == {Fate.PROTECTED}
    assert optimizer.bases["one"].rank == optimizer.bases["two"].rank
    before, weight = model(x).detach(), model.one.detach().clone()
    if still:
        getattr(model, still).requires_grad_(False)
    _train(optimizer, model)
    assert not torch.equal(model.one, weight)
    assert _moved(model, x, before) < 1e-5 and optimizer.verify().ok
    optimizer.consolidate([torch.randn(2, 24)], progress=False)  # the second task with one of them at rest
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5 and optimizer.verify().ok


def test_a_tied_autoencoder_has_the_sides_of_the_dense_mathematics() -> None:
    model, x = Pair(*TIES["transpose"]), torch.randn(10, 24)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    inner = torch.tanh(x @ model.one.detach().T)
    for name, side, rows in (("one", "right", x), ("one", "left", inner), ("two", "left", x), ("two", "right", inner)):
        U = optimizer.bases[name].subspaces[side].basis[0].double()  # type: ignore[index]
        assert float((rows.double() - rows.double() @ U @ U.T).norm() / rows.norm()) < 1e-5


@pytest.mark.parametrize("still", ["one", "two"])
def test_a_full_encoder_holds_its_decoder(still: str) -> None:
    model, x = Pair(*TIES["transpose"]), torch.randn(64, 24)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    assert {optimizer.bases[name].fate for name in ("one", "two")} == {Fate.FULL}
    before, weight = model(x).detach(), model.one.detach().clone()
    getattr(model, still).requires_grad_(False)
    _train(optimizer, model)
    assert torch.equal(model.one, weight) and _moved(model, x, before) == 0.0


PARTIAL: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "some rows": (
        lambda w: w[:20],
        lambda x, a, b: functional.linear(x, a)[:, :20] + functional.linear(x, b),
        (40, 24),
    ),
    "some rows, read alone": (lambda w: w[:20], lambda x, a, b: functional.linear(x, b), (40, 24)),
    "shifted": (lambda w: w.view(-1)[100:580].view(20, 24), lambda x, a, b: functional.linear(x, b), (40, 24)),
    "another shape": (lambda w: w.view(24, 40), lambda x, a, b: functional.linear(x, a) @ b.t(), (40, 24)),
    "embedding and its transpose": (lambda w: w.t(), lambda x, a, b: a[:3] @ b, (40, 24)),
}


@pytest.mark.parametrize("tie", PARTIAL)
def test_parameters_that_overlap_in_part_are_frozen_together(tie: str) -> None:
    model, x = Pair(*PARTIAL[tie]), torch.randn(4, 24)
    optimizer = _wrapped(model)
    report = optimizer.consolidate([x], progress=False)
    assert {row.fate for row in report.parameters} == {Fate.FROZEN}
    assert all("shares its memory with" in row.reason for row in report.parameters)
    before = model(x).detach()
    _train(optimizer, model)
    assert _moved(model, x, before) == 0.0


def test_views_of_one_buffer_that_do_not_overlap_are_weights_of_their_own() -> None:
    flat = torch.randn(40 * 24 * 2) * 0.2
    model = Pair(lambda w: w, _autoencoder, (40, 24))
    model.one.data, model.two.data = flat[: 40 * 24].view(40, 24), flat[40 * 24 :].view(24, 40)
    x = torch.randn(4, 24)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    assert {name: basis.rank for name, basis in optimizer.bases.items()} == {"one": 4, "two": 4}
    before = model(x).detach()
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5


def test_a_buffer_on_a_weight_is_that_weight_and_no_buffer_that_moved() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(40, 24))
            self.register_buffer("again", self.one.data.t())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.again

    model, x = Buffered(), torch.randn(4, 24)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    assert optimizer.bases["one"].rank == 4
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5 and optimizer.verify().ok


def test_untrained_parameters_of_one_flat_buffer_are_each_noted_when_read() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(3, 8, 8)
            self.first, self.second, self.third = (nn.Parameter(part, requires_grad=False) for part in flat)
            self.head = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ self.first @ self.third)

    model = Frozen()
    optimizer = _wrapped(model)
    optimizer.consolidate([torch.randn(2, 8)], progress=False)
    assert optimizer._core.store.tasks[0]["untrained"] == ["first", "third"]


def test_a_joint_bias_is_not_folded_into_a_weight_with_two_names() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(24, 40), nn.Linear(40, 24)
            self.decoder.weight.data = self.encoder.weight.data.t()

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(torch.tanh(self.encoder(x)))

    model, x = Biased(), torch.randn(4, 24)
    optimizer = _wrapped(model, bias="joint")
    optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5
    assert {optimizer.bases[f"{name}.bias"].fate for name in ("encoder", "decoder")} == {Fate.FROZEN}


def test_groups_are_those_whose_bytes_overlap() -> None:
    flat = torch.zeros(100)
    tensors = {
        "b": flat[10:30],
        "a": flat[:20],
        "apart": flat[30:50],
        "other": torch.zeros(100),
        "d": flat[60:90].view(5, 6).t(),
        "c": flat[60:90].view(5, 6),
        "empty": flat[:0],
    }
    assert overlapping_groups(tensors) == [("b", "a"), ("d", "c")]
