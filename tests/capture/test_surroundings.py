"""Around the rows: joint biases, checkpointing, compiled models, gradient modes; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capturing import Holds, W, capture, close, gram
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nullspace_optim.capture.capture import Capture
from nullspace_optim.covariance.accumulator import ParameterStatistics
from nullspace_optim.errors import CaptureError, OptionError
from nullspace_optim.settings import Settings

# --- biases ----------------------------------------------------------------------------------------------------------


def test_a_bias_is_frozen_with_its_reason() -> None:
    assert capture(nn.Linear(4, 5), W(9, 4)).captured["bias"].reasons == ("read by aten.addmm as bias",)


@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.parametrize("kind", ["linear", "noncontiguous", "grouped", "transposed"])
def test_joint_rows_end_in_one(kind: str, rows: str) -> None:
    x = W(3, 4, 7)
    layers: dict[str, nn.Module] = {
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(28, 5)),
        "noncontiguous": nn.Linear(4, 5),
        "grouped": nn.Conv1d(4, 6, 3, groups=2),
        "transposed": nn.ConvTranspose1d(4, 6, 3, groups=2),
    }
    model = layers[kind]
    run = (lambda x: model(x.mT)) if kind == "noncontiguous" else model
    observer = capture(model, x, run=run, rows=rows, bias="joint")
    plain = capture(model, x, run=run, rows=rows)
    weight, bias = list(observer.captured)
    seen = observer.captured[weight]
    moment, without = seen.sides["right"].matrix, plain.captured[weight].sides["right"].matrix
    assert seen.bias == bias and observer.captured[bias] == ParameterStatistics(met=True)
    assert close(moment[:, :-1, :-1], without.double())
    assert moment[:, -1, -1].tolist() == seen.sides["right"].rows.float().tolist()


def test_a_bias_with_two_weights_is_not_joint() -> None:
    model = Holds(
        lambda x, w, v, b: functional.linear(x, w, b) + functional.linear(x, v, b), w=W(5, 4), v=W(5, 4), b=W(5)
    )
    x = W(9, 4)
    found = capture(model, x, bias="joint").captured
    assert found["w"].bias is None and close(found["w"].sides["right"].matrix[0], gram(x))
    assert found["b"].reasons == ("read by aten.addmm as bias",)
    assert found["w"].sides["right"] is found["v"].sides["right"]


def test_a_weight_used_once_without_its_bias_is_not_joint() -> None:
    model = Holds(lambda x, w, b: functional.linear(x, w, b) + functional.linear(x * 2, w), w=W(5, 4), b=W(5))
    found = capture(model, W(9, 4), bias="joint").captured
    assert found["w"].bias is None and found["b"].reasons == ("read by aten.addmm as bias",)


def test_packed_attention_biases_are_joint() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = W(2, 5, 8)
    found = capture(attention, x, run=lambda x: attention(x, x, x, need_weights=False), bias="joint").captured
    assert found["in_proj_weight"].bias == "in_proj_bias" and found["out_proj.weight"].bias == "out_proj.bias"
    assert close(found["in_proj_weight"].sides["right"].matrix[0, :-1, :-1], gram(x))


# --- surroundings ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(68)
def test_encoder_fast_path_is_off_and_restored() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    found = capture(layer, W(2, 5, 8)).captured
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert all(found[n].sides for n in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"))


@pytest.mark.fault(66)
def test_activation_checkpointing_counts_rows_once() -> None:
    inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    x = W(9, 4).requires_grad_()
    run = lambda x: checkpoint(inner, x, use_reentrant=False)  # noqa: E731
    observer = capture(inner, x, run=run, rows="relevant")
    assert observer.relevance_note is None
    assert observer.captured["0.weight"].sides["right"].rows.tolist() == [9]


def test_reentrant_checkpointing_counts_the_rows_that_are_read() -> None:
    inner, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), W(9, 4).requires_grad_()
    for rows in (9, 3):
        observer = capture(
            inner, x, run=lambda x, n=rows: checkpoint(inner, x + 0, use_reentrant=True)[:n], rows="relevant"
        )
        assert observer.relevance_note is None
        assert close(observer.captured["0.weight"].sides["right"].matrix[0], gram(x[:rows]))


@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.fault(65)
def test_compiled_models_run_eagerly(rows: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    compiled = torch.compile(model, backend="eager")
    x = W(9, 4)
    compiled(x)
    observer = capture(model, x, run=compiled, rows=rows)
    assert close(observer.captured["0.weight"].sides["right"].matrix[0], gram(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.fault(75, 76)
def test_the_callers_grad_mode_does_not_matter(context: Callable[[], Any], rows: str) -> None:
    model, x = nn.Linear(4, 5), W(9, 4)
    with context():
        inside = torch.randn(9, 4)
        observer = capture(model, x, inside, rows=rows)
    assert close(observer.captured["weight"].sides["right"].matrix[0], gram(x) + gram(inside.clone()))


def test_nothing_is_left_on_model_or_random_state() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), W(9, 4)
    model[0].weight.grad = torch.ones(5, 4)
    model[2].weight.requires_grad_(False)
    before = torch.get_rng_state()
    observer = Capture(dict(model.named_parameters()), Settings())
    outputs = observer.batch(lambda: {"y": model(x), "more": [model(x)]})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight.grad, torch.ones(5, 4)) and model[2].weight.grad is None
    assert not model[2].weight.requires_grad and model[0].weight.requires_grad
    assert not outputs["y"].requires_grad and not outputs["more"][0].requires_grad


@pytest.mark.fault(46)
def test_non_finite_rows_name_the_parameter_and_the_batch() -> None:
    bad = W(9, 4)
    bad[3, 1] = float("nan")
    with pytest.raises(CaptureError, match=r"batch 1: non-finite input rows of '0.weight'"):
        capture(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)), W(9, 4), bad)


def test_buffers_that_were_read_are_listed() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    assert capture(model, W(2, 4, 5)).buffers_read == {"1.running_mean", "1.running_var"}


def test_observe_sees_products_in_execution_order() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))
    seen: list[tuple[str, tuple[int, ...]]] = []
    observer = Capture(
        dict(model.named_parameters()),
        Settings(rows="all"),
        observe=lambda name, output: seen.append((name, tuple(output.shape))),
    )
    observer.batch(lambda: model(torch.tensor([1, 2])))
    assert seen == [("0.weight", (2, 4)), ("1.weight", (2, 5)), ("2.weight", (2, 3))]
    assert observer.order == ["0.weight", "1.weight", "2.weight"]


def test_unknown_options_are_refused() -> None:
    with pytest.raises(OptionError, match="relevant"):
        Settings(rows="some")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="joint"):
        Settings(bias="some")  # type: ignore[arg-type]
