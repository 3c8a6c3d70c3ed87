"""Low-rank additions to chosen rows: three LoRA linears as a twin, restarts, and LoRSU's selection by brute force."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.errors import ConsolidationError, NullSpaceWarning, OptionError, ShapeError
from nullspace_optim.methods import (
    begin_low_rank,
    begin_turn,
    leading_entries,
    leading_heads,
    merge_low_rank,
    summed_gradients,
)

NAME, WIDTH, RANK, FACTOR = "in_proj_weight", 8, 3, 0.25


def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True).double()


def train(parts: list[nn.Parameter], forward: object, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW(parts, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (forward() - 1).square().mean().backward()  # type: ignore[operator]
        optimizer.step()


def test_an_addition_to_keys_and_values_is_two_lora_linears() -> None:
    model, tokens = attention(), torch.randn(5, 4, WIDTH, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    plain = model(tokens, tokens, tokens)[0].detach()
    parts = begin_low_rank(model, {NAME: torch.arange(WIDTH, 3 * WIDTH)}, RANK, factor=FACTOR)
    assert [tuple(part.shape) for part in parts] == [(RANK, WIDTH), (2 * WIDTH, RANK)] and not parts[1].any()
    assert torch.equal(model(tokens, tokens, tokens)[0], plain)
    down, up = (part.detach().clone().requires_grad_() for part in parts)

    def twin() -> Tensor:
        query, key, value = (
            F.linear(tokens, before[NAME][first : first + WIDTH], before["in_proj_bias"][first : first + WIDTH])
            for first in (0, WIDTH, 2 * WIDTH)
        )
        key = key + FACTOR * F.linear(F.linear(tokens, down), up[:WIDTH])
        value = value + FACTOR * F.linear(F.linear(tokens, down), up[WIDTH:])
        q, k, v = (part.view(5, 4, 2, 4).transpose(1, 2) for part in (query, key, value))
        mixed = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(5, 4, WIDTH)
        return F.linear(mixed, before["out_proj.weight"], before["out_proj.bias"])

    train(parts, lambda: model(tokens, tokens, tokens)[0])
    train([down, up], twin)  # type: ignore[list-item]
    moved = model(tokens, tokens, tokens)[0]
    assert torch.allclose(moved, twin(), atol=1e-10) and not torch.allclose(moved, plain, atol=1e-2)
    assert torch.equal(model.in_proj_weight[:WIDTH], before[NAME][:WIDTH])
    merged = model.in_proj_weight.detach().clone()
    assert merge_low_rank(model) == [NAME] and type(model) is nn.MultiheadAttention
    assert torch.equal(model.in_proj_weight, merged) and model.in_proj_weight.requires_grad


def test_a_new_beginning_keeps_outputs_and_parameters_and_takes_other_rows() -> None:
    model, tokens = attention(), torch.randn(5, 4, WIDTH, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    parts = begin_low_rank(model, {NAME: torch.tensor([1, 9])}, RANK, generator=draw)
    train(parts, lambda: model(tokens, tokens, tokens)[0])
    first = model.in_proj_weight.detach().clone()
    again = begin_low_rank(model, {NAME: torch.tensor([2, 20])}, RANK, generator=torch.Generator().manual_seed(3))
    assert all(one is two for one, two in zip(parts, again)) and torch.equal(model.in_proj_weight, first)
    fresh = begin_low_rank(nn.Linear(WIDTH, 3), {"weight": torch.tensor([0])}, RANK, generator=draw)[0]
    assert float(parts[0].abs().max()) <= (6 / (RANK + WIDTH)) ** 0.5 and not torch.equal(fresh, parts[0].float())
    train(parts, lambda: model(tokens, tokens, tokens)[0])
    changed = (model.in_proj_weight != first).any(dim=1).nonzero().flatten().tolist()
    assert changed == [2, 20]


def test_what_cannot_be_added_to_is_named_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    rows = torch.tensor([0, 1])
    with pytest.raises(OptionError, match=r"no parameter '0\.nope'"):
        begin_low_rank(model, {"0.weight": rows, "0.nope": rows}, 2)
    assert not hasattr(model[0], "parametrizations") and model[0].weight.requires_grad
    with pytest.raises(OptionError, match="rank=0"):
        begin_low_rank(model, {"0.weight": rows}, 0)
    for wrong in ([], [6], [-1], [1, 1]):
        with pytest.raises(ShapeError, match="numbers of its 6 rows"):
            begin_low_rank(model, {"0.weight": torch.tensor(wrong, dtype=torch.int64)}, 2)
    with pytest.raises(ShapeError, match=r"'0\.bias' \(6,\)"):
        begin_low_rank(model, {"0.bias": rows}, 2)
    begin_low_rank(model, {"0.weight": rows}, 2)
    for other, options in ((torch.tensor([3]), {}), (rows, {"factor": 2.0})):
        with pytest.raises(ShapeError, match="began with 2 rows, rank 2"):
            begin_low_rank(model, {"0.weight": other}, 2, **options)
    begin_turn(model, ["1.weight"], blocks=2)
    with pytest.raises(OptionError, match="parametrized already"):
        begin_low_rank(model, {"1.weight": rows}, 2)
    assert merge_low_rank(model) == ["0.weight"]


def test_consolidate_wants_it_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    begin_low_rank(model, {"0.weight": torch.tensor([0])}, 1)
    with pytest.raises(ConsolidationError, match="merge_low_rank"):
        optimizer.consolidate([torch.randn(5, 4)], progress=False)


def test_gradients_are_the_sum_of_a_loop_over_samples() -> None:
    torch.manual_seed(0)
    model, images, labels = nn.Linear(5, 3).double(), torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    model.weight.requires_grad_(False)
    begin_low_rank(model, {"weight": torch.tensor([1])}, 1)
    weight = model.parametrizations["weight"].original

    def loss(part: slice) -> Tensor:
        return F.cross_entropy(model(images[part]), labels[part], reduction="sum")

    found = summed_gradients([weight], [slice(0, 4), slice(4, 7)], loss)[0]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for image, label in zip(images, labels):
        chances = (model.bias + weight @ image).softmax(0).detach()
        chances[label] -= 1
        expected += chances[:, None] * image[None]
    assert torch.allclose(found, expected) and not weight.requires_grad and weight.grad is None


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_leading_entries_are_those_of_a_sort(share: float) -> None:
    gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    chosen = leading_entries(gradient, share)
    best = sorted(range(60), key=lambda n: -abs(float(gradient.flatten()[n])))[: round(60 * share)]
    assert sorted(chosen.flatten().nonzero().flatten().tolist()) == sorted(best)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_leading_heads_are_those_of_three_loops(count: int) -> None:
    heads, size = 4, 3
    gradient = torch.randn(3 * heads * size, 7, generator=torch.Generator().manual_seed(1))
    rows = {h: [part * heads * size + h * size + n for part in range(3) for n in range(size)] for h in range(heads)}
    scores = {h: sum(float(gradient[row].square().sum()) for row in rows[h]) for h in range(heads)}
    best = sorted(scores, key=lambda h: -scores[h])[:count]
    assert leading_heads(gradient, heads, count).tolist() == sorted(row for h in best for row in rows[h])
    with pytest.raises(ShapeError, match="5 of 4 heads"):
        leading_heads(gradient, heads, 5)


def test_rows_as_a_list_begin_anew_and_a_mask_is_refused() -> None:
    model = nn.Linear(4, 2)
    parts = begin_low_rank(model, {"weight": [0]}, 1)  # type: ignore[dict-item]
    torch.nn.init.ones_(parts[1])
    parts[0].grad = torch.ones_like(parts[0])
    before = model.weight.detach().clone()
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        begin_low_rank(model, {"weight": torch.tensor([True])}, 1)
    assert torch.equal(model.weight, before)
    begin_low_rank(model, {"weight": [1]}, 1)  # type: ignore[dict-item]
    assert torch.equal(model.weight, before) and parts[0].grad is None
    torch.nn.init.ones_(parts[1])
    assert (model.weight != before).any(dim=1).tolist() == [False, True]


def test_a_draw_that_fails_and_a_factor_of_nothing_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    for wrong in (0, float("nan"), True, "1"):
        with pytest.raises(OptionError, match="factor="):
            begin_low_rank(model, {"0.weight": torch.tensor([0])}, 1, factor=wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"no parameter '9\.weight'"):
        begin_low_rank(model, {"9.weight": torch.tensor([0])}, 1)
    with pytest.raises(AttributeError):
        begin_low_rank(model, {"0.weight": torch.tensor([0])}, 1, generator=3)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_copy_is_merged_without_its_original() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    parts = begin_low_rank(model, {"0.weight": torch.tensor([0, 1])}, 2)
    torch.nn.init.ones_(parts[1])
    other, inputs = copy.deepcopy(model), torch.randn(3, 4)
    expected = model(inputs)
    assert merge_low_rank(other) == ["0.weight"] and type(other[0]) is nn.Linear
    assert torch.equal(other(inputs), expected) and torch.equal(model(inputs), expected)
    assert merge_low_rank(model) == ["0.weight"] and torch.equal(model(inputs), expected)


def test_what_stands_beside_an_addition_is_named_and_nothing_is_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    begin_low_rank(model, {"0.weight": torch.tensor([0]), "1.weight": torch.tensor([0])}, 1)
    nn.utils.parametrizations.orthogonal(model[1])
    with pytest.raises(OptionError, match=r"'1\.weight' has a parametrization beside LowRank \(_Orthogonal\)"):
        merge_low_rank(model)
    assert hasattr(model[0], "parametrizations")


def test_names_are_those_of_the_bases_of_compiled_parts_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    for name in ("0.weight", "0._orig_mod.weight"):
        begin_low_rank(model, {name: torch.tensor([0])}, 1)
        for known in (name, "0._orig_mod.parametrizations.weight.original"):
            with pytest.raises(OptionError, match="is parametrized already"):
                begin_turn(model, [known], blocks=2)
        assert merge_low_rank(model) == ["0.weight"]


@pytest.mark.parametrize("verb", ["verify", "blend", "measure"])
def test_an_addition_that_is_not_merged_is_said(verb: str) -> None:
    model, rows = nn.Sequential(nn.Linear(4, 6)), torch.randn(20, 2) @ torch.randn(2, 4)
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.consolidate([rows], progress=False)
    before = copy.deepcopy(model.state_dict())
    begin_low_rank(model, {"0.weight": torch.tensor([0])}, 1)
    if verb == "verify":
        with pytest.warns(NullSpaceWarning, match="only what lies below is compared: merge_low_rank"):
            optimizer.verify()
    elif verb == "blend":
        with pytest.raises(OptionError, match=r"would not go back with it: merge_low_rank\(model\) first"):
            optimizer.blend(before, 0.5)
    else:
        with pytest.raises(ConsolidationError, match="merge_low_rank"):
            optimizer.measure([rows], progress=False)


def test_gradients_that_are_none_are_refused() -> None:
    model = nn.Linear(4, 6)
    begin_low_rank(model, {"weight": torch.tensor([0])}, 1)
    with pytest.raises(OptionError, match=r"weights\[0\] \(6, 4\) is computed from parameters"):
        summed_gradients([model.weight], [torch.ones(1, 4)], lambda x: model(x).sum())
    with pytest.raises(OptionError, match="no batches"):
        summed_gradients([model.bias], iter([]), lambda x: model(x).sum())
    broken = torch.ones(6, 2).index_fill(0, torch.tensor([1]), float("nan"))
    for choose in (lambda: leading_entries(broken, 0.5), lambda: leading_heads(broken, 2, 1)):
        with pytest.raises(OptionError, match="not finite"):
            choose()
    with pytest.raises(OptionError, match=r"share=1\.5"):
        leading_entries(torch.ones(3), 1.5)
    with pytest.raises(ShapeError, match="1 of 0 heads"):
        leading_heads(torch.ones(6, 2), 0, 1)


def test_additions_under_autocast_are_not_rounded() -> None:
    model = nn.Linear(32, 32)
    parts = begin_low_rank(model, {"weight": torch.arange(32)}, 4)
    torch.nn.init.normal_(parts[1])
    expected = model.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.weight, expected)
