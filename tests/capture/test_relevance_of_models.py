"""Rank of the last MLP of models that pool one token: rows of the others are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nullspace_optim import ConsolidationReport, NullSpaceOptimizer, NumericalRank
from nullspace_optim.capture.capture import Capture
from nullspace_optim.settings import Settings


def all_rows_notes(report: ConsolidationReport) -> list[str]:
    return [note for note in report.notes if "all rows" in note]


def rows_and_note(model: nn.Module, run: Callable[[], Any], name: str) -> tuple[int, str | None]:
    observer = Capture(dict(model.named_parameters()), Settings(), buffers=dict(model.named_buffers()))
    with observer:
        observer.batch(run)
    return int(observer.captured[name].sides["right"].rows.sum()), observer.relevance_note


def ranks(model: nn.Module, batch: Any, forward: Any, names: Sequence[str]) -> list[int]:
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, policy=NumericalRank())
    report = optimizer.consolidate([batch], forward=forward, progress=False)
    assert not all_rows_notes(report)
    return [optimizer.bases[name].rank for name in names]


def texts(batch: int, length: int = 12) -> Tensor:
    text = torch.randint(1, 58, (batch, length))
    text[:, 6], text[:, 7:] = 59, 0
    return text


def test_the_last_mlps_of_clip_meet_the_pooled_tokens_only() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    shape = {"width": 32, "heads": 2, "layers": 2, "context_length": 12, "vocab_size": 60}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=shape).eval()
    images, text = torch.randn(3, 3, 32, 32), texts(4)
    names = [f"{tower}resblocks.1.mlp.c_proj.weight" for tower in ("visual.transformer.", "transformer.")]
    assert ranks(model, images, lambda x: model(x, text), names) == [3, 4]
    first = "transformer.resblocks.0.mlp.c_fc.weight"  # of four texts, seven tokens up to the pooled one
    assert rows_and_note(model, lambda: model(images, text), first) == (28, None)


def test_the_last_mlp_of_a_vision_transformer_meets_the_pooled_token_only() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    names = ["blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight", "blocks.0.mlp.fc1.weight"]
    assert ranks(model, torch.randn(3, 3, 32, 32), None, names) == [3, 3, 15]


def test_the_last_mlp_of_bert_meets_the_pooled_token_only() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=16, num_labels=3, **sizes)
    model, text = transformers.BertForSequenceClassification(config).eval(), texts(3)
    layer = "bert.encoder.layer.{}.output.dense.weight"
    forward = lambda x: model(input_ids=x, attention_mask=(x > 0).long()).logits  # noqa: E731
    assert ranks(model, text, forward, [layer.format(1), layer.format(0)]) == [3, 21]
