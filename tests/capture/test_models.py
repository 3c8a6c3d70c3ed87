"""One row per model: every trainable parameter has its fate, and the counts add up.

Models have random weights and reduced size; every linear and convolution weight that runs must be protected
unless the row says which ones are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from nullspace_optim.capture.capture import Capture
from nullspace_optim.covariance.accumulator import ParameterStatistics
from nullspace_optim.settings import Settings

Model = tuple[nn.Module, Callable[[], Any]]
TEXT = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}


def tokens(length: int = 12) -> Tensor:
    text = torch.randint(1, 58, (2, length))
    text[:, 6], text[:, 7:] = 59, 0
    return text


def pair(model: nn.Module, size: int = 32) -> Model:
    image, text = torch.randn(2, 3, size, size), tokens()
    return model, lambda: model(image, text)


def clip(vision: dict[str, Any], text: dict[str, Any] | None = None, size: int = 32, **options: Any) -> Model:
    kind = open_clip.CustomTextCLIP if options.pop("custom", False) else open_clip.CLIP
    return pair(kind(embed_dim=32, vision_cfg=vision, text_cfg={**TEXT, **(text or {})}, **options), size)


def timm_clip(name: str, size: int, text: dict[str, Any] | None = None, **vision: Any) -> Model:
    return clip({"timm_model_name": name, "image_size": size, **vision}, text, size, custom=True)


def coca() -> Model:
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    multimodal = {**TEXT, "attn_pooler_heads": 2}
    return pair(open_clip.CoCa(embed_dim=32, vision_cfg=vision, text_cfg=text, multimodal_cfg=multimodal))


def timm_model(name: str, size: int, **options: Any) -> Model:
    timm = pytest.importorskip("timm")
    model, x = timm.create_model(name, num_classes=5, **options), torch.randn(2, 3, size, size)
    return model, lambda: model(x)


def siglip() -> Model:
    timm = pytest.importorskip("timm")
    model, run = clip(
        VISION, {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}, custom=True, init_logit_bias=-10
    )
    model.visual = timm.models.vision_transformer.VisionTransformer(
        img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=0, class_token=False, global_pool="map"
    )
    return model, run


def swin() -> Model:
    timm = pytest.importorskip("timm")
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=56, num_classes=5, embed_dim=24, depths=(2, 2), num_heads=(2, 4)
    )
    x = torch.randn(2, 3, 56, 56)
    return model, lambda: model(x)


def mixer() -> Model:
    timm = pytest.importorskip("timm")
    model = timm.models.mlp_mixer.MlpMixer(num_classes=5, img_size=32, patch_size=16, num_blocks=2, embed_dim=32)
    x = torch.randn(2, 3, 32, 32)
    return model, lambda: model(x)


def resnet18() -> Model:
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    return model, lambda: model(x)


def hf(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def hf_clip() -> Model:
    model = hf(
        "CLIP",
        text_config={**SMALL, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 59},
        vision_config={**SMALL, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    text, image = tokens(), torch.randn(2, 3, 32, 32)
    return model, lambda: model(input_ids=text, pixel_values=image)


def bert() -> Model:
    model, text = hf("Bert", vocab_size=60, max_position_embeddings=16, **SMALL), tokens()
    return model, lambda: model(input_ids=text, attention_mask=(text > 0).long())


def gpt2() -> Model:
    model, text = hf("GPT2", vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2), tokens()
    return model, lambda: model(input_ids=text)


def llama() -> Model:
    model, text = hf("Llama", vocab_size=60, max_position_embeddings=16, num_key_value_heads=1, **SMALL), tokens()
    return model, lambda: model(input_ids=text)


def lora() -> Model:
    peft = pytest.importorskip("peft")
    base, _ = bert()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    text = tokens()
    return model, lambda: model(input_ids=text)


# name -> (builder, protected, frozen, free, pattern of matrices that cannot be protected)
MODELS: dict[str, tuple[Callable[[], Model], int, int, int, str]] = {
    "open_clip ViT": (lambda: clip(VISION), 20, 42, 0, ""),
    "open_clip ResNet": (lambda: clip({"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, size=64), 33, 63, 0, ""),
    "open_clip ConvNeXt": (lambda: timm_clip("convnext_atto", 32, timm_pool="", timm_proj="linear"), 51, 106, 0, ""),
    "open_clip CoCa": (coca, 38, 89, 0, "attn_pool.attn.in_proj_weight"),
    "open_clip MobileCLIP": (
        lambda: timm_clip("fastvit_t8", 32, {"no_causal_mask": True}, timm_pool="avg", timm_proj=None),
        79,
        203,
        0,
        "",
    ),
    "open_clip SigLIP": (siglip, 23, 51, 0, "attn_pool.q.weight"),
    "torchvision resnet18": (resnet18, 21, 41, 0, ""),
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", 32, img_size=32, depth=2), 10, 22, 0, ""),
    "timm convnext": (lambda: timm_model("convnext_atto", 32), 41, 87, 0, ""),
    "timm mobilenetv3": (lambda: timm_model("mobilenetv3_small_050", 32), 54, 88, 0, ""),
    "timm swin": (swin, 19, 44, 0, ""),
    "timm mixer": (mixer, 10, 20, 0, ""),
    "transformers CLIP": (hf_clip, 30, 48, 0, ""),
    "transformers BERT": (bert, 16, 23, 0, ""),
    "transformers GPT-2": (gpt2, 10, 18, 0, ""),
    "transformers Llama": (llama, 15, 5, 0, ""),
    "PEFT LoRA": (lora, 8, 0, 0, ""),
}


def captured(model: nn.Module, run: Callable[[], Any], **options: Any) -> Capture:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    observer = Capture(parameters, Settings(**options), buffers=dict(model.named_buffers()))
    with observer:
        observer.batch(run)
    return observer


def fate(seen: ParameterStatistics) -> str:
    if not seen.met:
        assert not seen.sides and not seen.reasons and seen.row_index is None
        return "free"
    if seen.reasons:
        return "frozen"
    assert seen.sides or seen.row_index is not None
    return "protected"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.fault(42, 68)
def test_every_parameter_has_its_fate(name: str) -> None:
    builder, protected, frozen, free, exceptions = MODELS[name]
    model, run = builder()
    model.eval()
    found = captured(model, run).captured
    fates = {parameter: fate(seen) for parameter, seen in found.items()}
    counts = tuple(list(fates.values()).count(kind) for kind in ("protected", "frozen", "free"))
    assert counts == (protected, frozen, free)
    matrices = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)
    for path, module in model.named_modules():
        for leaf in ("weight", "in_proj_weight"):
            parameter = f"{path}.{leaf}"
            if (
                isinstance(module, matrices)
                and parameter in found
                and not (exceptions and re.search(exceptions, parameter))
            ):
                assert fates[parameter] == "protected", (parameter, found[parameter].reasons)


@pytest.mark.parametrize("name", ["open_clip ViT", "open_clip SigLIP", "transformers BERT", "transformers Llama"])
def test_rows_of_a_model_equal_forward_hooks(name: str) -> None:
    model, run = MODELS[name][0]()
    model.eval()
    rows: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, a, path=path: rows.__setitem__(path, a[0].detach()))
    with torch.no_grad():
        run()
    found = captured(model, run, rows="all").captured
    compared = 0
    for path, x in rows.items():
        seen = found.get(f"{path}.weight")
        if seen is not None and "right" in seen.sides:
            flat = x.reshape(-1, x.shape[-1]).double()
            expected, moment = flat.T @ flat, seen.sides["right"].matrix[0].double()
            assert (moment - expected).norm() <= 1e-5 * expected.norm(), path
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.fault(67)
def test_autocast_changes_no_fate(rows: str) -> None:
    model, run = MODELS["open_clip ViT"][0]()
    model.eval()
    plain = captured(model, run, rows=rows)
    with torch.autocast("cpu", torch.bfloat16):
        cast = captured(model, run, rows=rows)
    assert cast.relevance_note is None
    for name, seen in plain.captured.items():
        assert fate(seen) == fate(cast.captured[name])
        for side, moment in seen.sides.items():
            other = cast.captured[name].sides[side]
            assert moment.rows.tolist() == other.rows.tolist(), name
            assert (moment.matrix - other.matrix).norm() <= 0.1 * moment.matrix.norm()


@pytest.mark.parametrize("name", ["open_clip ViT", "open_clip CoCa", "transformers CLIP"])
@pytest.mark.fault(66)
def test_gradient_checkpointing_changes_no_rows(name: str) -> None:
    torch.manual_seed(1)
    model, run = MODELS[name][0]()
    model.eval()
    plain = captured(model, run, rows="all").captured
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable()
    found = captured(model, run, rows="all").captured
    for parameter, seen in plain.items():
        assert {s: m.rows.tolist() for s, m in seen.sides.items()} == {
            s: m.rows.tolist() for s, m in found[parameter].sides.items()
        }


def number(observer: Capture, name: str) -> int:
    return sum(int(m.rows.sum()) for m in observer.captured[name].sides.values())


def test_relevant_rows_fall_for_the_last_block_only() -> None:
    model, run = MODELS["open_clip ViT"][0]()
    every, relevant = captured(model, run, rows="all"), captured(model, run, rows="relevant")
    assert relevant.relevance_note is None
    for tower, tokens_kept in (("visual.transformer", 10), ("transformer", 14)):
        first, last = f"{tower}.resblocks.0.mlp.c_fc.weight", f"{tower}.resblocks.1.mlp.c_proj.weight"
        assert number(relevant, first) == tokens_kept
        assert number(relevant, last) == 2 < number(every, last)


@torch.no_grad()
def test_weights_may_move_wherever_no_relevant_row_points() -> None:
    model, run = MODELS["open_clip ViT"][0]()
    model.eval()
    found = captured(model, run, rows="relevant").captured
    parameters = dict(model.named_parameters())
    before, moved = run(), 0.0
    for name, seen in found.items():
        weight, layout = parameters[name], seen.layout
        if seen.reasons or layout is None:
            continue
        matrix = layout.to_matrix(weight)
        step = torch.randn_like(matrix) * matrix.std()
        for side, moment in seen.sides.items():
            values, vectors = torch.linalg.eigh(moment.matrix.double())
            free = (vectors * (values <= 1e-6 * values[:, -1:])[:, None]) @ vectors.mT
            step = step @ free.float() if side == "right" else free.float() @ step
        if seen.row_index is not None:
            step[:, seen.row_index] = 0
        moved += float(step.norm())
        weight += layout.from_matrix(step, weight.shape)
    assert moved > 1
    for old, new in zip(before, run(), strict=False):
        if isinstance(old, Tensor):
            assert torch.allclose(old, new, atol=1e-4)
