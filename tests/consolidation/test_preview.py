"""`preview`: what `consolidate` would keep, and how much of a new task's gradient stays free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nullspace_optim import IGSP, SGP, Energy, NullSpaceOptimizer, NullSpaceWarning, Policy, TailEnergy
from nullspace_optim.errors import ConsolidationError, OptionError
from nullspace_optim.policies import OWM, FixedRank
from nullspace_optim.protection import step

POLICIES: Sequence[Policy] = (Energy(0.999), Energy(0.9), FixedRank(2))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Tanh(), nn.Linear(20, 3))


def batches(seed: int, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(6, 12, generator=generator)
    return [torch.randn(16, 6, generator=generator) @ mixed for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 3)


def wrapped(model: nn.Module) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)


@pytest.mark.parametrize("tasks_before", [0, 1])
def test_each_line_is_the_consolidation_with_its_policy(tasks_before: int) -> None:
    found = []
    for policy in POLICIES:
        model = network()
        opt = wrapped(model)
        for seed in range(5, 5 + tasks_before):
            opt.consolidate(batches(seed), progress=False)
        opt._core.options = replace(opt._core.options, policy=policy)
        report = opt.consolidate(batches(1), name="preview", progress=False)
        found.append((report.bytes, report.still_share, report.parameters, opt.capacity().mean))
    model = network()
    opt = wrapped(model)
    for seed in range(5, 5 + tasks_before):
        opt.consolidate(batches(seed), progress=False)
    lines = opt.preview(batches(1), POLICIES, progress=False).lines
    told = [(line.report.bytes, line.report.still_share, line.report.parameters, line.free) for line in lines]
    assert repr(told) == repr(found)  # by text: NaN is not equal to itself
    assert [line.policy for line in lines] == list(POLICIES)


def test_nothing_is_kept_moved_or_drawn() -> None:
    model = network()
    opt = wrapped(model)
    opt.consolidate(batches(1), progress=False)
    x = batches(2)[0]
    loss_of(model, x).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    bases, random = {name: basis for name, basis in opt.bases.items()}, torch.get_rng_state()
    opt.preview(batches(3), POLICIES, loss=lambda: loss_of(model, x), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert all(opt.bases[name] is basis for name, basis in bases.items()) and len(opt.bases) == len(bases)
    assert torch.equal(torch.get_rng_state(), random) and model.training


def test_the_share_is_that_of_dense_projections() -> None:
    """By norms: `sum ||G (I - U U^T)|| / sum ||G||`, biases and statistics of read layers count as kept."""
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    opt = wrapped(model)
    x = batches(2)[0].double()
    looked = opt.preview([b.double() for b in batches(1)], POLICIES, loss=lambda: loss_of(model, x), progress=False)
    loss_of(model, x).backward()
    for line, policy in zip(looked.lines, POLICIES):
        twin = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, policy=policy, project="update")
        twin.consolidate([b.double() for b in batches(1)], progress=False)
        whole = free = 0.0
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            whole += float(parameter.grad.norm())
            if name.endswith("weight"):
                u = twin.bases[name].U.double()
                free += float((parameter.grad - parameter.grad @ u @ u.T).norm())
        assert line.gradient == pytest.approx(free / whole, rel=1e-5)
        twin.detach()


def test_the_first_step_after_a_consolidation_warns_by_the_same_share() -> None:
    model = network().eval()
    opt, x = wrapped(model), batches(1)[0]
    looked = opt.preview(batches(1), Energy(0.99999), loss=lambda: loss_of(model, x), progress=False)
    assert looked.lines[0].gradient < 0.03 and "less than 3% free hardly teaches anything" in str(looked)
    opt._core.options = replace(opt._core.options, policy=Energy(0.99999))
    opt.consolidate(batches(1), progress=False)
    loss_of(model, x).backward()
    with pytest.warns(NullSpaceWarning, match=f"only {looked.lines[0].gradient:.1%}"):
        opt.step()


def test_what_consolidate_refuses_is_refused_by_a_preview() -> None:
    model = network()
    with pytest.raises(ConsolidationError, match="no trainable parameter"):
        wrapped(model.requires_grad_(False)).preview(batches(1), progress=False)
    with pytest.raises(OptionError, match="a mode has experts and no policy"):
        NullSpaceOptimizer(
            torch.optim.SGD([torch.zeros(1)], 0.1),
            nn.Sequential(nn.Linear(20, 20)),
            mode=IGSP(target_modules="all-linear"),
        ).preview(batches(1))


def test_all_is_free_where_nothing_was_read() -> None:
    unread = nn.ModuleDict({"read": nn.Linear(12, 3, bias=False), "other": nn.Linear(12, 3)})
    opt = NullSpaceOptimizer(torch.optim.SGD(unread["other"].parameters(), 0.1), unread)
    x = batches(1)[0]
    looked = opt.preview([x], loss=lambda: loss_of(unread["other"], x), forward=unread["read"], progress=False)
    assert [line.gradient for line in looked.lines] == [1.0] * 5


def test_one_pass_serves_all_policies_that_look_at_the_same() -> None:
    passes: list[int] = []

    class Counted(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            passes.append(1)
            return super().__iter__()

    model = network()
    wrapped(model).preview(Counted(batches(1)), progress=False)
    assert len(passes) == 1


def test_a_loss_without_gradient_no_batches_and_no_policies_are_refused() -> None:
    model = network()
    opt = wrapped(model)
    with pytest.raises(ConsolidationError, match="no batches"):
        opt.preview([], progress=False)
    for wrong in (torch.zeros(()), torch.zeros(2, requires_grad=True), 1.0):
        with pytest.raises(OptionError, match="expected a scalar tensor with a gradient"):
            opt.preview(batches(1), loss=lambda wrong=wrong: wrong, progress=False)  # type: ignore[misc]
    with pytest.raises(OptionError, match="expected policies"):
        opt.preview(batches(1), [], progress=False)
    with pytest.raises(OptionError, match="expected a policy"):
        opt.preview(batches(1), ["Energy"], progress=False)  # type: ignore[list-item]


def test_the_default_prints_one_line_for_each_of_five_thresholds() -> None:
    model = network()
    text = str(wrapped(model).preview(batches(1), loss=lambda: loss_of(model, batches(7)[0]), progress=False))
    assert len(text.splitlines()) == 8 and "Energy(0.999) " in text
    assert "Energy(0.8) " in text and "Energy(0.5) " in text


def test_a_loss_that_tells_nothing_and_a_loader_that_ends_are_named() -> None:
    model = network()
    opt, other = wrapped(model), nn.Linear(2, 2)
    for wrong in (lambda: model(batches(1)[0]).sum() * float("nan"), lambda: other(torch.ones(1, 2)).sum()):
        with pytest.raises(OptionError, match="nothing can be told from it"):
            opt.preview(batches(1), loss=wrong, progress=False)
    with pytest.raises(ConsolidationError, match="several times"):
        opt.preview(iter(batches(1)), [Energy(0.9), TailEnergy(0.1)], progress=False)
    assert len(opt.preview(iter(batches(1)), Energy(0.9), progress=False).lines) == 1


def test_a_sparse_table_is_counted() -> None:
    table = nn.Embedding(9, 4, sparse=True)
    opt = NullSpaceOptimizer(torch.optim.SGD(table.parameters(), 0.1), table)
    read, new = [torch.tensor([0, 1])], torch.tensor([1, 2, 3, 4])
    looked = opt.preview(read, [Energy(0.9999)], loss=lambda: table(new).sum(), progress=False)
    assert looked.lines[0].gradient == pytest.approx((3 / 4) ** 0.5)


@pytest.mark.parametrize("policy", [SGP(), OWM(1.0)], ids=repr)
def test_the_step_tells_the_share_that_a_soft_policy_lets_through(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    opt = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, policy=policy)
    x = batches(2)[0]
    looked = opt.preview(batches(1), policy, loss=lambda: loss_of(model, x), progress=False)
    opt.consolidate(batches(1), progress=False)
    monkeypatch.setattr(step, "LEAST_FREE", 1.1)
    loss_of(model, x).backward()
    with pytest.warns(NullSpaceWarning, match=f"only {looked.lines[0].gradient:.1%}"):
        opt.step()
