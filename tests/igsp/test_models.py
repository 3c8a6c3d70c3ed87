"""Real architectures: open_clip (both towers), timm, transformers; state dict keys, dtypes, batch axes."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from nullspace_optim import IGSP, NullSpaceOptimizer, clip_forward

SMALL = IGSP(rank=2, candidates=2, cap=3, window=1, on_cap="prune")


def small_clip() -> nn.Module:
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=24, heads=2, layers=2),
    )


def images(seed: int, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.randint(1, 49, (4, 8), generator=torch.Generator().manual_seed(0))


def clip_step(model: nn.Module, opt: NullSpaceOptimizer, seed: int) -> None:
    features = model.encode_image(images(seed), normalize=True) @ model.encode_text(TOKENS, normalize=True).T
    loss = F.cross_entropy(10 * features, torch.arange(6) % 4)
    opt.zero_grad()
    loss.backward()
    opt.step()


def test_both_towers_of_open_clip() -> None:
    model = small_clip()
    keys, before = list(model.state_dict()), model.encode_image(images(0)).detach()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=SMALL)
    assert list(model.state_dict()) == keys
    assert torch.equal(model.encode_image(images(0)), before), "candidates begin at zero"
    for task in range(2):
        for step in range(6):
            clip_step(model, opt, step)
        assert opt.status().phase == 2 and opt.verify().worst <= 1e-5
        forward = clip_forward(model, TOKENS)
        report = opt.consolidate([images(9)], name=f"task {task}", forward=forward, progress=False)
    assert [layer.name for layer in report.layers] == [
        *(f"visual.transformer.resblocks.{i}.mlp" for i in range(2)),
        *(f"transformer.resblocks.{i}.mlp" for i in range(2)),
    ]
    (warning,) = report.warnings  # both tasks are of the same images and prompts
    assert all(layer.flow for layer in report.layers) and "look like those of 'task 0'" in warning
    assert list(model.state_dict()) == keys
    model.load_state_dict(model.state_dict())
    with torch.no_grad(), opt.task("a task without router"):
        assert torch.equal(model.encode_image(images(0)), before)
    with torch.no_grad(), opt.task("task 1"):
        assert not torch.equal(model.encode_image(images(0)), before)


def test_one_tower_alone_is_announced() -> None:
    model = small_clip()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=SMALL)
    for step in range(4):
        model.encode_image(images(step)).square().mean().backward()
        opt.step()
    with pytest.warns(UserWarning, match=r"no training forward reached 2 layers .*'transformer\.resblocks\.0\.mlp'"):
        opt.consolidate([images(9)], forward=lambda x: model.encode_image(x), progress=False)


def test_a_shared_router_keeps_experts_of_a_tower_no_later_task_reaches() -> None:
    model = small_clip()
    mode = IGSP(rank=2, candidates=2, cap=3, window=1, on_cap="prune", router="shared")
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-2), model, mode=mode)
    for step in range(4):
        clip_step(model, opt, step)
    opt.consolidate([images(9)], name="both", forward=clip_forward(model, TOKENS), progress=False)
    with torch.no_grad(), opt.task(None):
        before = model.encode_text(TOKENS)
    for step in range(4):
        model.encode_image(images(step)).square().mean().backward()
        opt.step()
    with pytest.warns(UserWarning, match="no training forward reached 2 layers"):
        opt.consolidate([images(9)], name="one", forward=lambda x: model.encode_image(x), progress=False)
    with torch.no_grad(), opt.task(None):
        torch.testing.assert_close(model.encode_text(TOKENS), before)


def test_experts_beside_linear_layers_by_name_in_multi_head_attention_blocks() -> None:
    model = small_clip()
    mode = IGSP(target_modules=r"(visual\.)?transformer\.resblocks\..*\.mlp\.c_fc", rank=2, cap=3)
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode)
    for step in range(5):
        clip_step(model, opt, step)
    assert len(opt.status().converged) == 4 and opt.status().phase == 2


def test_samples_are_told_from_tokens_where_the_batch_is_the_second_axis() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=False, dropout=0.0)
    opt = NullSpaceOptimizer(
        AdamW(block.parameters(), lr=1e-3), block, mode=IGSP(target_modules="linear1", rank=2, cap=3)
    )
    for _ in range(8):
        block(torch.randn(5, 3, 16)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    x = torch.randn(5, 3, 16)
    layer = opt._core.mode.experts.layers[0]
    assert layer.batch_axis == 1
    with torch.no_grad():
        together, alone = block(x), torch.cat([block(x[:, i : i + 1]) for i in range(3)], dim=1)
    torch.testing.assert_close(together, alone)


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
    keys = list(model.state_dict())
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=SMALL)
    for step in range(5):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x), torch.arange(4)).backward()
        opt.step()
        opt.zero_grad()
    report = opt.consolidate([x], progress=False)
    assert [layer.name for layer in report.layers] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert list(model.state_dict()) == keys


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    keys = list(model.state_dict())
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=SMALL)
    batch = {"input_ids": TOKENS, "pixel_values": images(0, 4)}
    for _ in range(5):
        F.cross_entropy(model(**batch).logits_per_image, torch.arange(4)).backward()
        opt.step()
        opt.zero_grad()
    report = opt.consolidate([batch], progress=False)
    assert len(report.layers) == 4 and not report.warnings and list(model.state_dict()) == keys


def test_a_sequential_model_hands_its_result_through() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 6)
    before = model(x).detach()
    NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(target_modules="0", rank=2))
    assert torch.equal(model(x), before) and list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_and_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(target_modules="0", rank=2, cap=3))
    if dtype is torch.float64:
        model.double()
    for step in range(6):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = model(x.double() if dtype is torch.float64 else x)
        out.float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    assert opt.status().phase == 2
    opt.consolidate([x.double() if dtype is torch.float64 else x], progress=False)


def test_activation_checkpointing_draws_the_same_noise() -> None:
    from torch.utils.checkpoint import checkpoint

    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(target_modules="0", rank=2))
        for step in range(4):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).requires_grad_()
            out = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            out.square().mean().backward()
            opt.step()
            opt.zero_grad()
        results.append([p.detach().clone() for p in opt.param_groups[1]["params"]])
    for other in results[1:]:
        for one, two in zip(results[0], other):
            torch.testing.assert_close(one, two)
