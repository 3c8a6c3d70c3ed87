"""Faults of gradients, steps, parameters and groups that no other file tests."""

from __future__ import annotations

import copy
import math
import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import NEW, OLD, mlp, relative_drift, train

from nullspace_optim import ConsolidationError, Fate, NullSpaceOptimizer, NumericalRank, ShapeError, StaleAnchorError
from nullspace_optim.errors import OptionError


def wrap(model: nn.Module, base: Optimizer | None = None, old: Any = OLD, **options: Any) -> NullSpaceOptimizer:
    base = base or AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = NullSpaceOptimizer(base, model, policy=NumericalRank(), **options)
    optimizer.consolidate([old], progress=False)
    return optimizer


@pytest.mark.fault(1)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_gradient_stays_in_its_row_and_is_named_when_bases_are_read(bad: float, tmp_path: Any) -> None:
    model = mlp()
    optimizer = wrap(model, SGD(model.parameters(), lr=0.1))
    twin = copy.deepcopy(model)
    plain = SGD(twin.parameters(), lr=0.1)
    for one, base in ((model, optimizer), (twin, plain)):
        one(NEW).square().mean().backward()
        one[0].weight.grad[3, 2] = bad
        base.step()
    broken = ~model[0].weight.isfinite()
    assert broken.any(1).nonzero().reshape(-1).tolist() == [3], "a unit that is not finite was lost already"
    assert not twin[0].weight[3, 2].isfinite(), "the base decides as without us"
    assert model[2].weight.isfinite().all()
    rest = [row for row in range(16) if row != 3]
    start = twin[0].weight + 0.1 * twin[0].weight.grad
    assert relative_drift(model[0].weight[rest] @ OLD.T, start[rest] @ OLD.T) <= 1e-5
    for read in (lambda: optimizer.consolidate([OLD], progress=False), lambda: optimizer.save(tmp_path / "bases")):
        with pytest.raises(StaleAnchorError, match=r"'0\.weight' holds values that are not finite"):
            read()
    assert not (tmp_path / "bases").exists()


