from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from reference.training.clip import give_attention_its_layout, replaced


@pytest.mark.parametrize("frozen", [False, True])
def test_self_attention_is_one_product_and_comes_to_the_same_numbers(frozen: bool) -> None:
    """With frozen weights torch multiplies the transposed input of the projection sample by sample (`bmm`)."""
    torch.manual_seed(0)
    block = nn.MultiheadAttention(16, 2, batch_first=True).requires_grad_(not frozen)
    inputs = torch.randn(8, 5, 16, requires_grad=True)

    def run() -> tuple[torch.Tensor, set[tuple[int, ...]]]:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            out = block(inputs, inputs, inputs, need_weights=False)[0]
        products = {tuple(event.input_shapes[1]) for event in seen.events() or [] if event.name == "aten::bmm"}
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs)
        return torch.stack([out, gradient]), products

    plain, before = run()
    give_attention_its_layout(block)
    laid_out, after = run()
    torch.testing.assert_close(laid_out, plain, rtol=1e-5, atol=1e-6)
    assert ((5, 16, 48) in before) == frozen and (5, 16, 48) not in after


def test_cross_attention_is_left_alone() -> None:
    torch.manual_seed(0)
    block = nn.MultiheadAttention(16, 2, batch_first=True)
    queries, keys = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    expected = block(queries, keys, keys)[0]
    give_attention_its_layout(block)
    assert torch.equal(block(queries, keys, keys)[0], expected)
    assert torch.equal(block(query=queries, key=keys, value=keys)[0], expected)


def test_a_method_that_is_replaced_twice_comes_back_in_two_steps() -> None:
    layer, one = nn.Linear(2, 2), torch.ones(1, 2)
    own = layer.forward(one)
    with replaced(layer, forward=lambda x: x + 1):
        with pytest.raises(KeyError), replaced(layer, forward=lambda x: x + 2):
            assert torch.equal(layer.forward(one), one + 2)
            raise KeyError
        assert torch.equal(layer.forward(one), one + 1)
    assert torch.equal(layer.forward(one), own) and "forward" not in vars(layer)
