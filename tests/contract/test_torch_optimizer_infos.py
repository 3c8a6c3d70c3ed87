"""PyTorch's own table of optimizers and settings (`optim_db`), each setting of each of them through the wrapper."""

from __future__ import annotations

import copy
import inspect
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Setting, layer_rows, setting, span_drift
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from training import relative_drift

from nullspace_optim import NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import OptionError

pytest.importorskip("expecttest", reason="torch.testing._internal needs it: pip install expecttest")
NAMES = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
)
EVERY = pytest.mark.parametrize("name", NAMES)
STEPS = 4


@pytest.fixture(scope="module")
def infos() -> Iterator[dict[str, Any]]:
    """The table by name. Its module changes settings of the whole process when it is imported; they are put back."""
    backends, flag, environment = torch.backends, "__allow_nonbracketed_mutation_flag", dict(os.environ)
    allowed = vars(backends).get(flag)
    from torch.testing._internal.common_optimizers import optim_db

    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    os.environ.update(environment)
    if allowed is not None:
        setattr(backends, flag, allowed)
    yield {info.optim_cls.__name__: info for info in optim_db}


def kind(info: Any) -> Any:
    """What `cases.Case` calls the parameters and the step that the optimizer wants."""
    if info.only_supports_sparse_grads:
        return "sparse"
    if info.optim_cls.__name__ == "Muon":
        return "matrices"
    return "closure" if info.step_requires_closure else "plain"


def cases(info: Any) -> Iterator[Case]:
    """Yield every setting of the table, with the default implementation and with those that run on a CPU."""
    flags: list[dict[str, bool]] = [{}]
    flags += [{"foreach": True}, {"foreach": False}] if "foreach" in info.supported_impls else []
    flags += [{"fused": True}] if "cpu" in info.supports_fused_on else []
    for given in info.optim_inputs_func(device="cpu"):
        for flag in flags:
            case = Case(info.optim_cls.__name__, {**copy.deepcopy(given.kwargs), **flag}, kind(info))
            try:
                case.build([torch.nn.Parameter(torch.ones(2, 2))])
            except ValueError:  # foreach with a tensor as rate
                assert isinstance(given.kwargs.get("lr"), Tensor)
                continue
            yield case
    if info.supports_sparse:
        yield Case(info.optim_cls.__name__, {"lr": 0.1}, "sparse closure" if info.step_requires_closure else "sparse")


def start(case: Case) -> Setting:
    task = setting(Case(case.name, kind="sparse") if "sparse" in case.kind else case)
    if case.kind == "matrices":  # what the optimizer does not hold would not be protected
        for parameter in task.model.parameters():
            parameter.requires_grad_(parameter.ndim == 2)
    return task


def build(case: Case, task: Setting) -> Optimizer:
    return Case(case.name, copy.deepcopy(case.options), case.kind).build(task.model.parameters())


def bounded(task: Setting) -> Tensor:
    """A loss in 0..1, so that `maximize` does not diverge."""
    error = (task.model(task.inputs) - task.targets).abs().square().mean()
    return error / (1 + error)


def steps(optimizer: Optimizer, task: Setting, case: Case, count: int = STEPS) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = bounded(task)
        loss.backward()
        return loss

    for _ in range(count):
        if "closure" in case.kind:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()


def equal(one: Any, two: Any) -> bool:
    flat, spec = torch.utils._pytree.tree_flatten(one)
    other, other_spec = torch.utils._pytree.tree_flatten(two)
    return spec == other_spec and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(flat, other)
    )


def states(task: Setting, optimizer: Optimizer) -> Any:
    return [p.detach() for p in task.model.parameters()], optimizer.state_dict()["state"]


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_every_class_of_the_table_is_tried(infos: dict[str, Any]) -> None:
    assert set(infos) <= set(NAMES)


@EVERY
def test_without_bases_every_bit_is_the_bare_optimizers(name: str, infos: dict[str, Any]) -> None:
    for case in cases(infos[name]):
        plain, wrapped = start(case), start(case)
        base, optimizer = build(case, plain), NullSpaceOptimizer(build(case, wrapped))
        steps(base, plain, case)
        steps(optimizer, wrapped, case)
        assert equal(states(plain, base), states(wrapped, optimizer)), case.id


