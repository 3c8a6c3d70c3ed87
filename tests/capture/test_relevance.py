"""Rows that no output depends on do not count; where that cannot be known, all rows do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capturing import Holds, W, capture, close, gram
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def rows_of(model: nn.Module, x: Any, name: str, **options: Any) -> tuple[int, str | None]:
    observer = capture(model, x, rows="relevant", **options)
    return int(observer.captured[name].sides["right"].rows.sum()), observer.relevance_note


@pytest.mark.fault(54)
def test_rows_that_no_output_reads_do_not_count() -> None:
    model = Holds(lambda x, w: functional.linear(x, w)[:, 0], w=W(5, 4))
    x = W(3, 7, 4)
    seen = capture(model, x, rows="relevant").captured["w"]
    assert seen.sides["right"].rows.tolist() == [3]
    assert close(seen.sides["right"].matrix[0], gram(x[:, 0]))


ALIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": torch.relu_,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softshrink": functional.softshrink,
    "hardshrink": functional.hardshrink,
    "elu": functional.elu,
    "glu": functional.glu,
    "gate": lambda y: torch.relu(y) * torch.relu(y.flip(-1)),
    "square": lambda y: torch.relu(y).square(),
    "clamp": lambda y: y.clamp(min=1e6),
    "max over a window": lambda y: functional.max_pool1d(torch.relu(y), 2),
    "softmax": lambda y: (1e4 * y).softmax(-1),
}


@pytest.mark.parametrize("name", ALIVE)
def test_rows_whose_units_are_switched_off_count(name: str) -> None:
    model = Holds(lambda x, w: ALIVE[name](functional.linear(x, w)[None] - 1e3), w=W(4, 4))
    count, _ = rows_of(model, W(9, 4), "w")
    assert count == 9


@pytest.mark.parametrize("name", ALIVE)
def test_switched_off_rows_count_under_checkpointing(name: str) -> None:
    model = Holds(
        lambda x, w: checkpoint(lambda x: ALIVE[name](functional.linear(x, w)[None] - 1e3), x, use_reentrant=False),
        w=W(4, 4),
    )
    count, _ = rows_of(model, W(9, 4), "w")
    assert count == 9


def test_max_pooling_spreads_over_its_window() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.MaxPool2d(2))
    assert rows_of(model, W(2, 2, 6, 6), "0.weight") == (72, None)


CHOOSING: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda y: y.max(0).values,
    "amax": lambda y: y.amax(0),
    "topk": lambda y: y.topk(1, 0).values,
    "sort": lambda y: y.sort(0).values[:1],
    "argmax": lambda y: y[y.sum(-1).argmax()],
    "gt": lambda y: torch.where(y > 0, y, 0),
    "maximum": lambda y: torch.maximum(y, y * 2),
    "adaptive_max_pool2d": lambda y: functional.adaptive_max_pool2d(y[None], 1),
    "_local_scalar_dense": lambda y: y[:1] * float(y.mean()),
    "bernoulli_": lambda y: functional.dropout(y, 0.5, training=True),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_choosing_by_value_counts_all_rows_and_says_so(name: str) -> None:
    model = Holds(lambda x, w: CHOOSING[name](functional.linear(x, w)), w=W(5, 4))
    count, note = rows_of(model, W(9, 4), "w")
    assert count == 9
    assert note is not None and name.split()[-1] in note


def mean_outside_autograd(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y.mean()


DETACHED: dict[str, Callable[[Tensor, int], Any]] = {
    "detached": lambda y, n: y[:1] * y[:n].detach().mean(),
    "data": lambda y, n: y[:1] * y[:n].data.mean(),
    "returned detached": lambda y, n: (y[:1], y[:n].detach() * 1),
    "no_grad": lambda y, n: y[:1] * mean_outside_autograd(y[:n]),
}


@pytest.mark.parametrize("name", DETACHED)
@pytest.mark.parametrize("read", [9, 4])
def test_rows_that_are_read_outside_autograd_count(name: str, read: int) -> None:
    model = Holds(lambda x, w: DETACHED[name](functional.linear(x, w), read), w=W(5, 4))
    assert rows_of(model, W(9, 4), "w") == (read, None)


def test_integer_choices_keep_relevance() -> None:
    def forward(x: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
        y = functional.linear(x[0], w)
        return functional.normalize(y[torch.arange(3), x[1].argmax(-1)], dim=-1)

    model = Holds(forward, w=W(5, 4))
    assert rows_of(model, (W(3, 7, 4), torch.randint(0, 9, (3, 7))), "w") == (3, None)


def test_a_zero_weight_does_not_hide_what_comes_before() -> None:
    model = Holds(lambda x, a, b: functional.linear(functional.linear(x, a), b), a=W(2, 4), b=torch.zeros(5, 2))
    assert rows_of(model, W(9, 4), "a") == (9, None)


def test_outputs_without_gradient_count_all_rows() -> None:
    model = Holds(lambda x, w: functional.linear(x, w).argmax(-1), w=W(5, 4))
    assert rows_of(model, W(9, 4), "w")[0] == 9
    model = nn.Linear(4, 5)
    model.requires_grad_(False)
    assert rows_of(model, W(9, 4), "weight")[0] == 9


def test_an_output_overwritten_out_of_order_counts_the_row_that_is_returned() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = functional.linear(x, w)
        y.copy_(y.flip(0).clone())
        return y[:1]

    x = W(9, 4)
    seen = capture(Holds(forward, w=W(5, 4)), x, rows="relevant").captured["w"]
    assert close(seen.sides["right"].matrix[0], gram(x[8:]))


def test_constant_rows_count_where_the_product_is_detached() -> None:
    """DoRA divides by the detached norm of `A(eye)`; without those rows `A` would be free to change it."""
    model = Holds(lambda x, a: functional.linear(x, a) / functional.linear(torch.eye(6), a).detach().norm(), a=W(4, 6))
    x = W(2, 6)
    seen = capture(model, x, rows="relevant").captured["a"]
    assert seen.sides["right"].rows.tolist() == [8]
    assert close(seen.sides["right"].matrix[0], torch.eye(6).double() + gram(x))
