"""Models by name, small and with random weights: what one consolidation at the defaults makes of their numbers.

`python tests/capture/test_named_models.py` prints the table of `docs/guide.md`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from nullspace_optim import ConsolidationReport, Fate, NullSpaceOptimizer
from nullspace_optim.model.batches import tensors_in

T = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
GUIDE = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists()) / "docs" / "guide.md"
SAMPLES, LENGTH, WORDS = 64, 16, 200
BODY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**BODY, **ENDS, "vocab_size": WORDS, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
VISION = {"image_size": 32, "patch_size": 8}
TEXT = {**BODY, **ENDS, "vocab_size": WORDS, "max_position_embeddings": LENGTH}
Batch = dict[str, Tensor]


def text() -> Batch:
    return {"input_ids": torch.randint(3, WORDS, (SAMPLES, LENGTH))}


def images() -> Batch:
    return {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}


def decoder(name: str, **options: Any) -> tuple[Any, Batch]:
    return getattr(T, f"{name}ForCausalLM")(getattr(T, f"{name}Config")(**DECODER, **options)), text()


def siglip() -> tuple[Any, Batch]:
    config = T.SiglipConfig(text_config={**TEXT, "projection_size": 64}, vision_config={**BODY, **VISION})
    return T.SiglipModel(config), {**text(), **images()}


def clip() -> tuple[Any, Batch]:
    config = T.CLIPConfig(text_config=TEXT, vision_config={**BODY, **VISION}, projection_dim=64)
    return T.CLIPModel(config), {**text(), **images()}


def dino() -> tuple[Any, Batch]:
    body = {k: v for k, v in BODY.items() if k != "intermediate_size"}
    return T.Dinov2Model(T.Dinov2Config(**body, mlp_ratio=2, **VISION)), images()


def bert(**options: Any) -> Any:
    return T.BertConfig(**BODY, vocab_size=WORDS, **options)


MODELS: dict[str, Callable[[], tuple[Any, Batch]]] = {
    "Qwen3": lambda: decoder("Qwen3"),
    "Llama": lambda: decoder("Llama"),
    "Gemma2": lambda: decoder("Gemma2"),
    "Mistral": lambda: decoder("Mistral"),
    "Mixtral": lambda: decoder("Mixtral", num_local_experts=4),
    "BERT": lambda: (T.BertForSequenceClassification(bert()), text()),
    "MiniLM": lambda: (T.BertModel(bert(), add_pooling_layer=False), text()),
    "CLIP": clip,
    "SigLIP": siglip,
    "DINOv2": dino,
    "ViT": lambda: (T.ViTForImageClassification(T.ViTConfig(**BODY, **VISION)), images()),
}


def build(name: str) -> tuple[Any, Batch]:
    torch.manual_seed(0)
    try:
        return MODELS[name]()
    except AttributeError as error:
        pytest.skip(f"this transformers has no {name}: {error}")


def consolidated(name: str) -> tuple[Any, Batch, NullSpaceOptimizer, ConsolidationReport]:
    model, batch = build(name)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model)
    return model, batch, optimizer, optimizer.consolidate([batch], progress=False)


def cells(report: ConsolidationReport, optimizer: NullSpaceOptimizer) -> list[int]:
    """Per cent of the numbers that are protected, softly protected, frozen or full."""
    numbers = sum(p.numbers for p in report.parameters)
    soft = {n for n, b in optimizer.bases.items() if any(s.scale is not None for s in b.subspaces.values())}
    kept = [p for p in report.of(Fate.PROTECTED)]
    still = [*report.of(Fate.FROZEN), *report.of(Fate.FULL)]
    shares = [[p for p in kept if p.name not in soft], [p for p in kept if p.name in soft], still]
    return [round(100 * sum(p.numbers for p in part) / numbers) for part in shares]


def table() -> Iterator[str]:
    """Yield the lines of the table in the guide."""
    yield "| model | protected | soft | frozen or full |"
    yield "|---|---|---|---|"
    for name in MODELS:
        _, _, optimizer, report = consolidated(name)
        yield f"| {name} | {' | '.join(f'{share} %' for share in cells(report, optimizer))} |"


def trained(model: Any, optimizer: Any, batch: Batch, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(1)
    other = {
        key: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.randint(3, WORDS, value.shape, generator=generator)
        for key, value in batch.items()
    }
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = (t for t in tensors_in(model(**other)) if t.is_floating_point())
        sum(t.square().mean() for t in outputs if t.requires_grad).backward()
        optimizer.step()


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_the_guide_says_what_became_of_the_model(name: str) -> None:
    row = re.search(rf"(?m)^\| {name} \| (\d+) % \| (\d+) % \| (\d+) % \|$", GUIDE.read_text("utf-8"))
    assert row is not None
    model, batch, optimizer, report = consolidated(name)
    assert cells(report, optimizer) == pytest.approx([int(share) for share in row.groups()], abs=2)
    assert not [p for p in report.of(Fate.FREE) if p.name != "embeddings.mask_token"]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trained(model, optimizer, batch)
    assert optimizer.verify().ok and optimizer.verify().worst < 1e-5
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved and moved <= {p.name for p in report.of(Fate.PROTECTED)}


def test_a_frozen_product_of_all_experts_names_the_way_out() -> None:
    *_, report = consolidated("Mixtral")
    told = [p.reason for p in report.of(Fate.FROZEN) if ".experts." in p.name]
    if not any("_grouped_mm" in reason for reason in told):
        pytest.skip("this transformers multiplies experts in another way")
    assert all(reason.endswith("consolidate with model.set_experts_implementation('eager')") for reason in told)


def test_experts_that_are_consolidated_one_by_one_are_protected() -> None:
    model, batch = build("Mixtral")
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("experts are layers of their own in this transformers")
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model)
    model.set_experts_implementation("eager")
    report = optimizer.consolidate([batch], progress=False)
    model.set_experts_implementation("grouped_mm")
    experts = {p.name: model.get_parameter(p.name) for p in report.of(Fate.PROTECTED) if ".experts." in p.name}
    assert len(experts) == 4
    before = {name: weight.detach().clone() for name, weight in experts.items()}
    trained(model, optimizer, batch)
    assert optimizer.verify().ok
    assert all(not torch.equal(weight, before[name]) for name, weight in experts.items())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("\n".join(table()))
