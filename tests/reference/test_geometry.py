"""Cosines and the modality gap of a task, and accuracy under attack, against slow twins and closed forms."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.config import Config, load_config
from reference.evaluation import robust
from reference.evaluation.geometry import gap_figures, nhsic
from reference.evaluation.report import tables
from reference.evaluation.robust import RADII, attacked, robust_accuracy
from reference.experiment import Experiment
from reference.methods import METHODS
from reference.sequence import Sequence
from reference.training.clip import Clip
from reference.training.steps import class_vectors


@pytest.fixture(scope="module")
def config() -> Config:
    settings = {
        "tasks": ["colours", "photographs"], "iterations": 2, "pretrain_iterations": 10, "warmup": 1, "batch_size": 8,
        "evaluation_images": 30, "consolidation_images": 16, "reference_images": 16, "output": "o", "robust_images": 12,
    }  # fmt: skip
    return load_config("demo", settings)


def test_gap_figures_are_two_loops() -> None:
    torch.manual_seed(0)
    features, texts = F.normalize(torch.randn(7, 5), dim=1), F.normalize(torch.randn(3, 5), dim=1)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2])
    own, others, centre, words = 0.0, 0.0, torch.zeros(5), torch.zeros(5)
    for feature, label in zip(features, labels):
        for number, text in enumerate(texts):
            cosine = float(feature @ text)
            own, others = (own + cosine, others) if number == label else (own, others + cosine)
        centre, words = centre + feature / 7, words + texts[label] / 7
    found = gap_figures(features, labels, texts)
    assert found["positive_cosine"] == pytest.approx(own / 7) and found["negative_cosine"] == pytest.approx(others / 14)
    assert found["modality_gap"] == pytest.approx(float((centre - words).norm()), rel=1e-5)
    assert found["nhsic"] == nhsic(features, labels)


def test_nhsic_is_that_of_eigenvectors_above_all_permutations() -> None:
    torch.manual_seed(0)
    features = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    shared, one_hot = features @ features.T, F.one_hot(labels).double()
    kernels = [torch.exp(-(2 - 2 * shared) * 4 / (2 * 25 * 4)), one_hot @ one_hot.T]

    def published(one: Tensor, other: Tensor) -> float:
        """`sum_ij a_i b_j (u_i v_j)^2` with `a = s / (s + eps m)` of the doubly centred kernels."""
        centre = torch.eye(6, dtype=torch.float64) - 1 / 6
        (s, u), (t, v) = (torch.linalg.eigh(centre @ kernel @ centre) for kernel in (one, other))
        return float((s / (s + 6e-5)) @ (u.T @ v).square() @ (t / (t + 6e-5)))

    def above(one: Tensor, other: Tensor) -> float:
        mixed = [published(one, other[list(p)][:, list(p)]) for p in permutations(range(6))]
        return published(one, other) - sum(mixed) / len(mixed)

    assert nhsic(features, labels) == pytest.approx(above(*kernels) / above(kernels[1], kernels[1]), abs=1e-9)


def test_nhsic_tells_dependent_from_independent_data() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    noise = torch.randn(200, 16)
    near, far = (F.normalize(noise + s * torch.randn(4, 16)[labels], dim=1) for s in (0.5, 5.0))
    alone = [nhsic(F.normalize(noise, dim=1), labels[torch.randperm(200)]) for _ in range(20)]
    assert abs(sum(alone) / 20) < 0.02 < 0.1 < nhsic(near, labels) < nhsic(far, labels) < 1.0
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    order = torch.randperm(200)
    assert nhsic((far @ rotation)[order], labels[order]) == pytest.approx(nhsic(far, labels), abs=1e-3)
    assert nhsic(far, 0 * labels) == nhsic(far, torch.arange(200)) == 0.0  # labels that tell nothing apart


def test_nhsic_of_many_images_is_that_of_images_of_all_classes() -> None:
    torch.manual_seed(0)
    labels = torch.arange(1000) % 2  # in turn: every second image is of one class
    features = F.normalize(torch.randn(1000, 8) + 5 * torch.randn(2, 8)[labels], dim=1)
    found, whole = gap_figures(features, labels, features[:2])["nhsic"], nhsic(features, labels)
    assert whole > 0.9 and found == pytest.approx(whole, abs=0.05) and found != whole


def test_every_task_has_gaps_after_every_task_and_an_attack_at_both_ends(
    config: Config, experiment: Experiment, tmp_path: Path
) -> None:
    runs = []
    for name in ("zero-shot", "finetune", "finetune-per-task"):
        runs.append(Sequence(experiment, METHODS[name], config, 0, tmp_path / name).run())
        assert [[bool(cell) for cell in row] for row in runs[-1]["gaps"]] == [[True, True]] * 3
        assert set(runs[-1]["robust"]["before"]) == set(runs[-1]["robust"]["after"]) == set(config.tasks)
    still, tuned, own = runs
    assert still["gaps"][0] == still["gaps"][2] and still["robust"]["before"] == still["robust"]["after"]
    assert tuned["gaps"][0] == still["gaps"][0] and tuned["gaps"][2] != still["gaps"][2]
    assert own["gaps"][2][0] == own["gaps"][1][0] and own["gaps"][2][1] != own["gaps"][1][1]
    rows = [dict(zip(tables(runs, "")[1][0], row)) for row in tables(runs, "")[1][1:]]
    mean = sum(cell["positive_cosine"] for cell in still["gaps"][2]) / 2
    assert rows[0]["positive cosine"] == f"{mean:.3f}" and {row["negative cosine"] for row in rows} != {"-"}
    plain = replace(config, robust_images=None)
    without = Sequence(experiment, METHODS["zero-shot"], plain, 0, tmp_path / "none").run()
    assert without["robust"] == {"before": {}, "after": {}}
    assert dict(zip(*tables([without], "")[1]))["robust, share kept"] == "-"


def test_attacked_images_stay_in_the_ball_and_the_model_as_it_was(config: Config, experiment: Experiment) -> None:
    clip, task = experiment.pretrained(0), experiment.tasks[0]
    clip.model.zero_grad()
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    clean, *under = robust_accuracy(clip, task, config)
    split = task.test.drawn(config.robust_images, seed=0)
    classes = class_vectors(clip, task, 1).detach()
    images = split.images[:].float()
    with torch.no_grad():
        answers = clip.model.encode_image(clip.normalised(split.images[:]), normalize=True) @ classes.T  # type: ignore[operator]
    assert clean == 100 * int((answers.argmax(1) == split.labels).sum()) / 12
    assert [clean, *under] == sorted([clean, *under], reverse=True)
    assert robust_accuracy(clip, task, config) == [clean, *under]
    for radius in RADII:
        found = attacked(clip, images, split.labels, classes, radius, images)
        assert float((found - images).abs().max()) <= radius + 1e-4
        assert 0 <= float(found.min()) and float(found.max()) <= 255
        assert not torch.equal(found, images)
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    assert all(parameter.grad is None for parameter in clip.model.parameters())


class Linear(nn.Module):
    """Features linear in the pixels, without a norm: two classes are told apart by `w_1 - w_0`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.logit_scale = nn.Parameter(0.01 * torch.randn(2, 12)), torch.tensor(0.0)

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        return images.flatten(1) @ self.weight.T


def test_one_step_on_a_linear_model_is_the_best_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, still = Linear(), torch.tensor(0.0)
    clip = Clip(model, lambda texts: still, 2, still, torch.tensor(1 / 255), torch.device("cpu"))
    images, labels, classes = torch.full((4, 3, 2, 2), 100.0), torch.tensor([0, 1, 1, 0]), torch.eye(2)
    monkeypatch.setattr(robust, "STEPS", 2)
    found = attacked(clip, images, labels, classes, 0.5, images)
    away = (model.weight[1] - model.weight[0]).sign().view(3, 2, 2)
    best = images + 0.5 * torch.where(labels == 0, 1.0, -1.0)[:, None, None, None] * away
    assert torch.equal(found, best.detach())
