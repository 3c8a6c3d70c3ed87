"""The same promises on a convolutional network with BatchNorm trained in train mode, and on a two-block CLIP."""

from __future__ import annotations

import inspect
from typing import Any

import open_clip
import pytest
import torch
from cases import BASIC, layer_rows, span_drift, take_steps
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import relative_drift

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank, clip_forward

STEPS = 500
DECAY = 1e-3
RATES: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.05},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.02},
    "Adagrad": {"lr": 0.01},
    "Adam": {"lr": 0.002},
    "AdamW": {"lr": 0.003, "weight_decay": 0.01, "foreach": True},
    "AdamW-fused": {"lr": 0.003, "weight_decay": 0.01, "fused": True},
    "Adamax": {"lr": 0.003},
    "LBFGS": {"max_iter": 2, "history_size": 5, "line_search_fn": "strong_wolfe"},
    "Muon": {"lr": 0.003, "weight_decay": 0.01},
    "NAdam": {"lr": 0.002},
    "RAdam": {"lr": 0.002},
    "RMSprop": {"lr": 0.001},
    "Rprop": {"lr": 0.001, "etas": (0.5, 1.1), "step_sizes": (1e-6, 3e-4)},
    "SGD": {"lr": 0.02, "momentum": 0.9},
    "SparseAdam": {"lr": 0.003},
}
"""Rates at which each class learns both models, by hand; decay is `DECAY` wherever the class has one."""
EVERY = pytest.mark.parametrize("name", [name for name in RATES if hasattr(torch.optim, name.split("-")[0])])


def build(name: str, model: nn.Module) -> Optimizer | list[Optimizer]:
    """Return the optimizer for all of `model`; AdamW takes what the class itself cannot."""
    kind = getattr(torch.optim, name.split("-")[0])
    decay = {"weight_decay": DECAY} if "weight_decay" in inspect.signature(kind).parameters else {}
    parameters = list(model.parameters())
    own = {"Muon": [p for p in parameters if p.ndim == 2], "SparseAdam": _sparse(model)}.get(name, parameters)
    optimizer: Optimizer = kind(own, **{**decay, **RATES[name]})
    rest = [p for p in parameters if all(p is not other for other in own)]
    return [optimizer, AdamW(rest, lr=0.003, weight_decay=0.01)] if rest else optimizer


def _sparse(model: nn.Module) -> list[nn.Parameter]:
    """The tables whose gradients are sparse."""
    return [part.weight for part in model.modules() if isinstance(part, nn.Embedding) and part.sparse]


def test_the_table_names_every_optimizer_of_torch() -> None:
    assert {case.name for case in BASIC if case.exists} <= {name.split("-")[0] for name in RATES}


class Convolutions(nn.Module):
    """`[n, 3, 8, 8]` to `[n, 5]`; one image gives 4 and 1 rows of 48 and 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 2)
        self.norm2 = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.first(images)).relu()
        logits: Tensor = self.head(self.norm2(self.second(hidden)).relu().flatten(1))
        return logits


@EVERY
def test_batch_norm_network_in_train_mode(name: str) -> None:
    if name == "SparseAdam":
        pytest.skip("SparseAdam itself takes sparse gradients only; a convolutional network has none")
    model, old, images = Convolutions(), torch.randn(3, 3, 8, 8), torch.randn(24, 3, 8, 8)
    labels = torch.randint(0, 5, (24,))
    for _ in range(5):
        model(torch.randn(16, 3, 8, 8) + 1)  # running statistics that differ from the new task's
    optimizer = NullSpaceOptimizer(build(name, model), model, policy=NumericalRank())
    optimizer.consolidate([old], progress=False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    rows, outputs = layer_rows(model, old), model.eval()(old).detach()
    model.train()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    start = loss().item()
    take_steps(optimizer, loss, STEPS, closure=name == "LBFGS")
    assert loss().item() <= start / 2
    assert model.norm.training
    assert span_drift(model, before, rows) <= 1e-5
    assert relative_drift(model.eval()(old).detach(), outputs) <= 1e-5
    assert optimizer.verify().ok, str(optimizer.verify())


def test_without_frozen_statistics_the_same_network_forgets() -> None:
    model, old = Convolutions(), torch.randn(3, 3, 8, 8)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.0), model, policy=NumericalRank(), norm_stats="train")
    optimizer.consolidate([old], progress=False)
    outputs = model.eval()(old).detach()
    model.train()(torch.randn(16, 3, 8, 8) + 1)
    assert relative_drift(model.eval()(old).detach(), outputs) > 1e-2
    assert optimizer.verify().buffers == (
        "norm.running_mean",
        "norm.running_var",
        "norm2.running_mean",
        "norm2.running_var",
    )


def tiny_clip(sparse: bool = False) -> open_clip.CLIP:
    """Return a CLIP with two blocks a tower, width 32; `sparse` gradients of its token embedding if asked for."""
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(32, vision, text)
    model.token_embedding.sparse = sparse
    return model


@EVERY
@pytest.mark.parametrize("steps", [100, pytest.param(STEPS, marks=pytest.mark.nightly)])
def test_two_block_clip(name: str, steps: int) -> None:
    model, old, prompt = tiny_clip(sparse=name == "SparseAdam"), torch.randn(2, 3, 16, 16), torch.randint(1, 64, (1, 8))
    images, prompts = torch.randn(8, 3, 16, 16), torch.randint(1, 64, (8, 8))
    optimizer = NullSpaceOptimizer(build(name, model), model, policy=NumericalRank())
    report = optimizer.consolidate([(old, 0)], forward=clip_forward(model, prompt), progress=False)
    assert not report.of(Fate.FREE)
    assert {basis.fate for key, basis in optimizer.bases.items() if key.endswith("proj")} == {Fate.PROTECTED}
    before = {key: basis.U.double() for key, basis in optimizer.bases.items() if basis.fate is Fate.PROTECTED}
    with torch.no_grad():
        outputs = [model.encode_image(old), model.encode_text(prompt)]

    def loss() -> Tensor:
        picture, words, scale = model(images, prompts)
        return nn.functional.cross_entropy(scale * picture @ words.T, torch.arange(8))

    start = loss().item()
    take_steps(optimizer, loss, steps, closure=name == "LBFGS")
    assert loss().item() <= start / 2
    assert before
    assert optimizer.verify().worst <= 1e-5
    with torch.no_grad():
        assert relative_drift(model.encode_image(old), outputs[0]) <= 1e-5
        assert relative_drift(model.encode_text(prompt), outputs[1]) <= 1e-5
