"""torchvision's detection models: losses as a dict, lists of images, targets that are mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from training import relative_drift
from two_tasks import example

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.errors import BatchError
from nullspace_optim.model.batches import samples_in

detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def detector() -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    backbone: Any = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.ReLU())
    backbone.out_channels = 32
    return detection.FasterRCNN(
        backbone, min_size=64, max_size=64, rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), box_head=TwoMLPHead(32 * 9, 64),
        box_predictor=FastRCNNPredictor(64, 3),
    )  # fmt: skip


def batches(task: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(task)
    made = []
    for _ in range(2):
        images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
        target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1 + task])}
        made.append((images, [target, target]))
    return made


def train(model: Any, optimizer: Any, task: int, epochs: int = 4) -> None:
    model.train()
    for images, targets in batches(task) * epochs:
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def scores(model: Any) -> Tensor:
    """What the backbone and the proposal head say of the first task's images."""
    model.eval()
    images, _ = model.transform(batches(0)[0][0])
    features = model.backbone(images.tensors)
    return torch.cat([features.flatten(), model.rpn.head([features])[0][0].flatten()])


@pytest.mark.parametrize("kind", [list, tuple], ids=["lists", "tuples, as their collate function makes them"])
def test_images_and_targets_are_fed_as_they_are_and_old_scores_stay(kind: Any) -> None:
    drift = []
    for protected in (True, False):
        model = detector()
        optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model)
        train(model, optimizer, 0)
        if protected:
            loader = [kind(map(kind, batch)) for batch in batches(0)]
            report = optimizer.consolidate(loader, progress=False)
            assert report.fed == kind.__name__ and not [note for note in report.notes if "guess" in note]
        then, before = scores(model), model.roi_heads.box_head.fc6.weight.detach().clone()
        train(model, optimizer, 1)
        drift.append(relative_drift(scores(model), then))
        assert relative_drift(model.roi_heads.box_head.fc6.weight, before) > 1e-4
        assert optimizer.verify().ok is protected
    assert drift[0] < drift[1] / 5


def test_a_list_of_images_without_targets_is_read_as_before() -> None:
    model = detector()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model)
    images = batches(0)[0][0]
    with pytest.raises(ValueError, match="list of 3d tensors"):
        optimizer.consolidate([images], progress=False)
    optimizer.consolidate([images], forward=model, progress=False)
    assert optimizer.verify().ok


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("detection.md"), "detection.md", "exec"), {"__name__": "__main__"})


def test_three_boxes_are_not_taken_for_three_samples_of_three_channels() -> None:
    model = detector()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 3), "labels": torch.ones(3, dtype=torch.int64)}] * 2
    loader = [(images, targets) for images, _ in batches(0)]
    assert samples_in(loader[0]) is None
    assert optimizer.consolidate(loader, progress=False).samples is None
    assert optimizer.verify(loader).ok


def test_no_image_at_all_is_refused() -> None:
    model = detector()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model)
    with pytest.raises(BatchError, match="cannot feed"):
        optimizer.consolidate([([], [])], progress=False)