@EVERY
def test_with_bases_kept_directions_stay_and_a_resumed_run_is_the_same_run(name: str, infos: dict[str, Any]) -> None:
    for case in cases(infos[name]):
        if "closure" in case.kind:  # with its defaults LBFGS has converged, or diverged, after a step
            case = replace(case, options={"lr": 0.1, "max_iter": 2, **case.options})
        task = start(case)
        optimizer = NullSpaceOptimizer(build(case, task), task.model, policy=NumericalRank())
        steps(optimizer, task, case, 2)
        optimizer.consolidate([task.old], progress=False)
        before = {key: p.detach().clone() for key, p in task.model.named_parameters()}
        rows, outputs = layer_rows(task.model, task.old), task.outputs()
        steps(optimizer, task, case)
        assert not equal([*before.values()], [*task.model.parameters()]), f"{case.id} moves nothing"
        again = start(case)
        again.model.load_state_dict(task.model.state_dict())
        resumed = NullSpaceOptimizer(build(case, again), again.model, policy=NumericalRank())
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        steps(optimizer, task, case)
        steps(resumed, again, case)
        assert span_drift(task.model, before, rows) < 1e-5, case.id
        assert relative_drift(task.outputs(), outputs) < 1e-5, case.id
        assert optimizer.verify().ok and optimizer.verify().worst < 1e-5, case.id
        assert equal(states(task, optimizer), states(again, resumed)), case.id


@EVERY
def test_complex_parameters_are_stepped_like_the_bare_optimizers_and_kept(name: str, infos: dict[str, Any]) -> None:
    if not infos[name].supports_complex or infos[name].only_supports_sparse_grads:
        pytest.skip(f"{name} does not take complex parameters")
    case = Case(name, {"lr": 1e-3}, kind(infos[name]))
    plain, task = setting(case, torch.complex64), setting(case, torch.complex64)
    base, optimizer = build(case, plain), NullSpaceOptimizer(build(case, task), task.model, policy=NumericalRank())
    steps(base, plain, case)
    steps(optimizer, task, case)
    assert equal(states(plain, base), states(task, optimizer))
    optimizer.consolidate([task.old], progress=False)
    outputs = task.model(task.old).detach()
    weight = task.model[0].weight.detach().clone()
    steps(optimizer, task, case)
    assert relative_drift(task.model(task.old), outputs) < 1e-5 and optimizer.verify().worst < 1e-5
    assert not torch.equal(task.model[0].weight, weight)


@EVERY
def test_a_state_goes_from_the_wrapper_to_the_bare_optimizer_and_back(name: str, infos: dict[str, Any]) -> None:
    case = next(cases(infos[name]))
    task, other = start(case), start(case)
    optimizer, bare = NullSpaceOptimizer(build(case, task)), build(case, other)
    steps(optimizer, task, case)
    other.model.load_state_dict(task.model.state_dict())
    bare.load_state_dict(through_a_file(optimizer.state_dict()))
    steps(optimizer, task, case)
    steps(bare, other, case)
    assert equal(states(task, optimizer), states(other, bare))
    optimizer.load_state_dict(through_a_file(bare.state_dict()))
    steps(optimizer, task, case)
    steps(bare, other, case)
    assert equal(states(task, optimizer), states(other, bare))


@EVERY
def test_schedulers_of_the_table_see_the_bare_optimizer(name: str, infos: dict[str, Any]) -> None:
    case = next(cases(infos[name]))
    for makers in infos[name].scheduler_inputs:
        plain, wrapped = start(case), start(case)
        base, optimizer = build(case, plain), NullSpaceOptimizer(build(case, wrapped))
        for one, task in ((base, plain), (optimizer, wrapped)):
            schedulers = [make(one) for make in makers]
            for _ in range(3):
                steps(one, task, case, 1)
                for scheduler in schedulers:
                    arguments = (1.0,) if "metrics" in inspect.signature(scheduler.step).parameters else ()
                    scheduler.step(*arguments)
        assert equal(states(plain, base), states(wrapped, optimizer))
        assert [g["lr"] for g in base.param_groups] == [g["lr"] for g in optimizer.param_groups]


@EVERY
def test_what_the_bare_optimizer_refuses_at_a_step_is_refused_in_its_words(name: str, infos: dict[str, Any]) -> None:
    for error in infos[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        if "STEP" not in str(error.error_on):
            continue
        base = infos[name].optim_cls(given.params, **given.kwargs)
        model = nn.Module()
        model.parts = nn.ParameterList(base.param_groups[0]["params"])
        optimizer = NullSpaceOptimizer(base, model)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


@EVERY
def test_differentiable_steps_are_refused_by_name(name: str, infos: dict[str, Any]) -> None:
    if "differentiable" not in infos[name].supported_impls:
        pytest.skip(f"{name} has no differentiable steps")
    base = infos[name].optim_cls([nn.Parameter(torch.ones(2, 2))], differentiable=True)
    with pytest.raises(OptionError, match=rf"{name}\(differentiable=True\): corrections cannot be differentiated"):
        NullSpaceOptimizer(base)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_one_group_is_refused_where_torch_warns() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(OptionError, match=r"shape \(2, 2\) is in the groups of its optimizer twice"):
        NullSpaceOptimizer(SGD([weight, weight], lr=0.1))
