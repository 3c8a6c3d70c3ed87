"""Policies: how many directions a task keeps, against each paper's own formula."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import reference_impl as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import consolidate, moment_of, spectrum, task_rows
from torch import nn
from torch.optim import AdamW

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.consolidation.grow import decompose, grow_basis
from nullspace_optim.errors import OptionError
from nullspace_optim.policies import (
    CGP,
    CODECL,
    OSF,
    OWM,
    PEGP,
    SGP,
    TRGP,
    VPTNSP,
    EigenvalueRatio,
    Energy,
    FixedRank,
    InfLoRA,
    KeepLoRA,
    NumericalRank,
    Policy,
    RankBudget,
    Spectrum,
    SplitLoRA,
    TailEnergy,
    WeightBands,
)
from nullspace_optim.subspace.linalg import principal_angles

ALL = (Energy(), TailEnergy(), EigenvalueRatio(), FixedRank(5), NumericalRank(), RankBudget(), SGP(), TRGP())
ALL += (CODECL(), OWM(), SplitLoRA(), VPTNSP(), CGP(), PEGP(), InfLoRA(), KeepLoRA(), WeightBands())
ABSOLUTE = (CODECL, OWM)
POLICIES = pytest.mark.parametrize("policy", ALL, ids=lambda policy: type(policy).__name__)


# Each rule against its formula


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_energy_is_gpm_by_singular_value_decomposition(threshold, seed):
    policy, tasks, before = Energy(threshold), [task_rows(10 * seed + t) for t in range(3)], None
    for done in range(1, 4):
        after = consolidate(policy, moment_of(tasks[done - 1]), before)
        twin = slow.gpm_basis(tasks[:done], threshold)
        assert after.ranks == (twin.shape[1],)
        assert principal_angles(after.basis[0], twin).max() < 2e-3
        assert after.energy >= threshold - 1e-6
        before = after


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97])
def test_trgp_is_the_papers_joint_choice_by_singular_value_decomposition(threshold):
    tasks, before, seen = [task_rows(t, n=30, decay=1.5) for t in range(4)], None, []
    for done in range(1, 5):
        before = consolidate(TRGP(threshold), moment_of(tasks[done - 1], dtype=torch.float64), before)
        seen.append(before.members[0].nonzero().flatten().tolist())
        memory, subspaces = slow.trgp(tasks[:done], threshold)
        assert before.ranks == (memory.shape[1],) and seen == subspaces
        assert principal_angles(before.basis[0], memory).max() < 2e-3
        own = before.basis[0][:, before.members[0]].double()
        assert float((tasks[done - 1] @ own).norm() ** 2 / tasks[done - 1].norm() ** 2) >= threshold - 1e-6


def test_trgp_keeps_the_strongest_new_direction():
    before = consolidate(TRGP(0.9), moment_of(task_rows(0, n=2)))
    after = consolidate(TRGP(0.9), moment_of(task_rows(1, n=1)), before)
    direction = task_rows(1, n=1)[0]
    kept = slow.projector(after.basis)[0] @ direction
    assert float(kept.norm() / direction.norm()) > 0.9


@pytest.mark.parametrize("rho", [0.05, 0.15, 0.5])
def test_tail_energy_is_gnsp_by_singular_value_decomposition(rho):
    policy, before = TailEnergy(rho), None
    tasks = [[task_rows(t, 8), task_rows(t, 16), task_rows(t + 50, 8)] for t in range(3)]
    for done, batches in enumerate(tasks, start=1):
        moment = sum(moment_of(rows) / moment_of(rows).norm() for rows in batches)
        before = consolidate(policy, moment, before)
        merged = slow.gnsp_moment(tasks[:done])
        left = torch.linalg.svd(merged)[0]
        assert torch.allclose(before.covariance[0].double(), merged, atol=1e-6)
        assert before.ranks == (slow.gnsp_rank(merged, rho),)
        assert principal_angles(before.basis[0], left[:, : before.ranks[0]]).max() < 1e-3


@pytest.mark.parametrize("a", [1, 2, 10, 1000])
def test_eigenvalue_ratio_is_adam_nscl_by_an_eigenvalue_list(a):
    moments = [moment_of(task_rows(t, decay=1.0), dtype=torch.float64) for t in range(3)]
    policy, before = EigenvalueRatio(a), None
    for done, moment in enumerate(moments, start=1):
        before = consolidate(policy, moment, before)
        eigenvalues = torch.linalg.eigvalsh(sum(moments[:done])[0]).tolist()
        assert before.ranks == (slow.nscl_rank(eigenvalues, a),)


def test_eigenvalue_ratio_takes_rounding_as_the_floor_of_a_singular_spectrum():
    eps = torch.finfo(torch.float32).eps
    assert EigenvalueRatio(10).rank(spectrum([1.0, 20 * eps, 9 * eps, 0.0])) == 2
    assert EigenvalueRatio(8).rank(spectrum([1.0, 2**-4, 2**-7])) == 1
    assert EigenvalueRatio(10).rank(spectrum([1.0, 0.9, 0.8])) == 0


def test_numerical_rank_is_the_rank_of_the_rows():
    for seed, rank in enumerate((1, 7, 24)):
        rows = task_rows(seed, n=rank, decay=2.0)
        assert consolidate(NumericalRank(), moment_of(rows, dtype=torch.float64)).ranks == (rank,)
    rows = task_rows(0)
    expected = int(torch.linalg.matrix_rank(rows, rtol=0.01))
    assert consolidate(NumericalRank(0.01), moment_of(rows, dtype=torch.float64)).ranks == (expected,)


def test_numerical_rank_takes_no_rounding_of_a_task_it_covers():
    rows = task_rows(0, n=10)
    before = consolidate(NumericalRank(), moment_of(rows, dtype=torch.float64))
    again = consolidate(NumericalRank(), moment_of(rows, dtype=torch.float64), before)
    assert again.ranks == before.ranks == (10,)
    assert torch.equal(again.basis, before.basis)
    output_change = (rows - rows @ slow.projector(again.basis)[0]).norm() / rows.norm()
    assert output_change < 1e-6


def test_fixed_rank_counts_what_is_stored():
    first = consolidate(FixedRank(5), moment_of(task_rows(0)))
    assert first.ranks == (5,)
    assert consolidate(FixedRank(5), moment_of(task_rows(1)), first).ranks == (5,)
    assert consolidate(FixedRank(8), moment_of(task_rows(1)), first).ranks == (8,)
    assert consolidate(FixedRank(100), moment_of(task_rows(1)), first).ranks == (24,)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 1.0])
def test_rank_budget_is_greedy_over_all_weights(share):
    moments = {
        name: moment_of(task_rows(i, s=s, n=2 * s), dtype=torch.float64)
        for i, (name, s) in enumerate((("a", 8), ("b", 20), ("c", 12)))
    }
    spectra = {name: decompose(RankBudget(), moment, [10]).spectra[0] for name, moment in moments.items()}
    shares = {name: s.shares.tolist() for name, s in spectra.items()}
    expected = slow.budget_ranks(shares, math.floor(share * 40 + 1e-9))
    taken = RankBudget(share).ranks(spectra)
    assert taken == expected
    assert sum(taken.values()) <= share * 40 + 1e-9


def test_rank_budget_counts_old_directions_and_skips_rounding():
    spectra = {"old": spectrum([1.0, 0.5, 0.0, 0.0], kept=2), "new": spectrum([3.0, 2.0, 1e-9, 0.0])}
    assert RankBudget(0.5).ranks(spectra) == {"old": 1, "new": 1}
    assert RankBudget(0.25).ranks(spectra) == {"old": 0, "new": 0}
    assert RankBudget(1.0).ranks(spectra) == {"old": 2, "new": 2}
    assert RankBudget(0.1).ranks(spectra) == {"old": 0, "new": 0}


@pytest.mark.fault(80)
def test_ties_go_to_the_first_key_and_position():
    spectra = {key: spectrum([1.0, 1.0]) for key in ("b", "a")}
    assert RankBudget(0.75).ranks(spectra) == {"b": 1, "a": 2}
    assert Energy(0.5).rank(spectrum([1.0, 1.0, 1.0, 1.0])) == 2
    assert TailEnergy(0.5).rank(spectrum([1.0, 1.0, 1.0, 1.0])) == 3


def test_energy_boundaries():
    assert Energy(0.75).rank(spectrum([2.0, 1.0, 1.0])) == 2
    assert Energy(0.7500001).rank(spectrum([2.0, 1.0, 1.0])) == 3
    assert Energy(0.9).rank(spectrum([0.1, 0.0], covered=0.9, kept=1, total=1.0)) == 0
    assert Energy(0.95).rank(spectrum([0.1, 0.0], covered=0.9, kept=1, total=1.0)) == 1


@POLICIES
@pytest.mark.fault(47)
def test_an_all_zero_matrix_has_rank_zero(policy):
    choice = consolidate(policy, torch.zeros(2, 6, 6))
    assert choice.ranks == (0, 0) and choice.basis.shape == (2, 6, 0)
    before = consolidate(policy, moment_of(task_rows(0), task_rows(1)))
    after = consolidate(policy, torch.zeros(2, 24, 24), before)
    assert after.ranks == before.ranks
    assert after.energy == 1.0


@POLICIES
def test_the_rank_does_not_depend_on_the_unit_of_the_rows(policy):
    if isinstance(policy, ABSOLUTE):
        pytest.skip("compares eigenvalues with a constant of the paper")
    rows = task_rows(3)
    assert consolidate(policy, moment_of(rows)).ranks == consolidate(policy, moment_of(256.0 * rows)).ranks


# Options


WRONG = [
    (Energy, "threshold", r"\(0, 1\)", (0, 1, 1.5, -0.1, float("nan"), float("inf"), "0.9", None, True)),
    (TailEnergy, "rho", r"\(0, 1\)", (0, 1, 1.5, -0.1, float("nan"), None)),
    (EigenvalueRatio, "a", r"\[1, inf\)", (0, 0.5, -1, float("nan"), float("inf"), None)),
    (FixedRank, "k", r"\[1, inf\)", (0, -1, 1.5, float("nan"), None, True)),
    (NumericalRank, "tolerance", r"\(0, 1\)", (0, 1, 2, -0.1, float("nan"))),
    (SGP, "threshold", r"\(0, 1\)", (0, 1, None)),
    (TRGP, "threshold", r"\(0, 1\)", (0, 1, None)),
    (CODECL, "aperture", r"\(0, inf\)", (0, -1, float("nan"), None)),
    (CODECL, "gain", r"\(0, 1\)", (0, 1, None)),
    (CODECL, "floor", r"\[0, 1\)", (-0.1, 1, None)),
    (OWM, "alpha", r"\(0, inf\)", (0, -1, None)),
    (SplitLoRA, "alpha", r"\(0, inf\)", (0, -1, None)),
    (VPTNSP, "eta", r"\(0, 1\]", (0, 1.1, None)),
    (OSF, "share", r"\(0, 1\)", (0, 1, None)),
    (OSF, "growth", r"\[0, 1\)", (-0.1, 1, None)),
    (InfLoRA, "last", r"\[0.95, 1\)", (0.9, 1, None)),
    (InfLoRA, "tasks", r"\[1, inf\)", (0, 1.5, True)),
    (CGP, "similarity", r"\[-1, 1\]", (-2, 1.1, None)),
    (SGP, "alpha", r"\[0, inf\)", (-1, float("nan"), None)),
    (RankBudget, "share", r"\(0, 1\]", (0, 1.01, -0.1, float("nan"), None)),
]
CASES = [
    pytest.param(policy, option, interval, value, id=f"{policy.__name__}-{value}")
    for policy, option, interval, values in WRONG
    for value in values
]


@pytest.mark.parametrize("policy, option, interval, value", CASES)
@pytest.mark.fault(83)
def test_a_wrong_option_names_itself_and_its_interval(policy, option, interval, value):
    with pytest.raises(OptionError, match=rf"{policy.__name__}\({option}=.*{interval}"):
        policy(**{option: value})


@POLICIES
def test_policies_are_frozen_and_compare_by_value(policy):
    assert policy == dataclasses.replace(policy)
    assert eval(repr(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.threshold = 0.5


def test_the_defaults_are_the_papers_constants():
    assert Energy().threshold == 0.99
    assert TailEnergy().rho == 0.15 and TailEnergy.batch_frobenius and TailEnergy.merge == "accumulate"
    assert (SGP().threshold, SGP().alpha) == (0.97, 10)
    assert EigenvalueRatio().a == 10 and EigenvalueRatio.merge == "accumulate"
    assert NumericalRank.precise and not Energy.precise
    assert {type(policy).merge for policy in (Energy(), FixedRank(1), NumericalRank(), RankBudget())} == {"append"}


def test_a_policy_without_a_rule_says_so():
    class Nothing(Policy):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must implement rank"):
        Nothing().ranks({"w": spectrum([1.0])})


SPECTRA = st.lists(st.floats(0, 100), min_size=1, max_size=12).map(lambda v: sorted(v, reverse=True))
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@given(SPECTRA, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@PROPERTY
def test_property_ranks_are_monotone_in_the_threshold(values, first, second):
    seen = spectrum(values)
    low, high = sorted((first, second))
    assert 0 <= Energy(low).rank(seen) <= Energy(high).rank(seen) <= seen.size
    assert 0 <= TailEnergy(high).rank(seen) <= TailEnergy(low).rank(seen) <= seen.size


@given(st.lists(SPECTRA, min_size=1, max_size=5), st.floats(0.01, 1))
@PROPERTY
def test_property_the_budget_is_never_exceeded(lists, share):
    spectra = {str(i): spectrum(values) for i, values in enumerate(lists)}
    taken = RankBudget(share).ranks(spectra)
    assert sum(taken.values()) <= share * sum(s.size for s in spectra.values())
    assert all(0 <= taken[key] <= spectra[key].free for key in spectra)


@given(st.integers(0, 2**20), st.integers(1, 20), st.floats(0.1, 0.99))
@PROPERTY
def test_property_two_tasks_in_the_span_of_the_first_add_nothing(seed, n, threshold):
    rows = task_rows(seed, n=n, s=16, decay=1.0)
    before = consolidate(NumericalRank(), moment_of(rows, dtype=torch.float64))
    mixed = torch.randn(5, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ rows
    assert consolidate(Energy(threshold), moment_of(mixed), before).ranks == before.ranks


def test_the_code_count_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(OptionError, match=r"TRGP\(paper_code=True\).*Energy"):
        TRGP(paper_code=True)


def test_gpms_code_takes_one_direction_fewer_of_the_first_task_only() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, 1.0])
    first = Spectrum(values, total=10.0, largest=5.0, covered=0.0, kept=0, rows=10)
    later = Spectrum(values, total=20.0, largest=9.0, covered=0.5, kept=2, rows=10)
    for policy, taken in ((Energy(0.85), (3, 2)), (Energy(0.85, paper_code=True), (2, 2))):
        assert (policy.rank(first), policy.rank(later)) == taken


# Policies beyond rank rules


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_owm_is_the_papers_recursion_over_all_rows(alpha):
    policy, tasks, before = OWM(alpha), [task_rows(t, decay=1.5) for t in range(3)], None
    projector = torch.eye(24, dtype=torch.float64)
    for rows in tasks:
        before = consolidate(policy, moment_of(rows, dtype=torch.float64), before)
        for row in rows:
            k = projector @ row
            projector = projector - torch.outer(k, k) / (alpha + row @ k)
        found = torch.eye(24, dtype=torch.float64) - slow.projector(before.basis * before.scale.sqrt()[:, None, :])[0]
        assert torch.allclose(found, projector, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_osf_is_the_singular_value_decomposition_and_grows_by_another(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    policy = OSF(0.3, growth=0.2)
    sides = {"right": (weight.T @ weight, shape[0]), "left": (weight @ weight.T, shape[1])}
    found = {}
    for side, (moment, rows) in sides.items():
        candidate = decompose(policy, moment[None], [rows])
        found[side] = grow_basis(candidate, [policy.rank(candidate.spectra[0])])
    left, _, right = torch.linalg.svd(weight)
    for side, directions in (("right", right[:3].T), ("left", left[:, :3])):
        assert found[side].ranks == (3,) and principal_angles(found[side].basis[0], directions).max() < 1e-3
    P, Q = (slow.projector(found[side].basis)[0] for side in ("right", "left"))
    step = torch.randn(*shape, dtype=torch.float64)
    later = weight + step - Q @ step - step @ P + Q @ step @ P
    candidate = decompose(policy, (later.T @ later)[None], [shape[0]], found["right"].basis, tasks=1)
    grown = grow_basis(candidate, [policy.rank(candidate.spectra[0])], found["right"].basis)
    rest = torch.linalg.svd(later - Q @ later)[2][:2].T
    assert grown.ranks == (5,) and principal_angles(grown.basis[0][:, 3:], rest).max() < 1e-3


def test_osf_keeps_both_sides_of_weights_it_has_no_data_for():
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))
    before = [layer.weight.detach().double().clone() for layer in (model[0], model[2])]
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01, weight_decay=0.1), model, policy=OSF(0.5))
    optimizer.consolidate([torch.zeros(1, 12)], progress=False)
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        optimizer.step()
    assert optimizer.verify().ok
    for layer, old in zip((model[0], model[2]), before):
        left, singular, right = torch.linalg.svd(old)
        k = len(singular) // 2
        moved = layer.weight.detach().double() - old
        assert float(moved.norm()) > 0.05
        assert float((moved @ right[:k].T).norm()) < 1e-5 and float((left[:, :k].T @ moved).norm()) < 1e-5


DRIFT = (
    Energy(0.99), TailEnergy(), EigenvalueRatio(), FixedRank(5), NumericalRank(), RankBudget(0.4), SGP(), TRGP(),
    CODECL(aperture=2.0), OWM(), OSF(), WeightBands(), SplitLoRA(), InfLoRA(), KeepLoRA(), VPTNSP(), PEGP(), CGP(),
)  # fmt: skip


@pytest.mark.parametrize("policy", DRIFT, ids=lambda policy: type(policy).__name__)
def test_every_policy_keeps_what_it_says_through_200_adamw_steps(policy):
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01, weight_decay=0.1), model, policy=policy)
    optimizer.consolidate([task_rows(0).float()], progress=False)
    before = [layer.weight.detach().double().clone() for layer in (model[0], model[2])]
    for _ in range(200):
        optimizer.zero_grad()
        (model(torch.randn(16, 24)) - 1).square().mean().backward()
        optimizer.step()
    assert optimizer.verify().ok
    for name, layer, old in zip(("0.weight", "2.weight"), (model[0], model[2]), before, strict=True):
        moved = layer.weight.detach().double() - old
        assert float(moved.norm() / old.norm()) > 0.03 or optimizer.capacity()[name] == 0
        for side, part in optimizer.bases[name].subspaces.items():
            exact = part.basis if part.scale is None else part.basis * (part.scale == 1)[:, None, :]
            kept = moved @ exact[0].double() if side == "right" else exact[0].double().T @ moved
            assert float(kept.norm() / old.norm()) < 1e-5
            if part.scale is None:
                assert part.basis.shape[2] > 0


SOFT = (SGP(0.99, alpha=1.0), CODECL(aperture=2.0), OWM(), VPTNSP(0.9))


@pytest.mark.parametrize("policy", SOFT, ids=lambda policy: type(policy).__name__)
def test_a_soft_policy_lets_its_share_of_every_adamw_step_through(policy):
    """Against a twin that takes the bare step and then multiplies it by `I - U diag(s) U^T`, 200 times, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False)).double()
    twin = copy.deepcopy(model)
    base = AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    optimizer = NullSpaceOptimizer(base, model, policy=policy, project="update")
    optimizer.consolidate([task_rows(0)], progress=False)
    free = {}
    for name in ("0.weight", "2.weight"):
        part = optimizer.bases[name].subspaces["right"]
        basis, scale = part.basis[0].double(), part.scale[0].double()
        assert 0.02 < float(scale.max()) and float(scale[scale > 0].min()) < 1
        free[name] = torch.eye(len(basis), dtype=torch.float64) - (basis * scale) @ basis.T
    bare, start = AdamW(twin.parameters(), lr=0.003, weight_decay=0.1), copy.deepcopy(dict(twin.named_parameters()))
    for _ in range(200):
        inputs = torch.randn(16, 24, dtype=torch.float64)
        for net, steps in ((model, optimizer), (twin, bare)):
            steps.zero_grad()
            (net(inputs) - 1).square().mean().backward()
            before = {name: p.detach().clone() for name, p in net.named_parameters()}
            steps.step()
            if net is twin:
                for name, p in net.named_parameters():
                    p.data = before[name] + (p.data - before[name]) @ free[name]
    assert optimizer.verify().ok
    for name, expected in twin.named_parameters():
        moved = expected.detach() - start[name].detach()
        assert float((model.get_parameter(name) - expected).detach().norm() / moved.norm()) < 1e-3


def test_osf_of_a_second_task_decomposes_what_is_left():
    model = nn.Sequential(nn.Linear(12, 8, bias=False))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=OSF(0.25, growth=0.25))
    for task in range(3):
        optimizer.consolidate([torch.zeros(1, 12)], name=str(task), progress=False)
        assert {s.rank for s in optimizer.bases["0.weight"].subspaces.values()} == {2 * (task + 1)}
        model(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        assert optimizer.verify().ok
