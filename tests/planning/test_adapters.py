"""Plans of joint biases, sketches and a consolidation, against real runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counts import counted
from measured import Measured, agrees
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import FixedRank, NullSpaceOptimizer, SketchedCovariance
from nullspace_optim.cli import main
from nullspace_optim.covariance.second_moment import SecondMoment
from nullspace_optim.covariance.sketch import FrequentDirections
from nullspace_optim.planning.predict import Conditions, by_rank, consolidation, predict
from nullspace_optim.planning.shapes import Moment
from nullspace_optim.planning.survey import survey

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """`[n, 24]` to `[n, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def of_net(batch: int, **options: Any) -> Any:
    with torch.device("meta"):
        model, x = Net(), torch.empty(batch, 24)
    return survey(model, lambda: model(x), batch=batch, **options)


@pytest.mark.parametrize("k", [4, 22, 41])
def test_a_joint_bias_is_one_more_input_and_agrees_with_its_measured_run(k: int) -> None:
    model = Net()
    real = Measured(model, torch.randn(64, 24), model, k, bias="joint")
    agrees(of_net(64, bias="joint"), real, k)


def test_a_consolidation_agrees_with_the_count_of_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole products, which a CPU cuts down to the lower triangle; no counter sees how eigenvectors are found."""
    monkeypatch.setattr(SecondMoment, "_one_by_one", lambda self, groups: False)
    model = Net()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=FixedRank(4), rows="all")
    with counted() as mode:
        optimizer.consolidate(list(torch.randn(16, 64, 24)), progress=False)
    cost = consolidation(of_net(64), Conditions(samples=1024))
    assert mode.get_total_flops() == pytest.approx(cost.forward_flops + cost.moment_flops, rel=0.15)


def test_bytes_of_a_sketch_are_those_of_a_real_one() -> None:
    real = FrequentDirections(2, 40, 8, dtype=torch.float32, device="cpu")
    held = real._buffer.nbytes + real.squares.nbytes
    assert Moment(2, 40, 100, sketched=8).bytes(4) == held
    found = of_net(64, sketch=SketchedCovariance(8, 30))
    assert [moment.sketched for moment in found.moments] == [0, 8, 8]
    assert consolidation(found).moments == 4 * (24 * 24 + 2 * 40 * 17)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sketch", "many"], "--sketch 'many'"),
        (["--sketch", "1"], "size=1"),
        (["--sketch", "8,9", "--policy", "SGP"], "needs whole second moments"),
        (["--vocabulary", "-5"], "rows_used=-5"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line_and_exit_code_2(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    assert main(["plan", "--model", "test_vit", "--batch", "1", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_command_prints_plans_of_sketches_and_joint_biases(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main(["plan", "--model", "test_vit", "--batch", "2", "--sketch", "8,32"]) == 0
    assert "are sketched by 8 rows" in capsys.readouterr().out
    assert main(["plan", "--model", "test_vit", "--batch", "2", "--bias", "joint"]) == 0
    assert "one more input" in capsys.readouterr().out


def test_predictions_do_not_change_the_survey() -> None:
    found = of_net(8)
    assert predict(found, by_rank(3)) == predict(found, by_rank(3))
