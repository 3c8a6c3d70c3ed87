"""CLIP-Refine's phase: its loss against a slow twin, its place before every method, its control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.config import Config, load_config
from reference.errors import ExperimentError
from reference.experiment import Experiment
from reference.methods import METHODS, Setting
from reference.methods.refine import Refinement, refine
from reference.sequence import Sequence
from reference.training.steps import Batch, seeded

SMALL = {
    "tasks": ["colours", "photographs"], "iterations": 2, "pretrain_iterations": 10, "warmup": 1, "batch_size": 8,
    "evaluation_images": 30, "consolidation_images": 16, "reference_images": 24, "output": "o", "refine_steps": 3,
    "refine_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("demo", SMALL)


def setting(experiment: Experiment, config: Config) -> Setting:
    return Setting(experiment.pretrained(0).copy(), config, experiment.tasks, experiment.pool, 0)


@pytest.mark.parametrize("kind", ["random", "norm"])
def test_the_loss_is_the_released_one_on_the_models_own_logits(
    config: Config, experiment: Experiment, kind: str
) -> None:
    made = setting(experiment, replace(config, refine_loss=kind))  # type: ignore[arg-type]
    learner = Refinement(made)
    model, pairs = made.clip.model, learner.pairs
    with torch.no_grad():  # away from the teacher
        model.visual.proj.mul_(1.5)  # type: ignore[union-attr, operator]
    index = torch.tensor([0, 3, 5, 8, 13])
    labels = pairs.kind[index]
    images = made.clip.normalised(pairs.pool.images[index])
    found = float(learner.loss(Batch(images, labels, pairs.tokens, -1, 0, index)).detach())
    with torch.no_grad():
        raw = model.encode_image(images).double(), model.encode_text(pairs.tokens[labels]).double()  # type: ignore[operator]
        scale = float(model.logit_scale.exp())  # type: ignore[operator]
        points = torch.randn(5, raw[0].shape[1], generator=seeded(0, 8)).double()
        moved = [(part - points if kind == "random" else part).square().mean() for part in raw]
        units = [part / part.norm(dim=1, keepdim=True) for part in raw]
        before = [part.double() for part in pairs.teacher(index)]
        total = float(sum(moved))
        same = (labels[:, None] == labels[None]).double()
        for one, other in ((units, before), (units[::-1], before[::-1])):
            target = 0.5 * same / same.sum(1, keepdim=True) + 0.5 * (scale * other[0] @ other[1].T).softmax(1)
            total -= float((target * (scale * one[0] @ one[1].T).log_softmax(1)).sum()) / 5 / 2
    assert found == pytest.approx(total, rel=1e-4)


def test_the_phase_comes_before_every_method_and_is_the_same_again(
    config: Config, experiment: Experiment, tmp_path: Path
) -> None:
    ones = [Sequence(experiment, METHODS[name], config, 0, tmp_path / name).run() for name in ("zero-shot", "finetune")]
    plain = Sequence(experiment, METHODS["zero-shot"], replace(config, refine_steps=0), 0, tmp_path / "plain").run()
    assert ones[0]["gaps"][0] == ones[1]["gaps"][0] != plain["gaps"][0]
    assert ones[0]["pool"]["before"] != plain["pool"]["before"]
    with pytest.raises(ExperimentError, match="refine_steps=0"):
        Sequence(experiment, METHODS["zero-shot"], config, 0, tmp_path / "plain").run(resume=True)


def test_the_norms_of_features_fall_and_the_model_is_held(config: Config, experiment: Experiment) -> None:
    made = setting(experiment, replace(config, refine_steps=40, refine_loss="norm"))
    images = made.clip.normalised(experiment.tasks[0].test.images[:20])
    before = made.clip.model.encode_image(images).norm(dim=1).mean()  # type: ignore[operator]
    refine(made)
    after = made.clip.model.encode_image(images).norm(dim=1).mean()  # type: ignore[operator]
    assert after < 0.9 * before


def test_without_a_pool_it_says_so(config: Config, experiment: Experiment) -> None:
    with pytest.raises(ExperimentError, match="reference pool"):
        refine(Setting(experiment.pretrained(0).copy(), config, experiment.tasks, None, 0))
