from __future__ import annotations

import pytest
import torch

from reference.config import load_config
from reference.evaluation.geometry import pool_figures, recalls
from reference.experiment import prepare


def slow(similarity: torch.Tensor, kind: list[int], k: int) -> tuple[float, float]:
    """One query at a time, by sorting; ties count against the model."""
    images, texts = similarity.shape
    there = []
    for i in range(images):
        better = sum(float(similarity[i, t]) >= float(similarity[i, kind[i]]) for t in range(texts) if t != kind[i])
        there.append(better < k)
    back = []
    for t in sorted(set(kind)):
        own = max(float(similarity[i, t]) for i in range(images) if kind[i] == t)
        back.append(sum(float(similarity[i, t]) >= own for i in range(images) if kind[i] != t) < k)
    return 100 * sum(there) / len(there), 100 * sum(back) / len(back)


def test_recall_agrees_with_counting_one_query_at_a_time() -> None:
    kind = [0, 0, 1, 2, 2, 3, 5]
    similarity = torch.randn(7, 6).mul(2).round()
    found = recalls(similarity, torch.tensor(kind))
    for k in (1, 5):
        expected = slow(similarity, kind, k)
        assert found[f"image_to_text_at_{k}"] == pytest.approx(expected[0])
        assert found[f"text_to_image_at_{k}"] == pytest.approx(expected[1])
    assert set(recalls(torch.eye(4), torch.arange(4)).values()) == {100.0}
    assert recalls(torch.zeros(7, 7), torch.arange(7))["image_to_text_at_5"] == 0.0


def test_figures_of_the_demo_pool() -> None:
    settings = {"output": "o", "tasks": ["colours"], "pretrain_iterations": 2, "reference_images": 24}
    config = load_config("demo", settings)
    experiment = prepare(config)
    assert experiment.pool is not None
    clip = experiment.pretrained(0)
    figures = pool_figures(clip, experiment.pool, config)
    assert set(figures) == {
        "image_to_text_at_1", "image_to_text_at_5", "text_to_image_at_1", "text_to_image_at_5", "modality_gap",
    }  # fmt: skip
    assert 0 < figures["modality_gap"] <= 2
