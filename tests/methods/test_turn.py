"""Orthogonal turns: dense twins, what stays exactly, and the way back to plain weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW

from nullspace_optim import FixedRank, NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import ConsolidationError, NullSpaceWarning, OptionError, ShapeError, StaleAnchorError
from nullspace_optim.methods import begin_turn, merge_turn

pytestmark = pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def rows(seed: int, rank: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(40, rank, generator=draw) @ torch.randn(rank, 20, generator=draw)
    return F.normalize(mixed, dim=1).to(dtype)


NAMES = ["0.weight", "2.weight"]


def train(model: nn.Module, turning: list[nn.Parameter], steps: int, **options: float) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(turning, **{"lr": 3e-2, **options})
    inputs, labels, losses = rows(7).to(next(model.parameters()).dtype), torch.arange(40) % 4, []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


@pytest.mark.parametrize("orthogonal", [True, False])
def test_blocks_turn_the_inputs_as_dense_matrices_do(orthogonal: bool) -> None:
    model = net(torch.float64)
    before = copy.deepcopy(model.state_dict())
    turning = begin_turn(model, NAMES, blocks=4, orthogonal=orthogonal)
    assert torch.equal(model[0].weight, before["0.weight"]) and torch.equal(model[2].weight, before["2.weight"])
    assert [tuple(r.shape) for r in turning] == [(4, 5, 5), (4, 4, 4)]
    first, last = train(model, turning, 100)
    assert last < first
    for layer, name, rotation in zip((model[0], model[2]), NAMES, turning):
        dense = []
        for block in rotation.detach():
            skew, eye = (block - block.T) / 2, torch.eye(len(block), dtype=torch.float64)
            dense.append((eye - skew) @ torch.linalg.inv(eye + skew) if orthogonal else eye + block)
        expected = before[name] @ torch.block_diag(*dense)
        assert torch.allclose(layer.weight, expected, atol=1e-12) and not torch.allclose(
            expected, before[name], atol=1e-2
        )
        same = torch.allclose(torch.linalg.svdvals(expected), torch.linalg.svdvals(before[name]), atol=1e-10)
        assert same is orthogonal


def test_turns_stay_orthogonal_through_a_thousand_steps() -> None:
    model = net()
    turning = begin_turn(model, NAMES, blocks=2)
    train(model, turning, 1000)
    for layer in (model[0], model[2]):
        mixing = layer.parametrizations["weight"][0].mixing()
        assert torch.allclose(mixing @ mixing.mT, torch.eye(mixing.shape[-1]), atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_free_turns_keep_old_outputs_without_a_corrected_step(decay: float) -> None:
    model, old = net(), rows(1, rank=6)
    optimizer = NullSpaceOptimizer(torch.optim.AdamW(model.parameters()), model, policy=NumericalRank())
    optimizer.consolidate([old], progress=False)
    before, outputs = copy.deepcopy(model.state_dict()), model(old).detach()
    turning = begin_turn(optimizer, ["0.weight"])
    assert torch.equal(model[0].weight, before["0.weight"]) and tuple(turning[0].shape) == (1, 14, 14)
    first, last = train(model, turning, 300, weight_decay=decay)
    assert last < first
    weight = model[0].weight.detach()
    assert (weight - before["0.weight"]).norm() > 0.1 * before["0.weight"].norm()
    assert (model(old) - outputs).norm() <= 1e-5 * outputs.norm()
    gram = before["0.weight"] @ before["0.weight"].T
    assert (weight @ weight.T - gram).norm() <= 1e-5 * gram.norm()
    assert merge_turn(optimizer) == ["0.weight"] and not parametrize.is_parametrized(model[0])
    assert torch.equal(model[0].weight, weight) and model[0].weight.requires_grad
    assert optimizer.verify().ok
    optimizer.consolidate([rows(2, rank=3)], progress=False)  # the next task has fewer free directions
    assert tuple(begin_turn(optimizer, ["0.weight"])[0].shape) == (1, 11, 11)


def test_the_control_without_orthogonality_keeps_old_outputs_but_no_norms() -> None:
    model, old = net(), rows(1, rank=6)
    optimizer = NullSpaceOptimizer(torch.optim.AdamW(model.parameters()), model, policy=NumericalRank())
    optimizer.consolidate([old], progress=False)
    before, outputs = model[0].weight.detach().clone(), model(old).detach()
    train(model, begin_turn(optimizer, ["0.weight"], orthogonal=False), 200)
    assert (model(old) - outputs).norm() <= 1e-5 * outputs.norm()
    weight = model[0].weight
    assert (weight @ weight.T - before @ before.T).norm() > 1e-2 * (before @ before.T).norm()


def test_no_free_direction_no_turn_and_without_a_basis_all_of_it_turns() -> None:
    model = net()
    optimizer = NullSpaceOptimizer(torch.optim.AdamW(model[0].parameters()), model, policy=FixedRank(20))
    optimizer.consolidate([rows(1)], progress=False)
    assert begin_turn(optimizer, ["0.weight"]) == []
    (turning,) = begin_turn(optimizer, ["2.weight"])
    assert tuple(turning.shape) == (1, 16, 16)


def test_what_cannot_turn_is_named() -> None:
    model = net()
    with pytest.raises(OptionError, match=r"no parameter '9\.weight'"):
        begin_turn(model, ["9.weight"])
    with pytest.raises(ShapeError, match=r"'0.weight' \(16, 20\) has no inputs of 3 equal blocks"):
        begin_turn(model, ["0.weight"], blocks=3)
    with pytest.raises(ShapeError, match=r"'0\.bias'"):
        begin_turn(model, ["0.bias"])
    begin_turn(model, ["0.weight"])
    with pytest.raises(OptionError, match="is parametrized already"):
        begin_turn(model, ["0.weight"])
    assert merge_turn(model) == ["0.weight"] and merge_turn(model) == []


def test_a_tied_weight_is_refused_and_so_is_a_list_with_one_wrong_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(OptionError, match="no parameter 'nope'"):
        begin_turn(model, ["0.weight", "nope"])
    assert not hasattr(model[0], "parametrizations") and model[0].weight.requires_grad
    model[1].weight = model[0].weight
    with pytest.raises(OptionError, match=r"'0\.weight' is tied to '1\.weight'"):
        begin_turn(model, ["0.weight"])


def test_consolidate_wants_merged_turns_and_old_gradients_move_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.1, weight_decay=0.5), model)
    model(torch.randn(4, 8)).sum().backward()
    begin_turn(opt, ["0.weight"], blocks=2)
    before = model[0].weight.detach().clone()
    opt.step()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ConsolidationError, match="merge_turn"):
        opt.consolidate([torch.randn(4, 8)], progress=False)
    merge_turn(opt)
    opt.consolidate([torch.randn(4, 8)], progress=False)


@pytest.mark.parametrize("name", ["0.weight", "0._orig_mod.weight"])
def test_a_compiled_part_turns_inside_its_free_directions(name: str) -> None:
    model, old = net(), rows(1, rank=6)
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=NumericalRank())
    optimizer.consolidate([old], progress=False)
    assert tuple(begin_turn(optimizer, [name])[0].shape) == (1, 14, 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_free_turns_are_rounded_once_also_under_autocast(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=FixedRank(6))
    optimizer.consolidate([rows(1, rank=6, dtype=dtype)], progress=False)
    before = model[0].weight.detach().clone()
    turning = begin_turn(optimizer, ["0.weight"])
    torch.nn.init.normal_(turning[0], generator=torch.Generator().manual_seed(0))
    free, mixing = model[0].parametrizations["weight"][0].free, model[0].parametrizations["weight"][0].mixing()[0]
    exact = before.double() + before.double() @ free.double() @ (mixing.double() - torch.eye(14)) @ free.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model[0].weight.detach()
    assert found.dtype is dtype and torch.equal(found, model[0].weight)
    assert torch.allclose(found.double(), exact, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_model_made_half_meanwhile_still_turns() -> None:
    model = net()
    begin_turn(model, NAMES, blocks=2)
    model.bfloat16()
    assert model(rows(1).bfloat16()).isfinite().all() and merge_turn(model) == NAMES


def test_an_edit_elsewhere_is_not_accepted_by_the_merge() -> None:
    model, old = net(), rows(1, rank=6)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model)
    optimizer.consolidate([old], progress=False)
    begin_turn(optimizer, ["0.weight"])
    with torch.no_grad():
        model[2].weight.add_(1.0)
    with pytest.raises(StaleAnchorError, match=r"'2\.weight'"):
        merge_turn(optimizer)
    optimizer.restore()
    assert merge_turn(optimizer) == ["0.weight"] and optimizer.verify().ok


def test_weights_that_cannot_turn_are_said() -> None:
    model = net()
    optimizer = NullSpaceOptimizer(AdamW(model[0].parameters()), model, policy=FixedRank(20))
    optimizer.consolidate([rows(1)], progress=False)
    with pytest.warns(NullSpaceWarning, match=r"1 weights have no free direction and stay: 0\.weight"):
        begin_turn(optimizer, NAMES)
