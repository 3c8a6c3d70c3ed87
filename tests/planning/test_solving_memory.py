"""Bytes that a consolidation takes on top of its second moments, predicted and measured by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nullspace_optim import FixedRank, NullSpaceOptimizer
from nullspace_optim.consolidation.grow import decompose, grow_basis
from nullspace_optim.consolidation.grow_rows import decompose_sketch
from nullspace_optim.planning.predict import Conditions, by_rank, consolidation, predict
from nullspace_optim.planning.shapes import Moment, Survey
from nullspace_optim.planning.survey import survey

pytestmark = pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
SIZE = 384


def peak(run: Callable[[], object]) -> int:
    """Return the bytes that `run` allocates at most at once, workspaces of LAPACK with them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def moment(groups: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(groups, 2 * SIZE, SIZE, dtype=dtype)
    return rows.mT @ rows


@pytest.mark.parametrize("share", [1 / 8, 1 / 2, 1.0])
@pytest.mark.parametrize(("groups", "dtype"), [(1, torch.float32), (1, torch.float64), (3, torch.float32)], ids=str)
def test_bytes_of_finding_directions_are_those_measured(groups: int, dtype: torch.dtype, share: float) -> None:
    rank, second = round(share * SIZE), moment(groups, dtype)

    def found() -> None:
        grow_basis(decompose(FixedRank(rank), second, [2 * SIZE] * groups), [rank] * groups)

    assert Moment(groups, SIZE, 0).solving_bytes(dtype.itemsize, rank) == pytest.approx(peak(found), rel=0.1)


@pytest.mark.parametrize("share", [1 / 64, 1 / 4, 1 / 2])
def test_a_later_task_takes_no_more_than_is_predicted(share: float) -> None:
    rank, second = round(share * SIZE), moment(1, torch.float32)
    basis = grow_basis(decompose(FixedRank(rank), second, [2 * SIZE]), [rank]).basis

    def found() -> None:
        candidate = decompose(FixedRank(rank), second, [2 * SIZE], basis, tasks=1)
        grow_basis(candidate, [rank // 2], basis)

    survey = Survey("toy", 4, 0, (), (Moment(1, SIZE, 0),), (), (), 0, 0, 0)
    predicted = consolidation(survey).later
    assert 0.7 * predicted < peak(found) <= 1.01 * predicted


def test_bytes_of_solving_a_sketch_are_those_measured() -> None:
    factor = torch.randn(1, 32, SIZE)

    def found() -> None:
        candidate = decompose_sketch(FixedRank(31), factor, factor.square().sum((1, 2)), [SIZE], None)
        grow_basis(candidate, [31])

    assert Moment(1, SIZE, 0, sketched=32).solving_bytes(4, 31) == pytest.approx(peak(found), rel=0.1)


@pytest.mark.parametrize("rank", [96, 288])
def test_the_peak_of_a_whole_consolidation_is_predicted(rank: int) -> None:
    """One after the other: of two weights of one width the eigenvectors of the first are gone before the second."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 8))
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters()), model, policy=FixedRank(rank), rows="all")
    batches = list(torch.randn(32, 16, SIZE))
    measured = peak(lambda: optimizer.consolidate(batches, progress=False))
    with torch.device("meta"):
        shadow, x = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 8)), torch.empty(16, SIZE)
    found = survey(shadow, lambda: shadow(x), batch=16)
    plan = predict(found, by_rank(rank))
    first = 4 * SIZE * rank  # the basis that is made first; anchors come last
    expected = consolidation(found, Conditions(samples=512)).moments + plan.solving_bytes + first
    assert measured == pytest.approx(expected, rel=0.1)


def test_a_joint_policy_holds_all_eigenvectors_at_once() -> None:
    with torch.device("meta"):
        shadow, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), torch.empty(16, 64)
    found = survey(shadow, lambda: shadow(x), batch=16)
    alone, together = (predict(found, by_rank(8), Conditions(joint=joint)).solving_bytes for joint in (False, True))
    assert together == alone + 4 * 64 * 64


def test_matrices_that_leave_the_cache_are_read_column_by_column() -> None:
    assert Moment(1, 2048, 0).read(4) == 0
    assert Moment(2, 8192, 0).read(4) == 2 * 4 * 8192**3 // 6
