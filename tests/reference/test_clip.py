from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

from reference.benchmarks.workload import SMALLEST
from reference.config import Config
from reference.errors import ExperimentError
from reference.training.clip import give_attention_its_layout, load_clip
from reference.training.compact import CONFIG, TABLE, WEIGHTS, load_compact


@pytest.mark.parametrize("frozen", [False, True])
def test_self_attention_is_one_product_and_comes_to_the_same_numbers(frozen: bool) -> None:
    """With frozen weights torch multiplies the transposed input of the projection sample by sample (`bmm`)."""
    torch.manual_seed(0)
    block = nn.MultiheadAttention(16, 2, batch_first=True).requires_grad_(not frozen)
    inputs = torch.randn(8, 5, 16, requires_grad=True)

    def run() -> tuple[torch.Tensor, set[tuple[int, ...]]]:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            out = block(inputs, inputs, inputs, need_weights=False)[0]
        products = {tuple(event.input_shapes[1]) for event in seen.events() or [] if event.name == "aten::bmm"}
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs)
        return torch.stack([out, gradient]), products

    plain, before = run()
    give_attention_its_layout(block)
    laid_out, after = run()
    torch.testing.assert_close(laid_out, plain, rtol=1e-5, atol=1e-6)
    assert ((5, 16, 48) in before) == frozen and (5, 16, 48) not in after


def test_cross_attention_is_left_alone() -> None:
    torch.manual_seed(0)
    block = nn.MultiheadAttention(16, 2, batch_first=True)
    queries, keys = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    expected = block(queries, keys, keys)[0]
    give_attention_its_layout(block)
    assert torch.equal(block(queries, keys, keys)[0], expected)
    assert torch.equal(block(query=queries, key=keys, value=keys)[0], expected)


def test_a_compact_file_holds_the_model_and_half_of_one_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALLEST)
    rows = torch.tensor([3, 7, 40])
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    state |= {TABLE: state[TABLE][rows].contiguous(), "token_rows": rows}
    save_file(state, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": SMALLEST, "preprocess_cfg": {}}))
    loaded = load_compact(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        kept = torch.zeros(len(value), dtype=torch.bool) if name == TABLE else torch.ones((), dtype=torch.bool)
        if name == TABLE:
            kept[rows] = True
            assert not loaded[name][~kept].any()
        torch.testing.assert_close(loaded[name][kept], value.half().float()[kept], rtol=0, atol=0)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExperimentError, match="cannot be read together"):
        load_clip(Config("mini", "o", data_root="d", model=str(tmp_path)))