class Decaying(SGD):
    """Decays every parameter, with or without a gradient."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.9)


@pytest.mark.fault(3)
@pytest.mark.parametrize("base", [AdamW, Decaying])
def test_a_protected_weight_without_gradient(base: Any) -> None:
    model = mlp()
    optimizer = wrap(model, base(model.parameters(), lr=0.1, weight_decay=0.1))
    train(optimizer, model, 3)
    before, outputs = model[0].weight.detach().clone(), model[0](OLD).detach()
    for _ in range(3):
        optimizer.zero_grad()
        model(NEW).square().mean().backward()
        model[0].weight.grad = None
        optimizer.step()
    assert torch.equal(model[0].weight, before) is (base is AdamW)
    assert relative_drift(model[0](OLD), outputs) <= 1e-6


@pytest.mark.fault(7)
def test_unscaling_the_wrapper_and_stepping_the_base_is_protected() -> None:
    model = mlp()
    optimizer = wrap(model, base := AdamW(model.parameters(), lr=0.01))
    before, scaler = model(OLD).detach(), torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(model(NEW).square().mean()).backward()
        scaler.unscale_(optimizer)  # torch takes wrapper and base for two optimizers
        scaler.step(base)
        scaler.update()
    assert relative_drift(model(OLD), before) <= 1e-5


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 24, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


@pytest.mark.fault(13)
@pytest.mark.filterwarnings("error")
def test_complex_weights_keep_their_outputs_and_drift_sees_imaginary_parts() -> None:
    model, old = Complex(), torch.randn(5, 24, dtype=torch.complex64)
    optimizer = wrap(model, old=old)
    before, weight = model(old).detach(), model.weight.detach().clone()
    train(optimizer, model, 20, torch.randn(16, 24, dtype=torch.complex64))
    assert relative_drift(model(old), before) <= 1e-5
    assert relative_drift(model.weight, weight) > 1e-2
    assert optimizer.verify([old]).drift("task 1") <= 1e-5
    with torch.no_grad():
        model.weight.imag.add_(old.mean(0).real)
    assert optimizer.verify([old]).drift("task 1") > 1e-2


@pytest.mark.fault(14)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_announced_with_its_drift_and_the_way_out(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=NumericalRank())
    report = str(optimizer.consolidate([OLD.to(dtype)], progress=False))
    assert "4 parameters are in half precision ('0.weight', ...)" in report
    assert "float32 parameters under autocast hold 1e-5" in report
    train(optimizer, model, 5, NEW.to(dtype))
    assert optimizer.verify().worst <= {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.fault(16)
def test_an_expanded_parameter_is_refused_by_name() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(16, 1).expand(16, 24))
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ConsolidationError, match=r"'0\.weight' \(16, 24\) is an expanded tensor.*clone"):
        optimizer.consolidate([OLD], progress=False)
    model[0].weight.requires_grad_(False)
    assert optimizer.consolidate([OLD], progress=False).fates[Fate.PROTECTED] == 1


# ---- parameters and groups ----


@pytest.mark.fault(24)
def test_protection_goes_on_where_a_parameter_was_frozen_for_a_while() -> None:
    model = mlp()
    optimizer = wrap(model)
    before = model(OLD).detach()
    for trained in (False, True):
        model[0].weight.requires_grad_(trained)
        train(optimizer, model)
        assert relative_drift(model(OLD), before) <= 1e-5
    assert optimizer.verify().ok


@pytest.mark.fault(26)
def test_a_layer_replaced_by_another_shape_is_named_until_released() -> None:
    model = mlp()
    optimizer = wrap(model)
    model[2] = nn.Linear(16, 3)
    optimizer.add_param_group({"params": model[2].parameters()})
    message = r"'2\.weight' is \(3, 16\), its basis was made for \(8, 16\).*release"
    for use in (lambda: train(optimizer, model, 1), lambda: optimizer.consolidate([OLD]), optimizer.verify):
        with pytest.raises(ShapeError, match=message):
            use()
    for name in ("2.weight", "2.bias"):
        optimizer.release(name)
    before = model[0](OLD).detach()
    train(optimizer, model)
    assert relative_drift(model[0](OLD), before) <= 1e-5
    optimizer.consolidate([OLD], progress=False)
    assert optimizer.bases["2.weight"].shape == (3, 16)


@pytest.mark.fault(23, 26)
def test_a_layer_replaced_by_the_same_shape_is_held_to_the_same_anchors() -> None:
    model = mlp()
    optimizer = wrap(model)
    model[2] = nn.Linear(16, 8)
    optimizer.add_param_group({"params": model[2].parameters()})
    with pytest.raises(StaleAnchorError, match=r"'2\.weight' was changed outside.*reanchor"):
        train(optimizer, model, 1)
    optimizer.reanchor()
    before = model(OLD).detach()
    train(optimizer, model)
    assert relative_drift(model(OLD), before) <= 1e-5


@pytest.mark.fault(38)
@pytest.mark.parametrize("bias", ["freeze", "joint"])
def test_swapped_parameter_objects_stay_protected(bias: str) -> None:
    """`fully_shard`, Accelerate and `load_state_dict(assign=True)` put new objects into model and groups."""
    model = mlp()
    optimizer = wrap(model, bias=bias)
    train(optimizer, model, 2)
    before = model(OLD).detach()
    fresh = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    model.load_state_dict(fresh, assign=True)
    optimizer.param_groups[0]["params"][:] = list(model.parameters())
    start = model[0].weight.detach().clone()
    train(optimizer, model)
    assert relative_drift(model(OLD), before) <= 1e-5
    assert relative_drift(model[0].weight, start) > 1e-3
    assert all(guard.parameter is model.get_parameter(n) for n, guard in optimizer._core.protection.guards.items())
    assert optimizer.verify().ok


@pytest.mark.fault(27)
def test_prefixes_of_wrappers_are_no_part_of_a_name() -> None:
    model = mlp()
    optimizer = wrap(model)
    twin = torch.compile(copy.deepcopy(model), backend="eager")
    other = NullSpaceOptimizer(AdamW(twin.parameters()), twin)
    assert next(name for name, _ in twin.named_parameters()) == "_orig_mod.0.weight"
    other.load_state_dict(optimizer.state_dict())
    assert list(other.bases) == list(optimizer.bases)


@pytest.mark.fault(30)
def test_a_second_wrapper_of_the_same_parameters_takes_the_bases_over() -> None:
    model = mlp()
    first = wrap(model)
    before = model(OLD).detach()
    second = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.1), model)
    train(second, model, 3)
    assert relative_drift(model(OLD), before) <= 1e-5
    with pytest.raises(OptionError, match="took the bases of this one over"):
        train(first, model, 1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        second.add_param_group({"params": [model[0].weight]})


@pytest.mark.fault(31, 29)
def test_a_module_under_two_names_has_one_entry_with_the_rows_of_both_calls() -> None:
    layer = nn.Linear(24, 24)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    optimizer = wrap(model)
    assert list(optimizer.bases) == ["0.weight", "0.bias"]
    assert optimizer.bases["0.weight"].rank == 10
    before = model(OLD).detach()
    train(optimizer, model)
    assert relative_drift(model(OLD), before) <= 1e-5


@pytest.mark.fault(32)
def test_tensors_outside_the_model_are_listed_and_trained() -> None:
    model, outside = mlp(), nn.Parameter(torch.ones(3))
    base = SGD([*model.parameters(), outside], lr=0.1)
    optimizer = NullSpaceOptimizer(base, model, policy=NumericalRank())
    report = optimizer.consolidate([OLD], progress=False)
    assert "1 tensors of the optimizer are not in Sequential: they are not protected" in report.notes
    outside.square().sum().backward()
    optimizer.step()
    assert torch.equal(outside, torch.full((3,), 0.8))


@pytest.mark.fault(33)
def test_parameters_that_the_optimizer_lacks_are_listed_and_have_no_basis() -> None:
    model = mlp()
    optimizer = NullSpaceOptimizer(SGD(model[2:].parameters(), lr=0.1), model, policy=NumericalRank())
    report = optimizer.consolidate([OLD], progress=False)
    assert set(optimizer.bases) == {"2.weight", "2.bias"}
    assert any("2 parameters were read but are not trained" in note and "'0.bias'" in note for note in report.notes)


def _go_on(pair: tuple[nn.Module, NullSpaceOptimizer], queue: Any) -> None:
    model, optimizer = pair
    train(optimizer, model, 5)
    queue.put({name: value.tolist() for name, value in model.state_dict().items()})


@pytest.mark.nightly
@pytest.mark.fault(34)
def test_a_spawned_process_goes_on_bitwise() -> None:
    model = mlp()
    optimizer = wrap(model)
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=_go_on, args=((copy.deepcopy((model, optimizer))), queue))
    process.start()
    theirs = queue.get(timeout=120)
    process.join()
    train(optimizer, model, 5)
    assert theirs == {name: value.tolist() for name, value in model.state_dict().items()}


class Offloading(Optimizer):
    """Keeps host copies and never calls `Optimizer.__init__`, like torchao's CPUOffloadOptimizer."""

    def __init__(self, parameters: Any) -> None:
        self.copies = {p: p.detach().clone() for p in parameters}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.copies)}]


