from __future__ import annotations

import numpy as np
import pytest

from reference.data.tasks import ORDERS
from reference.evaluation import metrics

HAND = np.array([[90.0, 40.0, 20.0], [80.0, 95.0, 30.0], [60.0, 85.0, 70.0]])
PRETRAINED = [50.0, 50.0, 25.0]

# Published per-task rows, Aircraft ... SUN397: ZSCL's results.ipynb; MoE-Adapters as cited by LEBA; LEBA's Table 1.
ZERO_SHOT = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
ZSCL_LAST = [40.6, 92.2, 81.3, 70.5, 94.8, 90.5, 91.9, 98.7, 93.9, 85.3, 80.2]
MOE_LAST = [49.8, 92.2, 86.1, 78.1, 95.7, 94.3, 89.5, 98.1, 89.9, 81.6, 80.0]
PER_TASK = [62.0, 95.1, 89.6, 79.5, 98.9, 97.5, 92.7, 99.6, 94.7, 89.6, 81.8]
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


@pytest.mark.parametrize("order, published", [("I", [69.4, 65.3, 65.3]), ("II", [65.4, 65.3, 65.3])])
def test_a_model_that_never_changes_has_the_published_zero_shot_figures(order: str, published: list[float]) -> None:
    by_task = dict(zip(ORDERS["I"], ZERO_SHOT))
    matrix = np.tile([by_task[task] for task in ORDERS[order]], (11, 1))
    figures = [metrics.transfer(matrix).value, metrics.average(matrix).value, metrics.last(matrix).value]
    assert figures == pytest.approx(published, abs=0.06)


PUBLISHED_LAST = [(ZERO_SHOT, 65.3), (ZSCL_LAST, 83.6), (MOE_LAST, 85.0), (FINE_TUNE_LAST, 77.3), (PER_TASK, 89.2)]


@pytest.mark.parametrize("row, published", PUBLISHED_LAST, ids=["zero-shot", "zscl", "moe", "fine-tune", "per-task"])
def test_last_of_published_rows(row: list[float], published: float) -> None:
    matrix = np.random.default_rng(0).uniform(0, 100, (11, 11))
    matrix[-1] = row
    assert metrics.last(matrix).value == pytest.approx(published, abs=0.06)


def test_separate_models_have_the_published_average_and_gain() -> None:
    matrix = np.tile(ZERO_SHOT, (11, 1))
    matrix[np.tril_indices(11)] = np.tile(PER_TASK, (11, 1))[np.tril_indices(11)]
    assert np.diag(matrix).mean() == pytest.approx(89.2, abs=0.06)
    assert metrics.diagonal_gain(matrix, ZERO_SHOT).value == pytest.approx(89.2 - 65.3, abs=0.06)
    assert metrics.forgetting(matrix).value == metrics.backward_transfer(matrix).value == 0


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
