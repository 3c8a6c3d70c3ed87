from __future__ import annotations

import numpy as np
import pytest

from reference import metrics

HAND = np.array([[90.0, 40.0, 20.0], [80.0, 95.0, 30.0], [60.0, 85.0, 70.0]])
PRETRAINED = [50.0, 50.0, 25.0]

# Per-task rows of order I as printed by ZSCL (Aircraft ... SUN397).
ZERO_SHOT = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
ZSCL_LAST = [40.6, 92.2, 81.3, 70.5, 94.8, 90.5, 91.9, 98.7, 93.9, 85.3, 80.2]
FINE_TUNE_LAST = [31.0, 89.3, 65.8, 67.3, 88.9, 71.1, 85.6, 99.6, 92.9, 77.3, 81.1]


def test_hand_made_three_by_three() -> None:
    values = {name: mean.value for name, mean in metrics.summary(HAND, PRETRAINED).items()}
    assert values == pytest.approx(
        {
            "transfer": (40 + (20 + 30) / 2) / 2,
            "average": 570 / 9,
            "last": 215 / 3,
            "preserve": (80 + 60 + 85) / 3,
            "forgetting": ((90 - 60) + (95 - 85)) / 2,
            "backward_transfer": ((60 - 90) + (85 - 95)) / 2,
            "diagonal_gain": (40 + 45 + 45) / 3,
        }
    )


def test_transfer_is_the_mean_of_column_means_not_of_the_triangle() -> None:
    assert metrics.transfer(HAND).value == 32.5
    assert np.mean([40, 20, 30]) == 30


def test_a_model_that_never_changes_has_the_published_zero_shot_figures() -> None:
    matrix = np.tile(ZERO_SHOT, (11, 1))
    figures = [metrics.transfer(matrix).value, metrics.average(matrix).value, metrics.last(matrix).value]
    assert figures == pytest.approx([69.4, 65.3, 65.3], abs=0.06)


@pytest.mark.parametrize("row, published", [(ZSCL_LAST, 83.6), (FINE_TUNE_LAST, 77.3)], ids=["zscl", "fine-tune"])
def test_last_of_published_rows(row: list[float], published: float) -> None:
    assert metrics.last(np.tile(row, (11, 1))).value == pytest.approx(published, abs=0.06)


def test_transfer_over_known_tasks_leaves_out_those_near_chance() -> None:
    chance = [10.0, 20.0, 5.0]
    assert metrics.known(PRETRAINED, chance) == [0, 2]
    assert metrics.transfer_known(HAND, PRETRAINED, chance) == (25.0, 2, 2)
    assert metrics.transfer_known(HAND, PRETRAINED, [1.0] * 3) == metrics.transfer(HAND)
    assert np.isnan(metrics.transfer_known(HAND, PRETRAINED, [50.0] * 3).value)


@pytest.mark.fault(120)
def test_missing_cells_are_left_out_and_counted() -> None:
    matrix = HAND.copy()
    matrix[0, 2] = matrix[2, 0] = np.nan
    assert metrics.transfer(matrix) == (35.0, 2, 3)
    assert metrics.last(matrix) == (77.5, 2, 3)
    assert str(metrics.forgetting(matrix)) == "10.0 (1/2 cells)"
    assert str(metrics.average(np.full((2, 2), np.nan))) == "- (0/4 cells)"


def test_one_task_has_no_transfer_and_no_forgetting() -> None:
    figures = metrics.summary(np.array([[70.0]]), [50.0])
    assert np.isnan(figures["transfer"].value) and np.isnan(figures["forgetting"].value)
    assert figures["diagonal_gain"].value == 20.0


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[T, T\]"):
        metrics.summary(np.zeros((2, 3)), [0.0, 0.0])
