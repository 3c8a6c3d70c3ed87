"""`prune`: directions that no task needs are given back, never more than the stated share of any task's energy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import IGSP, Energy, Fate, NullSpaceOptimizer, NumericalRank, Policy
from nullspace_optim.consolidation.prune import PruneReport
from nullspace_optim.errors import OptionError
from nullspace_optim.policies import CODECL


def rows(seed: int, scales: list[float]) -> Tensor:
    """Rows whose second moment is diagonal up to chance, with these standard deviations."""
    return torch.randn(400, len(scales), generator=torch.Generator().manual_seed(seed)) * torch.tensor(scales)


ONE = rows(1, [3, 1, 0.05, 0.01, 0, 0, 0, 0])
TWO = rows(2, [0, 0, 0.001, 0.02, 2, 1, 0.03, 0])


def wrapped(policy: Policy, bias: bool = False) -> tuple[nn.Linear, NullSpaceOptimizer]:
    layer = nn.Linear(8, 5, bias=bias)
    opt = NullSpaceOptimizer(AdamW(layer.parameters(), lr=1e-2), layer, policy=policy)
    opt.consolidate([ONE], name="one", progress=False)
    opt.consolidate([TWO], name="two", progress=False)
    return layer, opt


def lost(U: Tensor, X: Tensor) -> float:
    """Share of the energy of the rows `X` outside the span of `U`, by dense mathematics in float64."""
    X, U = X.double(), U.double()
    return float((X - X @ U @ U.T).square().sum() / X.square().sum())


@pytest.mark.parametrize("bound", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
def test_no_task_loses_more_than_the_bound_and_one_more_direction_would(bound: float) -> None:
    _, opt = wrapped(NumericalRank())
    before = opt.bases["weight"].U.clone()
    assert before.shape[1] == 7
    report = opt.prune({"one": [ONE], "two": [TWO]}, bound=bound, progress=False)
    after = opt.bases["weight"].U
    found = max(lost(after, ONE), lost(after, TWO))
    assert found <= bound + 1e-12 and report.lost == pytest.approx(found, abs=1e-9)
    assert report.freed == before.shape[1] - after.shape[1] and opt.capacity()["weight"] == 1 - after.shape[1] / 8
    least = min(max(lost(torch.cat([after[:, :i], after[:, i + 1 :]], 1), x) for x in (ONE, TWO))
                for i in range(after.shape[1]))  # fmt: skip
    assert least > bound


def test_what_is_left_is_kept_exactly_and_what_was_given_back_can_be_learned() -> None:
    layer, opt = wrapped(NumericalRank())
    before, weight = opt.bases["weight"].U.clone(), layer.weight.detach().clone()
    report = opt.prune({"one": [ONE], "two": [TWO]}, bound=1e-2, progress=False)
    assert isinstance(report, PruneReport) and report.freed >= 2 and "gave back" in str(report)
    kept = opt.bases["weight"].U.clone()
    for step in range(50):
        opt.zero_grad()
        layer(rows(step, [1.0] * 8)).square().mean().backward()
        opt.step()
    moved = layer.weight.detach() - weight
    assert opt.verify().worst <= 1e-5
    assert float((moved @ kept).norm()) < 1e-4 and float((moved @ before).norm()) > 0.1


def test_a_full_parameter_becomes_free_again() -> None:
    full = torch.randn(400, 8, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -4, 8)
    layer = nn.Linear(8, 5, bias=False)
    opt = NullSpaceOptimizer(AdamW(layer.parameters(), lr=1e-2), layer, policy=NumericalRank())
    with pytest.warns(UserWarning, match="no free direction"):
        opt.consolidate([full], name="one", progress=False)
    assert opt.bases["weight"].fate is Fate.FULL
    opt.prune({"one": [full]}, bound=1e-3, progress=False)
    assert opt.bases["weight"].fate is Fate.PROTECTED and 0 < opt.capacity()["weight"] < 1
    before = layer.weight.detach().clone()
    layer(full).square().mean().backward()
    opt.step()
    assert not torch.equal(layer.weight, before) and opt.verify().ok


def test_a_pruned_store_is_saved_and_resumed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, opt = wrapped(NumericalRank())
    opt.prune({"one": [ONE], "two": [TWO]}, bound=1e-3, progress=False)
    opt.save(tmp_path / "f")
    opt.load(tmp_path / "f")
    assert opt.verify([ONE]).drift("one") == 0.0
    opt.consolidate([rows(5, [0, 0, 0, 0, 0, 0, 0, 1])], progress=False)


def test_grouped_and_left_sided_weights() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 6, 1, groups=2, bias=False)
            self.proj = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[:, :, None])[:, :, 0] @ self.proj

    model = Mixed()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-2), model, policy=Energy(1 - 1e-9))
    x = rows(1, [3, 1, 0.05, 0.01, 2, 1, 0.03, 0.001])
    opt.consolidate([x], name="one", progress=False)
    before = {name: basis.rank for name, basis in opt.bases.items()}
    report = opt.prune({"one": [x]}, bound=1e-3, progress=False)
    assert {row.name: row.before for row in report.parameters} == before
    assert {row.name: row.after for row in report.parameters} == {n: b.rank for n, b in opt.bases.items()}
    (conv,) = (row for row in report.parameters if row.name == "conv.weight")
    assert conv.after == 4 and conv.before == 8, "two strong directions in each group"
    assert opt.verify().ok


def test_what_cannot_be_thinned_is_left_alone_and_named() -> None:
    _, opt = wrapped(CODECL())
    report = opt.prune({"one": [ONE], "two": [TWO]}, bound=1e-2, progress=False)
    assert report.freed == 0 and report.left_alone == {"weight": "its policy needs all its directions"}


def test_a_missing_task_a_wrong_bound_and_a_mode_are_refused() -> None:
    _, opt = wrapped(NumericalRank())
    before = opt.bases["weight"].U
    with pytest.raises(
        OptionError, match=r"\['one'\]\): expected one loader for each consolidated task, \['one', 'two'\]"
    ):
        opt.prune({"one": [ONE]})
    with pytest.raises(OptionError, match=r"bound=1\.5"):
        opt.prune({"one": [ONE], "two": [TWO]}, bound=1.5)
    assert opt.bases["weight"].U is before or torch.equal(opt.bases["weight"].U, before)
    model = nn.Sequential(nn.Linear(4, 4))
    experts = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(target_modules="0", rank=2))
    with pytest.raises(OptionError, match="a mode prunes its experts itself"):
        experts.prune({})
