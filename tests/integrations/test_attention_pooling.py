"""The attention pooling of CLIP's ResNets: old outputs stay, and what cannot be protected is frozen by name."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from nullspace_optim import Energy, Fate, NullSpaceOptimizer, NumericalRank, clip_forward

VISION = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "patch_size": None}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT).eval()


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize("whole", [False, True], ids=["pooling", "model"])
def test_old_outputs_of_a_resnet_clip_stay_while_its_pooling_trains(whole: bool) -> None:
    model = resnet()
    if not whole:
        model.requires_grad_(False)
        model.visual.attnpool.requires_grad_(True)
    old, new = torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64)
    tokens = torch.randint(1, 64, (3, 8))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    base = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    optimizer = NullSpaceOptimizer(base, model, policy=NumericalRank())
    report = optimizer.consolidate([old], forward=clip_forward(model, tokens), progress=False)
    with torch.no_grad():
        kept = model.encode_image(old)
    for _ in range(30):
        optimizer.zero_grad()
        (model.encode_image(new) - 1).square().mean().backward()
        optimizer.step()
    fates = {name: fate.fate for name, fate in ((p.name, p) for p in report.parameters)}
    for part in ("q_proj", "k_proj", "v_proj", "c_proj"):
        weight = f"visual.attnpool.{part}.weight"
        assert fates[weight] is Fate.PROTECTED and fates[f"visual.attnpool.{part}.bias"] is Fate.FROZEN
        moved = (trained[weight] - before[weight]).norm() / before[weight].norm()
        assert moved > 0.1, f"{weight} moved by {moved}"
    assert fates["visual.attnpool.positional_embedding"] is Fate.FROZEN
    with torch.no_grad():
        drift = (model.encode_image(old) - kept).norm() / kept.norm()
    assert drift <= 1e-5 and optimizer.verify().ok


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
def test_a_threshold_lets_the_rest_of_the_pooling_move() -> None:
    model = resnet()
    model.requires_grad_(False)
    model.visual.attnpool.requires_grad_(True)
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    optimizer = NullSpaceOptimizer(base, model, policy=Energy(0.99))
    old = torch.randn(4, 3, 64, 64)
    optimizer.consolidate([old], forward=model.encode_image, progress=False)
    with torch.no_grad():
        kept = model.encode_image(old)
    for _ in range(30):
        optimizer.zero_grad()
        (model.encode_image(torch.randn(4, 3, 64, 64)) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.encode_image(old) - kept).norm() / kept.norm() > 1e-3
    assert optimizer.verify().ok