@pytest.mark.fault(37)
def test_an_optimizer_with_copies_of_its_own_is_refused_with_the_reason() -> None:
    with pytest.raises(OptionError, match=r"base=Offloading.*keeps its own copies of the weights"):
        NullSpaceOptimizer(Offloading(mlp().parameters()))


@pytest.mark.fault(39)
def test_a_model_on_the_meta_device_is_named_until_it_has_values() -> None:
    with torch.device("meta"):
        model = mlp()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model)
    with pytest.raises(ConsolidationError, match=r"'0\.weight' is on the meta device"):
        optimizer.consolidate([OLD], progress=False)
    model = model.to_empty(device="cpu")
    model.load_state_dict(mlp().state_dict())
    wrap(model)


@pytest.mark.fault(40)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
def test_each_basis_lives_with_its_parameter() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Linear(24, 16), nn.Linear(16, 8).cuda()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.far(self.near(x.cpu()).tanh().cuda())
            return result

    model = Split()
    optimizer = wrap(model)
    assert optimizer.bases["near.weight"].U.device.type == "cpu"
    assert optimizer.bases["far.weight"].U.device.type == "cuda"
    before = model(OLD).detach()
    train(optimizer, model)
    assert relative_drift(model(OLD), before) <= 1e-5


@pytest.mark.fault(41)
def test_adapters_on_a_quantised_layer_are_protected() -> None:
    class Quantised(nn.Module):
        """An int8 weight with scales, as quantised layers hold them, and a low-rank adapter beside it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-127, 127, (16, 24), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.rand(16, 1) / 127, requires_grad=False)
            self.down, self.up = nn.Linear(24, 12, bias=False), nn.Linear(12, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            frozen = x @ (self.weight.to(x.dtype) * self.scale).T
            result: Tensor = frozen + self.up(self.down(x))
            return result

    model = Quantised()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=NumericalRank())
    report = optimizer.consolidate([OLD], progress=False)
    assert {row.name for row in report.of(Fate.PROTECTED)} == {"down.weight", "up.weight"}
    assert any("2 parameters were read but are not trained" in note and "'scale'" in note for note in report.notes)
    before = model(OLD).detach()
    train(optimizer, model, 30)
    assert relative_drift(model(OLD), before) <= 1e-5
    assert relative_drift(model(NEW), model(NEW).detach() + 1) > 0


@pytest.mark.fault(42)
def test_merging_an_adapter_is_an_edit() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    optimizer = wrap(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
    assert {name.split(".")[-3] for name in optimizer.bases} == {"lora_A", "lora_B"}
    before = model(OLD).detach()
    train(optimizer, model)
    assert relative_drift(model(OLD), before) <= 1e-5
    merged = model.merge_and_unload().requires_grad_(True)
    full = wrap(merged)
    again = peft.get_peft_model(merged, peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    assert again.merge_and_unload() is merged
    with pytest.raises(StaleAnchorError, match=r"'0\.weight'.*merge.*reanchor"):
        full.consolidate([NEW], progress=False)
