"""Patches on collages: the area under the curve by hand, perfect and meaningless tokens, the model left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import Config, load_config
from reference.data.tasks import Split, Task
from reference.errors import ExperimentError
from reference.evaluation import dense
from reference.evaluation.dense import collages, grouping, patch_figures, patches, read_out
from reference.experiment import Experiment
from reference.methods import METHODS
from reference.sequence import Sequence


@pytest.fixture(scope="module")
def config() -> Config:
    settings = {
        "tasks": ["colours", "photographs"], "iterations": 2, "pretrain_iterations": 10, "warmup": 1, "batch_size": 8,
        "evaluation_images": 30, "consolidation_images": 16, "reference_images": 16, "output": "o", "dense_collages": 6,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return load_config("demo", settings)


def test_collages_hold_halved_test_images_in_their_quarters() -> None:
    flat = [torch.full((3, 3, 8, 8), value, dtype=torch.uint8) for value in (10, 20, 30, 40, 50)]
    splits = [Split(images, torch.zeros(3, dtype=torch.int64)) for images in flat]
    images, kinds = collages([Task(str(n), ("a",), ("{}",), s, s) for n, s in enumerate(splits)], 7)
    assert images.shape == (7, 3, 8, 8) and kinds.shape == (7, 4)
    for image, four in zip(images, kinds.tolist()):
        assert len(set(four)) == 4
        for place, kind in enumerate(four):
            top, left = 4 * (place // 2), 4 * (place % 2)
            assert (image[:, top : top + 4, left : left + 4] == 10 * (kind + 1)).all()
    again = collages([Task(str(n), ("a",), ("{}",), s, s) for n, s in enumerate(splits)], 7)
    assert torch.equal(images, again[0]) and len({tuple(k) for k in kinds.tolist()}) > 1


def test_the_area_under_the_curve_is_that_of_all_pairs_with_half_of_ties() -> None:
    torch.manual_seed(0)
    correlation = torch.randint(0, 4, (6, 6)).float()
    kinds = torch.tensor([0, 0, 1, 1, 2, 0])
    together = kinds[:, None] == kinds
    same = [float(correlation[i, j]) for i in range(6) for j in range(i + 1, 6) if together[i, j]]
    other = [float(correlation[i, j]) for i in range(6) for j in range(i + 1, 6) if not together[i, j]]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in same for b in other)
    assert grouping(correlation, together) == pytest.approx(wins / (len(same) * len(other)))
    assert grouping(together.float(), together) == 1.0 and grouping(torch.zeros(6, 6), together) == 0.5


def test_shuffled_regions_are_told_by_nothing() -> None:
    torch.manual_seed(0)
    kinds = torch.arange(64) // 16
    together = kinds[:, None] == kinds
    found = []
    for _ in range(20):
        order = torch.randperm(64)
        found.append(grouping(together[order][:, order].float(), together))
    assert sum(found) / 20 == pytest.approx(0.5, abs=0.02)


def test_self_correlation_is_the_loop_over_heads_and_the_model_stays(config: Config, experiment: Experiment) -> None:
    clip = experiment.pretrained(0)
    images = collages(experiment.tasks, 3)[0]
    plain = clip.model.encode_image(clip.normalised(images))  # type: ignore[operator]
    layer = clip.model.visual.transformer.resblocks[-1].attn  # type: ignore[union-attr, index]
    hooks = len(layer._forward_pre_hooks)
    tokens, found = patches(clip, images, config)
    assert tokens.shape == (3, 16, 96) and found.shape == (3, 16, 16) and len(layer._forward_pre_hooks) == hooks
    assert torch.equal(clip.model.encode_image(clip.normalised(images)), plain)  # type: ignore[operator]
    total = torch.zeros(3, 16, 16)
    for part in range(3):
        rows = slice(96 * part, 96 * (part + 1))
        packed = F.linear(tokens, layer.in_proj_weight[rows], layer.in_proj_bias[rows])
        for head in range(3):
            unit = F.normalize(packed[:, :, 32 * head : 32 * head + 32], dim=2)
            total += unit @ unit.mT / 9
    torch.testing.assert_close(found, total.detach(), rtol=1e-4, atol=1e-5)


def test_perfect_tokens_group_and_read_perfectly(config: Config, experiment: Experiment, monkeypatch: object) -> None:
    kinds = collages(experiment.tasks, 6)[1]

    def perfect(clip: object, images: Tensor, config: Config) -> tuple[Tensor, Tensor]:
        half = torch.arange(4) * 2 // 4
        quarters = (2 * half[:, None] + half).flatten()
        same = (quarters[:, None] == quarters).float()
        wanted = kinds[: len(images), quarters] if len(images) == 6 else torch.zeros(len(images), 16, dtype=torch.int64)
        return F.one_hot(wanted, 2).float(), (same if len(images) == 6 else torch.zeros(16, 16)).expand(
            len(images), 16, 16
        )

    monkeypatch.setattr(dense, "patches", perfect)  # type: ignore[attr-defined]
    found = patch_figures(experiment.pretrained(0), experiment.tasks, config)
    assert found == {"grouping": 1.0, "position": 0.5, "read_out": 100.0}


def test_the_read_out_is_a_ridge_regression() -> None:
    torch.manual_seed(0)
    features, labels, others = torch.randn(30, 4), torch.arange(30) % 3, torch.randn(9, 4)
    known = torch.cat([features, torch.ones(30, 1)], dim=1).double().requires_grad_(False)
    weights = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (known @ weights - F.one_hot(labels)).square().sum() / 30 + dense.RIDGE * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    expected = (torch.cat([others, torch.ones(9, 1)], dim=1).double() @ weights).argmax(1)
    assert torch.equal(read_out(features, labels, others), expected)


def test_a_run_looks_at_both_ends_where_it_is_asked(config: Config, experiment: Experiment, tmp_path: Path) -> None:
    found = Sequence(experiment, METHODS["finetune"], config, 0, tmp_path / "a").run()["dense"]
    assert set(found) == {"before", "after"} and found["before"] != found["after"]
    assert found["before"] == patch_figures(experiment.pretrained(0), experiment.tasks, config)
    still = Sequence(experiment, METHODS["zero-shot"], config, 0, tmp_path / "b").run()["dense"]
    assert still["before"] == still["after"] == found["before"]
    none = Sequence(experiment, METHODS["zero-shot"], load_config("demo", {**vars(config), "dense_collages": None}), 0,
                    tmp_path / "c")  # fmt: skip
    assert none.run()["dense"] == {"before": {}, "after": {}}
    with pytest.raises(ExperimentError, match="dense_collages=2"):
        load_config("demo", {"output": "o", "dense_collages": 2})
