"""Files and checkpoints of the mode: resumed bitwise in the middle of either phase, refused where they do not fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from synthetic import QUICK, Layer, SyntheticTask, make, train
from torch import nn
from torch.optim import AdamW

from nullspace_optim import IGSP, BasisFileError, NullSpaceOptimizer, NullSpaceWarning
from nullspace_optim.files import basis_file
from nullspace_optim.subspace.basis import Extension

MOMENTS = [("phase 1", 7), ("mid-window", 33), ("phase 2", 330)]


def history(steps: int, **options: object) -> tuple[Layer, NullSpaceOptimizer, SyntheticTask]:
    """One finished task, `steps` steps into the second."""
    model, opt = make(**options)
    train(model, opt, SyntheticTask(0), 60)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    task = SyntheticTask(2)
    train(model, opt, task, steps)
    return model, opt, task


def same(one: Layer, two: Layer) -> bool:
    mine, yours = dict(one.named_parameters()), dict(two.named_parameters())
    return mine.keys() == yours.keys() and all(torch.equal(value, yours[name]) for name, value in mine.items())


@pytest.mark.parametrize(("moment", "steps"), MOMENTS)
def test_a_state_dict_resumes_bitwise(moment: str, steps: int) -> None:
    model, opt, task = history(steps)
    assert opt.status().phase == (2 if moment == "phase 2" else 1)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    train(model, opt, task, 200, first=steps)
    opt.consolidate(task.loader(), name="two", progress=False)
    train(model, opt, SyntheticTask(1), 3)

    twin, other = make(seed=3)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.status().step == steps or moment == "phase 2"
    train(twin, other, task, 200, first=steps)
    other.consolidate(task.loader(), name="two", progress=False)
    train(twin, other, SyntheticTask(1), 3)
    assert same(model, twin) and str(opt.status()) == str(other.status())


@pytest.mark.parametrize(("moment", "steps"), MOMENTS)
def test_a_file_and_the_base_state_resume_bitwise(moment: str, steps: int, tmp_path: Path) -> None:
    model, opt, task = history(steps)
    opt.save(tmp_path / "experts.safetensors")
    base = copy.deepcopy(opt._core.bases[0].state_dict())
    weights = model.state_dict()
    train(model, opt, task, 50, first=steps)

    twin, other = make(seed=3)
    twin.load_state_dict(weights)
    other.load(tmp_path / "experts.safetensors")
    other._core.bases[0].load_state_dict(base)
    train(twin, other, task, 50, first=steps)
    assert same(model, twin)
    other.save(tmp_path / "a")
    opt.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("moment", "steps"), MOMENTS)
def test_a_distributed_checkpoint_resumes_bitwise(moment: str, steps: int, tmp_path: Path) -> None:
    """The optimizer that loads it has other experts: it is new, or has only begun its first task."""
    model, opt, task = history(steps)
    before = copy.deepcopy(opt.state_dict()["state"])
    dcp.save({"training": opt.checkpoint()}, checkpoint_id=tmp_path)
    after = opt.state_dict()["state"]
    assert before.keys() == after.keys() and all(torch.equal(after[i]["exp_avg"], before[i]["exp_avg"]) for i in before)
    train(model, opt, task, 200, first=steps)

    twin, other = make(seed=3)
    if moment != "phase 1":
        train(twin, other, SyntheticTask(1), 2)
    dcp.load({"training": other.checkpoint()}, checkpoint_id=tmp_path)
    assert other.status().finished == ("one",)
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in opt.param_groups]
    train(twin, other, task, 200, first=steps)
    assert same(model, twin) and str(opt.status()) == str(other.status())


def test_a_file_deploys_all_tasks(tmp_path: Path) -> None:
    model, opt, task = history(330, kind="bottleneck")
    opt.consolidate(task.loader(), name="two", progress=False)
    opt.save(tmp_path / "f")
    twin, other = make(seed=3, kind="bottleneck")
    twin.load_state_dict(model.state_dict())
    other.load(tmp_path / "f")
    x = torch.cat([SyntheticTask(0).inputs(7), task.inputs(7)])
    for name in ("one", "two", None):
        with torch.no_grad(), opt.task(name), other.task(name):
            assert torch.equal(model(x), twin(x)), name
    assert other.verify(task.loader()).drift("two") == 0.0


@pytest.mark.parametrize("steps", [7, 330])
def test_copies_go_their_own_way(steps: int) -> None:
    model, opt, task = history(steps)
    twin, other = copy.deepcopy((model, opt))
    pickled, third = pickle.loads(pickle.dumps((model, opt)))
    for one, two in ((model, opt), (twin, other), (pickled, third)):
        train(one, two, task, 30, first=steps)
    assert same(model, twin) and same(model, pickled)
    train(twin, other, task, 1, first=99)
    assert not same(model, twin)


@pytest.mark.fault(113)
def test_experts_of_another_architecture_are_refused(tmp_path: Path) -> None:
    _, opt, _ = history(7)
    opt.save(tmp_path / "f")
    wide = Layer(48)
    other = NullSpaceOptimizer(AdamW(wide.parameters(), lr=1e-4), wide, mode=IGSP(**QUICK))
    with pytest.raises(BasisFileError, match=r"another architecture: 'fc' \(32 -> 16\) there, 'fc' \(48 -> 16\) here"):
        other.load(tmp_path / "f")
    two = nn.Sequential(Layer(), Layer(16, 16))
    other = NullSpaceOptimizer(AdamW(two.parameters(), lr=1e-4), two, mode=IGSP(**{**QUICK, "target_modules": ["fc"]}))
    with pytest.raises(BasisFileError, match="another architecture"):
        other.load(tmp_path / "f")
    _, other = make(rank=4)
    with pytest.raises(BasisFileError, match="rank=8 there, 4 here"):
        other.load(tmp_path / "f")
    assert other.status().finished == ()


def test_a_plain_optimizer_and_the_mode_refuse_each_others_files(tmp_path: Path) -> None:
    _model, opt, _ = history(7)
    opt.save(tmp_path / "f")
    plain_model = Layer()
    plain = NullSpaceOptimizer(AdamW(plain_model.parameters(), lr=1e-4), plain_model)
    with pytest.raises(BasisFileError, match="written with mode='igsp'"):
        plain.load(tmp_path / "f")
    plain.consolidate([SyntheticTask(0).inputs(0)], progress=False)
    plain.save(tmp_path / "g")
    with pytest.raises(BasisFileError, match="written with mode='null-space'"):
        opt.load(tmp_path / "g")


def test_a_checkpoint_without_its_experts_is_refused() -> None:
    _, opt, _ = history(7)
    saved = opt.state_dict()
    del saved["nullspace"]
    _, other = make(seed=3)
    with pytest.raises(BasisFileError, match="bases are missing"):
        other.load_state_dict(saved)


def test_a_damaged_record_is_one_error(tmp_path: Path) -> None:
    _, opt, _ = history(7)
    good = opt._core.mode.state
    for key in ("tasks", "layers", "structure", "steps"):
        record = {name: value for name, value in good.record.items() if name != key}
        with pytest.raises(BasisFileError, match="damaged or foreign"):
            opt._core.mode.state = Extension(record, good.tensors)
    with pytest.raises(BasisFileError, match="damaged or foreign"):
        opt._core.mode.state = Extension(good.record, {**good.tensors, "0/router": torch.zeros(1, 33)})
    assert opt.status().step == 7


def test_wide_routers_of_earlier_files_are_told_the_way_out() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(OrderedDict(mlp=layer))
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(rank=2))
    good = opt._core.mode.state
    early = {**good.tensors, "0/router": torch.zeros(len(good.tensors["0/router"]), 65)}
    with pytest.raises(BasisFileError, match="read all 64 inputs of 'mlp', now they read 32: use the version"):
        opt._core.mode.state = Extension(good.record, early)


OLD = Path(__file__).resolve().parents[1] / "data" / "igsp_layers.safetensors"


def test_a_file_from_before_target_modules_loads_and_goes_on(tmp_path: Path) -> None:
    """Written with ``IGSP(layers="fc", gate="mean", ...)``: one task of one expert, 7 steps into the second."""
    record = basis_file.load(OLD).extension.record
    assert "layers='fc'" in record["options"] and record["structure"]["gate"] == "mean"
    model, opt = make(rank=2, candidates=1)
    with pytest.warns(NullSpaceWarning, match="without a name their 1 tasks run the plain backbone"):
        opt.load(OLD)
    assert opt.status().finished == ("one",) and (opt.status().task, opt.status().step) == (2, 7)
    parts, x = opt.mode.experts.layers[0].history, SyntheticTask(0).inputs(7)
    with torch.no_grad(), opt.task("one"):
        expert = x @ parts["down"][0].T @ parts["up"][0]
        assert float(expert.norm()) > 0.1
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.fc.weight, model.fc.bias) + expert)
    train(model, opt, SyntheticTask(2), 3, first=7)
    assert opt.status().step == 10
    opt.save(tmp_path / "new")
    new = basis_file.load(tmp_path / "new").extension.record
    assert "target_modules='fc'" in new["options"] and new["structure"] == record["structure"]


def test_bases_of_outputs_go_with_a_file_and_earlier_files_take_all_columns() -> None:
    model, opt = make(rank=4, candidates=1, cap=10)
    train(model, opt, SyntheticTask(0), 30)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    state = opt.mode.state
    for missing in (False, True):
        tensors = {key: value for key, value in state.tensors.items() if not (missing and key == "0/emitted")}
        _, other = make(seed=1, rank=4, candidates=1, cap=10)
        other.mode.state = Extension(state.record, tensors)
        layer, source = other.mode.experts.layers[0], opt.mode.experts.layers[0]
        assert torch.equal(layer.emitted, source.outputs if missing else source.emitted)


def test_only_projected_routers_of_another_version_are_refused() -> None:
    """Routing of wide layers changed when projections were lengthened: the same numbers would route otherwise."""
    torch.manual_seed(0)
    for width, message in ((48, "such as 'fc' read another projection of its inputs"), (32, None)):
        model = Layer(width)
        opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(**QUICK))  # type: ignore[arg-type]
        good = opt.mode.state
        earlier = {key: value for key, value in good.record.items() if key != "routing"}
        opt.mode.state = good
        if message is None:
            opt.mode.state = Extension(earlier, good.tensors)
            continue
        with pytest.raises(BasisFileError, match=message):
            opt.mode.state = Extension(earlier, good.tensors)
        with pytest.raises(BasisFileError, match=r"by a later version \(routing 3, here 2\)"):
            opt.mode.state = Extension({**good.record, "routing": 3}, good.tensors)


def test_centres_of_earlier_files_belong_to_a_task_each() -> None:
    _model, opt, _ = history(7)
    state, here = opt.mode.state, opt.mode.experts.layers[0].known
    earlier = Extension(state.record, {k: v for k, v in state.tensors.items() if k != "0/known/owners"})
    _, other = make(seed=3)
    other.mode.state = earlier
    found = other.mode.experts.layers[0].known
    assert all(torch.equal(found[name], value) for name, value in here.items()) and len(here["owners"])
    for wrong in (here["owners"] + 1, here["owners"].float(), here["owners"][:0]):
        with pytest.raises(BasisFileError, match="damaged or foreign"):
            other.mode.state = Extension(state.record, {**state.tensors, "0/known/owners": wrong})


def test_a_file_whose_routers_read_the_first_token_is_refused() -> None:
    """``gate="first"`` was an option once; its routers would route by other inputs now."""
    _model, opt = make(rank=2, candidates=1)
    extension = basis_file.load(OLD).extension
    record = {**extension.record, "structure": {**extension.record["structure"], "gate": "first"}}
    with pytest.raises(BasisFileError, match="gate='first' there, 'mean' here"):
        opt.mode.state = Extension(record, extension.tensors)
    assert opt.status().finished == ()


def test_routers_of_wide_layers_come_back_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Layer(48), Layer(48)
    other.load_state_dict(model.state_dict())
    one, two = (NullSpaceOptimizer(AdamW(m.parameters(), lr=1e-3), m, mode=IGSP(**QUICK)) for m in (model, other))  # type: ignore[arg-type]
    x = torch.randn(20, 48)
    for _ in range(3):
        model(x).square().mean().backward()
        one.step()
    one.consolidate([x], name="one", progress=False)
    one.save(tmp_path / "f")
    two.load(tmp_path / "f")
    assert two.mode.experts.layers[0].finished[0].weight.shape[1] == 33
    for name in ("one", None):
        with torch.no_grad(), one.task(name), two.task(name):
            assert torch.equal(model(x), other(x))
    with torch.no_grad(), two.task("one"):
        assert not torch.equal(other(x), nn.functional.linear(x, other.fc.weight, other.fc.bias))
