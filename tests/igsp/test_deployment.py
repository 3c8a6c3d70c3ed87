"""Merging experts into weights: equal where routing is the same for all samples, left alone and named elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from nullspace_optim import IGSP, ConsolidationError, Merged, NullSpaceOptimizer, OptionError

from .synthetic import Layer, SyntheticTask, make, train


def deployed(opt: NullSpaceOptimizer, model: Layer, merged: Merged) -> Layer:
    """A plain model with the merged weights."""
    plain = Layer()
    plain.load_state_dict(model.state_dict())
    plain.load_state_dict(merged.weights, strict=False)
    return plain


def trained(**options: object) -> tuple[Layer, NullSpaceOptimizer, SyntheticTask]:
    model, opt = make(**options)
    task = SyntheticTask(0)
    train(model, opt, task, 120)
    opt.consolidate(task.loader(), name="one", progress=False)
    return model, opt, task


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_one_expert_alone_becomes_part_of_the_weight(scale: float) -> None:
    model, opt, task = trained(candidates=1, scale=scale)
    merged = opt.mode.merge_experts("one")
    assert merged.gates == {"fc": (1.0,)} and not merged.routed and list(merged.weights) == ["fc.weight"]
    x = torch.cat([task.inputs(7), torch.randn(64, 32)])
    with torch.no_grad(), opt.task("one"):
        expected = model(x)
        assert not torch.equal(merged.weights["fc.weight"], model.fc.weight), "the model itself keeps its weight"
    torch.testing.assert_close(deployed(opt, model, merged)(x), expected, atol=2e-6, rtol=1e-5)


def test_routers_that_differ_by_a_constant_merge_without_samples() -> None:
    model, opt, task = trained(threshold=1e-6, cap=10, on_cap="prune")
    record = opt._core.mode.experts.layers[0].finished[0]
    assert len(record.experts) == 2
    record.weight[:, :-1] = 0.0
    record.weight[:, -1] = torch.tensor([0.3, -0.2]) / 32**0.5  # the constant entry is sqrt(d)
    merged = opt.mode.merge_experts("one")
    assert merged.gates["fc"] == pytest.approx(torch.softmax(torch.tensor([0.3, -0.2]), 0).tolist())
    with torch.no_grad(), opt.task("one"):
        torch.testing.assert_close(deployed(opt, model, merged)(task.inputs(7)), model(task.inputs(7)))


def test_one_expert_that_always_wins_merges_for_the_samples_of_a_loader() -> None:
    model, opt, task = trained(top_k=1, threshold=1e-6, cap=10, on_cap="prune")
    layer = opt._core.mode.experts.layers[0]
    record = layer.finished[0]
    record.weight[0], record.weight[1] = 0.0, 0.0
    record.weight[0, :-1], record.weight[0, -1] = task.axes[:, 0], 1.0  # wins where x . a > -1
    assert opt.mode.merge_experts("one").routed == {"fc": "its gates depend on the sample"}
    inside = [x[(x @ task.axes[:, 0]) > 0.0] for x in task.loader()]
    merged = opt.mode.merge_experts("one", inside)
    assert merged.gates["fc"] == (1.0, 0.0)
    with torch.no_grad(), opt.task("one"):
        for x in inside:
            torch.testing.assert_close(deployed(opt, model, merged)(x), model(x), atol=2e-6, rtol=1e-5)
    both = [torch.cat([inside[0], -40 * task.axes[:, :1].T])]
    assert "depend on the sample" in opt.mode.merge_experts("one", both).routed["fc"]
    assert not layer.collected


def test_nothing_changes_and_training_goes_on() -> None:
    model, opt, task = trained(candidates=1)
    train(model, opt, SyntheticTask(2), 5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    status = str(opt.status())
    opt.mode.merge_experts("one", task.loader())
    assert str(opt.status()) == status and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_blocks_and_bottlenecks_are_left_and_named() -> None:
    _model, opt, _ = trained(candidates=1, kind="bottleneck")
    assert opt.mode.merge_experts("one").routed == {"fc": "bottleneck experts are not linear"}
    block = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)))
    opt = NullSpaceOptimizer(
        AdamW(block.parameters(), lr=1e-3), block, mode=IGSP(target_modules="0", rank=2, candidates=1)
    )
    block(torch.randn(4, 6)).square().mean().backward()
    opt.step()
    opt.consolidate([torch.randn(4, 6)], name="one", progress=False)
    merged = opt.mode.merge_experts("one")
    assert merged.routed == {"0": "Sequential is not a linear layer"} and not merged.weights
    assert "experts of 0 layers merged, 1 layers route" in str(merged) and "0: Sequential" in str(merged)


def test_bad_input_is_one_clear_error() -> None:
    _model, opt, _ = trained(candidates=1)
    with pytest.raises(OptionError, match=r"merge_experts\('two'\): no finished task has this name; known: 'one'"):
        opt.mode.merge_experts("two")

    def broken():  # type: ignore[no-untyped-def]
        yield SyntheticTask(0).inputs(1)
        raise RuntimeError("disk gone")

    with pytest.raises(ConsolidationError, match="no batches"):
        opt.mode.merge_experts("one", [])
    with pytest.raises(RuntimeError, match="disk gone"):
        opt.mode.merge_experts("one", broken())
    assert not opt._core.mode.experts.layers[0].collected
    plain = Layer()
    with pytest.raises(OptionError, match="needs a mode"):
        NullSpaceOptimizer(AdamW(plain.parameters(), lr=1e-4), plain).mode.merge_experts("one")
