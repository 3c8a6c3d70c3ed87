"""Addresses: of which parameter an address is part, also after memory is freed and taken again."""

from __future__ import annotations

from typing import Any

import torch
from capturing import Holds, W, capture, close, gram
from torch import Tensor, nn
from torch.nn import functional

from nullspace_optim.capture.aliases import CONSTANT, AliasTracker


def test_rule_a_parameters_in_one_storage_are_told_apart() -> None:
    flat = torch.randn(5 * 4 + 3 * 4)
    model = nn.Module()
    model.a = nn.Parameter(flat[:20].view(5, 4))
    model.b = nn.Parameter(flat[20:].view(3, 4))
    x = W(9, 4)
    found = capture(model, x, run=lambda x: functional.linear(x, model.a)).captured
    assert close(found["a"].sides["right"].matrix[0], gram(x))
    assert not found["b"].met


def test_rule_a_a_freed_address_is_not_mistaken_for_a_weight() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(50):
            copy = w.clone()
            del copy
            fresh = torch.rand_like(x) + x
            x = x + fresh.sum() * 0
        return functional.linear(x, w)

    found = capture(Holds(forward, w=W(8, 8)), W(8, 8)).captured
    assert found["w"].reasons == () and found["w"].sides["right"].rows.tolist() == [8]


def test_rule_a_nothing_is_held_after_the_batch() -> None:
    import weakref

    kept: list[Any] = []

    def forward(x: Tensor, w: Tensor) -> Tensor:
        hidden = x + 1
        kept.append(weakref.ref(hidden))
        return functional.linear(hidden, w)

    for rows in ("all", "relevant"):
        capture(Holds(forward, w=W(4, 4)), W(3, 4), rows=rows)
        assert kept[-1]() is None


def test_an_address_that_another_parameter_takes_over_changes_its_name() -> None:
    whole, there = nn.Parameter(torch.randn(3, 4)), ["first"]
    shapes = {name: torch.empty(3, 4) for name in ("first", "second")}
    memory = AliasTracker(shapes, {}, {}, lambda: {there[0]: whole})
    assert memory.origin(whole).names == ("first",)
    there[0] = "second"
    memory.refresh()
    assert memory.origin(whole).names == ("second",)


def test_a_buffer_that_is_freed_under_its_holder_is_forgotten() -> None:
    memory = AliasTracker({}, {}, {}, dict)
    buffer = torch.empty(64)
    memory.learn(buffer, CONSTANT)
    address = buffer.data_ptr()
    assert memory.origin(buffer) == CONSTANT
    buffer.untyped_storage().resize_(0)  # as FSDP2 frees what it has gathered
    memory._look_again(address, torch.empty(1))
    assert not memory._storages and not memory._holders
