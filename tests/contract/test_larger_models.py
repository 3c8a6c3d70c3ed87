"""The same promises on a convolutional network with BatchNorm trained in train mode, and on a two-block CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import open_clip
import pytest
import torch
from cases import layer_rows, relative, span_drift, take_steps
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer, RMSprop

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank, clip_forward

Build = Callable[[Iterable[Tensor]], "Optimizer | list[Optimizer]"]


def _muon(parameters: Iterable[Tensor]) -> list[Optimizer]:
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.003, weight_decay=0.01), AdamW(rest, lr=0.003, weight_decay=0.01)]


OPTIMIZERS: dict[str, tuple[Build, int]] = {
    "AdamW-fused": (lambda p: AdamW(p, lr=0.003, weight_decay=0.01, fused=True), 500),
    "AdamW-foreach": (lambda p: AdamW(p, lr=0.003, weight_decay=0.01, foreach=True), 200),
    "SGD-momentum-decay": (lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3), 200),
    "RMSprop": (lambda p: RMSprop(p, lr=0.001, weight_decay=1e-3), 200),
    "Adafactor": (lambda p: Adafactor(p, lr=0.02, weight_decay=1e-3), 200),
    "LBFGS": (lambda p: LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"), 30),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon-and-AdamW"] = (_muon, 200)
SEVERAL = pytest.mark.parametrize("name", OPTIMIZERS)


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


@SEVERAL
def test_batch_norm_network_in_train_mode(name: str) -> None:
    build, steps = OPTIMIZERS[name]
    model, old, images = Convolutions(), torch.randn(3, 3, 8, 8), torch.randn(24, 3, 8, 8)
    labels = torch.randint(0, 5, (24,))
    for _ in range(5):
        model(torch.randn(16, 3, 8, 8) + 1)  # running statistics that differ from the new task's
    optimizer = NullSpaceOptimizer(build(model.parameters()), model, policy=NumericalRank())
    optimizer.consolidate([old], progress=False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    rows, outputs = layer_rows(model, old), model.eval()(old).detach()
    model.train()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    start = loss().item()
    take_steps(optimizer, loss, steps, closure="LBFGS" in name)
    assert loss().item() <= start / 2
    assert model.norm.training
    assert span_drift(model, before, rows) <= 1e-5
    assert relative(model.eval()(old).detach(), outputs) <= 1e-5
    assert optimizer.verify().ok, str(optimizer.verify())


def test_without_frozen_statistics_the_same_network_forgets() -> None:
    model, old = Convolutions(), torch.randn(3, 3, 8, 8)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.0), model, policy=NumericalRank(), norm_stats="train")
    optimizer.consolidate([old], progress=False)
    outputs = model.eval()(old).detach()
    model.train()(torch.randn(16, 3, 8, 8) + 1)
    assert relative(model.eval()(old).detach(), outputs) > 1e-2
    assert optimizer.verify().buffers == (
        "norm.running_mean",
        "norm.running_var",
        "norm2.running_mean",
        "norm2.running_var",
    )


def tiny_clip() -> open_clip.CLIP:
    """Return a CLIP with two blocks a tower, width 32."""
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(32, vision, text)


@SEVERAL
def test_two_block_clip(name: str) -> None:
    build, steps = OPTIMIZERS[name]
    model, old, prompt = tiny_clip(), torch.randn(2, 3, 16, 16), torch.randint(1, 64, (1, 8))
    images, prompts = torch.randn(8, 3, 16, 16), torch.randint(1, 64, (8, 8))
    optimizer = NullSpaceOptimizer(build(model.parameters()), model, policy=NumericalRank())
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
    take_steps(optimizer, loss, steps, closure="LBFGS" in name)
    assert loss().item() <= start / 2
    assert before
    assert optimizer.verify().worst <= 1e-5
    with torch.no_grad():
        assert relative(model.encode_image(old), outputs[0]) <= 1e-5
        assert relative(model.encode_text(prompt), outputs[1]) <= 1e-5
