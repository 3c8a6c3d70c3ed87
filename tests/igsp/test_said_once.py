"""What is not trained, not kept or not seen is said once in one line; bad input is one error with the way out."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import WIDTH, Layer, SyntheticTask, make, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from nullspace_optim import IGSP, NullSpaceOptimizer, NullSpaceWarning
from nullspace_optim.errors import BasisFileError, BatchError, ConsolidationError, NullSpaceError, OptionError
from nullspace_optim.igsp.bank import backbone_drifts, measure_backbone

FC = IGSP(target_modules="fc", rank=2)


class Two(nn.Module):
    """A layer that the model holds under two names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.again, self.head = self.fc, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.fc(x).tanh()))


def said(call: Callable[[], Any]) -> list[str]:
    """Return the warnings of this library in `call`, each of one line."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    found = [str(one.message) for one in record if issubclass(one.category, NullSpaceWarning)]
    assert not any("\n" in text for text in found)
    return found


def finish(model: Any, opt: Any, place: int, name: str, steps: int = 6) -> Any:
    train(model, opt, SyntheticTask(place), steps)
    return opt.consolidate(SyntheticTask(place).loader(), name=name, progress=False)


@pytest.mark.parametrize("kind", ["head", "outside", "the model", "frozen"])
def test_parameters_that_a_user_wants_to_train_and_that_stay_are_named(kind: str) -> None:
    model, other = Two(), nn.Linear(3, 2)
    if kind == "frozen":
        model.requires_grad_(False)
    parameters = {"head": model.head.parameters(), "outside": [*model.parameters(), *other.parameters()]}
    base = SGD(parameters.get(kind, model.parameters()), lr=1e-2)
    found = said(lambda: NullSpaceOptimizer(base, model, mode=FC))
    if kind in ("the model", "frozen"):
        assert not found
    else:
        assert len(found) == 1 and "trains experts alone" in found[0] and "a head needs an optimizer" in found[0]
        assert ("head.weight, head.bias" if kind == "head" else "outside the model (2, 3)") in found[0]


def test_a_group_that_is_added_later_is_named_in_the_next_step() -> None:
    model, head = Two(), nn.Linear(3, 2)
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=FC)
    opt.add_param_group({"params": list(head.parameters())})

    def step() -> None:
        head(model(torch.ones(4, WIDTH))).sum().backward()
        opt.step()

    first = said(step)
    assert len(first) == 1 and "2 parameters in the optimizer" in first[0]
    assert not said(step) and not said(lambda: copy.deepcopy((model, opt)))


def test_experts_without_a_rate_are_refused() -> None:
    model = Layer()
    with pytest.raises(OptionError, match=r"100 x the learning rate.*is 0: give IGSP\(lr=...\)"):
        NullSpaceOptimizer(AdamW(model.parameters(), lr=0.0), model, mode=FC)
    assert not hasattr(model, "igsp")
    model, opt = make()
    opt.param_groups[-1]["lr"] = 0.0
    with pytest.raises(ConsolidationError, match=r"opt\.param_groups\[-1\]\['lr'\], is 0"):
        finish(model, opt, 0, "one")


def test_a_scheduler_that_does_not_know_the_experts_is_announced() -> None:
    model = Layer()
    base = AdamW(model.parameters(), lr=1e-3)
    LambdaLR(base, lambda step: 0.5**step)
    found = said(lambda: NullSpaceOptimizer(base, model, mode=FC))
    assert len(found) == 1 and "scheduler" in found[0] and "make it after" in found[0]
    model, opt = make()
    LambdaLR(opt, lambda step: 0.5**step)
    assert not said(lambda: train(model, opt, SyntheticTask(0), 1))


def test_a_group_of_experts_that_is_gone_is_one_error() -> None:
    model, opt = make()
    state = opt.state_dict()
    for group in state["param_groups"]:
        group.pop("igsp", None)
    opt._core.bases[0].load_state_dict(state)
    with pytest.raises(OptionError, match=r"parameter group is not in the optimizer.*load a state_dict\(\)"):
        train(model, opt, SyntheticTask(0), 1)


def test_a_misspelt_task_is_told_once_and_another_is_not() -> None:
    model, opt = make(cap=2)
    finish(model, opt, 0, "flowers")
    for asked in ("flower", ["flower", None, "flowers"]):
        found = said(lambda asked=asked: opt.task(asked))  # type: ignore[misc]
        assert found == (
            ["task('flower') is no finished task and runs the plain backbone; did you mean 'flowers'?"]
            if asked == "flower"
            else []
        )
    assert not said(lambda: opt.task("pets"))
    finish(model, opt, 1, "task 1")
    assert not said(lambda: opt.task("task 2"))


@pytest.mark.parametrize("mode", ["null-space", FC], ids=["null-space", "igsp"])
@pytest.mark.parametrize("name", [5, "", ("a",)])
def test_a_name_that_is_no_text_is_refused(mode: Any, name: Any) -> None:
    model = Layer()
    opt = NullSpaceOptimizer(SGD(model.parameters(), lr=1e-3), model, mode=mode)
    train(model, opt, SyntheticTask(0), 2)
    with pytest.raises(OptionError, match="expected the task's name"):
        opt.consolidate(SyntheticTask(0).loader(), name=name, progress=False)


@pytest.mark.parametrize("call", ["consolidate", "calibrate", "verify"])
def test_what_gives_no_batches_at_all_is_refused(call: str) -> None:
    model, opt = make(cap=2)
    finish(model, opt, 0, "one")
    train(model, opt, SyntheticTask(1), 2)
    calls: dict[str, Callable[[], Any]] = {
        "consolidate": lambda: opt.consolidate(7, progress=False),  # type: ignore[arg-type]
        "calibrate": lambda: opt.mode.calibrate(7, progress=False),  # type: ignore[attr-defined]
        "verify": lambda: opt.verify(7),  # type: ignore[arg-type]
    }
    with pytest.raises(BatchError, match="7 was passed where batches are expected: pass a DataLoader or a list"):
        calls[call]()


def test_two_tasks_of_the_same_samples_are_announced() -> None:
    model, opt = make(cap=2, on_cap="prune", rank=2)
    assert not said(lambda: finish(model, opt, 0, "one"))
    assert not said(lambda: finish(model, opt, 1, "two"))
    found = said(lambda: finish(model, opt, 0, "again"))
    assert len(found) == 1 and "look like those of 'one' in the chain of blocks around 'fc': without a name" in found[0]


def test_phase_1_in_evaluation_mode_is_announced() -> None:
    model, opt = make(cap=2, on_cap="prune")
    model.eval()
    found = said(lambda: finish(model, opt, 0, "one"))
    assert len(found) == 1 and "phase 1 ran in evaluation mode" in found[0] and "model.train()" in found[0]
    model.train()
    assert not said(lambda: finish(model, opt, 1, "two"))
    quiet, opt = make(cap=2, on_cap="prune", noise=0.0)
    quiet.eval()
    assert not said(lambda: finish(quiet, opt, 0, "one"))


def test_experts_that_were_frozen_with_the_model_are_announced() -> None:
    model, opt = make(cap=2)
    assert not said(lambda: model(SyntheticTask(0).inputs(0)))
    model.requires_grad_(False)
    found = said(lambda: model(SyntheticTask(0).inputs(0)))
    assert len(found) == 1 and "model.requires_grad_(False) reaches them too" in found[0]
    model.igsp.requires_grad_(True)  # type: ignore[operator]
    train(model, opt, SyntheticTask(0), 3)
    assert opt.status().phase == 2


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_the_model_alone_says_that_no_task_reaches_it(make_copy: Any) -> None:
    model, opt = make(cap=2)
    for place, name in enumerate(("one", "two")):
        finish(model, opt, place, name)
    x, alone = SyntheticTask(0).inputs(3), make_copy(model).eval()
    with torch.no_grad(), opt.task("one"):
        found = said(lambda: alone(x))
        assert len(found) == 1 and "opt.task() does not reach it" in found[0] and not said(lambda: alone(x))
        assert not said(lambda: model(x))
    twin, other = make_copy((model, opt))
    assert not said(lambda: twin.eval()(x)) and not said(lambda: train(twin, other, SyntheticTask(2), 1))


@pytest.mark.parametrize("names", [["again"], ["fc", "again"], "again", ".*again|fc"])
def test_a_module_of_two_names_gets_its_experts_once_under_the_first(names: Any) -> None:
    model = Two()
    opt = NullSpaceOptimizer(AdamW(model.parameters()), model, mode=IGSP(target_modules=names, rank=2))
    assert [layer.name for layer in opt.mode.experts.layers] == ["fc"] and len(model.fc._forward_hooks) == 1  # type: ignore[attr-defined]


def test_a_task_name_used_twice_and_a_pool_of_another_width_change_nothing() -> None:
    model, opt = make(cap=2)
    finish(model, opt, 0, "one")
    train(model, opt, SyntheticTask(1), 3)
    before = str(opt.status())
    with pytest.raises(ConsolidationError, match="'one' has been consolidated already"):
        opt.consolidate(SyntheticTask(1).loader(), name="one", progress=False)
    with pytest.raises((RuntimeError, NullSpaceError)):
        opt.mode.calibrate([torch.randn(4, WIDTH + 1)], progress=False)  # type: ignore[attr-defined]
    assert str(opt.status()) == before
    finish(model, opt, 1, "two")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_of_an_optimizer_without_experts_is_one_error(wrapped: bool) -> None:
    model, opt = make(cap=2)
    finish(model, opt, 0, "one")
    other = Layer()
    base: Any = AdamW(other.parameters(), lr=1e-3)
    state = (NullSpaceOptimizer(base, other) if wrapped else base).state_dict()
    with pytest.raises(BasisFileError, match=r"no experts \(1 parameter groups there, 2 here\).*into the base before"):
        opt.load_state_dict(state)
    assert opt.status().finished == ("one",)


def test_experts_of_an_optimizer_that_is_gone_can_be_taken_away() -> None:
    model, opt = make(cap=2)
    x = SyntheticTask(0).inputs(0)
    before = model(x).detach()
    finish(model, opt, 0, "one")
    twin = copy.deepcopy(model)
    del opt
    gc.collect()
    for mine in (model, twin):
        with pytest.raises(OptionError, match=r"if that is gone, model\.igsp\.remove\(model\)"):
            NullSpaceOptimizer(AdamW(mine.parameters()), mine, mode=FC)
        mine.igsp.remove(mine)  # type: ignore[operator]
        assert torch.equal(mine.eval()(x), before) and not mine.fc._forward_hooks
        NullSpaceOptimizer(AdamW(mine.parameters()), mine, mode=FC)


def test_a_model_whose_modules_were_replaced_says_what_experts_stand_beside() -> None:
    model, opt = make(cap=2)
    model.fc = nn.Linear(WIDTH, 16)
    with pytest.raises(ConsolidationError, match="with the modules that experts were put beside"):
        finish(model, opt, 0, "one")


def test_experts_beside_another_backbone_are_announced(tmp_path: Path) -> None:
    model, opt = make(cap=2, rank=2)
    finish(model, opt, 0, "one")
    assert not said(lambda: finish(model, opt, 1, "two"))
    opt.save(tmp_path / "f")
    same, half = make(cap=2, rank=2), make(cap=2, rank=2)
    half[0].to(torch.bfloat16)
    for _, again in (same, half):
        assert not said(lambda again=again: again.load(tmp_path / "f"))  # type: ignore[misc]
    other, strange = make(seed=1, cap=2, rank=2)
    for load in (lambda: strange.load(tmp_path / "f"), lambda: strange.load_state_dict(opt.state_dict())):
        found = said(load)
        assert len(found) == 1 and "2 of 2 parameters differ (fc.weight, fc.bias)" in found[0]
    assert torch.equal(model.fc.weight, same[0].fc.weight) and not torch.equal(model.fc.weight, other.fc.weight)
    assert opt.verify().ok
    with torch.no_grad():
        model.fc.weight += 1e-3 * torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    assert opt.verify().broken == ("fc.weight",), str(opt.verify())
    found = said(lambda: finish(model, opt, 2, "three"))
    assert len(found) == 1 and "1 of 2 parameters differ (fc.weight)" in found[0]


@pytest.mark.parametrize("change", ["rows", "columns", "signs", "bias"])
def test_verify_sees_a_backbone_that_keeps_sums_and_norms(change: str) -> None:
    model, opt = make(cap=2, rank=2)
    finish(model, opt, 0, "one")
    assert opt.verify().ok
    with torch.no_grad():
        weight, bias = model.fc.weight, model.fc.bias
        moved = {"rows": weight.roll(1, 0), "columns": weight.roll(1, 1), "signs": -weight, "bias": bias.roll(1)}
        (bias if change == "bias" else weight).copy_(moved[change])
    name = "fc.bias" if change == "bias" else "fc.weight"
    assert opt.verify().broken == (name,) and f"'{name}' moved by" in str(opt.verify())


def test_verify_keeps_a_backbone_that_was_accepted() -> None:
    model, opt = make(cap=2, rank=2)
    opt.reanchor()
    finish(model, opt, 0, "one")
    with torch.no_grad():
        model.fc.weight += 0.1
    assert not opt.verify().ok
    opt.reanchor()
    assert opt.verify().ok, str(opt.verify())
    with torch.no_grad():
        model.fc.weight += 0.1
    assert not opt.verify().ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1e-8, 1e-6, 0.1003, 1.003])
def test_equal_numbers_of_a_backbone_may_round_to_half(dtype: torch.dtype, value: float) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.full((64, 768), value))
    before = measure_backbone(model)
    model.to(dtype)
    assert not backbone_drifts(model, before)
    with torch.no_grad():
        model.scale.copy_(model.scale.neg() if value > 1e-7 else model.scale + 1e-3)
    assert list(backbone_drifts(model, before)) == ["scale"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_around_one_that_moved_are_seen_in_half_precision(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(768) + 0.1 * torch.randn(768))
    before = measure_backbone(model)
    model.to(dtype)
    assert not backbone_drifts(model, before)
    with torch.no_grad():
        model.scale += 0.5 * torch.randn(768)
    assert list(backbone_drifts(model, before)) == ["scale"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_backbones_of_rare_types_are_measured(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(4, 6).to(dtype), requires_grad=False)
    before = measure_backbone(model)
    assert not backbone_drifts(model, before)
    model.w.data = 1j * model.w if dtype.is_complex else (3 * model.w.float()).to(dtype)
    assert list(backbone_drifts(model, before)) == ["w"]


def test_numbers_that_were_never_finite_have_not_moved() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0, float("-inf")]))
    before = measure_backbone(model)
    assert not backbone_drifts(model, before)
    model.w.data = torch.ones(2)
    finite = measure_backbone(model)
    assert list(backbone_drifts(model, before)) == ["w"]
    model.w.data = torch.tensor([1.0, float("nan")])
    assert list(backbone_drifts(model, finite)) == ["w"]
