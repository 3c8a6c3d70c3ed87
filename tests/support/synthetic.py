"""Tasks with a known answer: a linear layer must add `T x` for inputs from a subspace, with experts beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import IGSP, NullSpaceOptimizer

WIDTH, OUT, DIMENSIONS = 32, 16, 8


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self, width: int = WIDTH, out: int = OUT) -> None:
        super().__init__()
        self.fc = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class SyntheticTask:
    """Inputs from the `place`-th of four orthogonal subspaces; the wanted change of the output is one map there."""

    def __init__(self, place: int, seed: int = 5) -> None:
        axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).Q
        self.axes = axes[:, place * DIMENSIONS : (place + 1) * DIMENSIONS]
        self.map = torch.randn(OUT, DIMENSIONS, generator=torch.Generator().manual_seed(seed)) @ self.axes.T

    def inputs(self, seed: int, count: int = 64) -> Tensor:
        draw = torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
        return (draw + 1.5) @ self.axes.T

    def loader(self) -> list[Tensor]:
        return [self.inputs(1000 + number) for number in range(3)]


QUICK = {
    "target_modules": "fc", "rank": 8, "candidates": 2, "cap": 400, "window": 20, "on_cap": "keep", "strength": 0.5,
}  # fmt: skip


def make(seed: int = 0, **options: object) -> tuple[Layer, NullSpaceOptimizer]:
    torch.manual_seed(seed)
    model = Layer()
    base = AdamW(model.parameters(), lr=2e-4)
    return model, NullSpaceOptimizer(base, model, mode=IGSP(**{**QUICK, **options}))  # type: ignore[arg-type]


def loss_of(model: Layer, x: Tensor, task: SyntheticTask) -> Tensor:
    wanted = F.linear(x, model.fc.weight + task.map, model.fc.bias).detach()
    return (model(x) - wanted).square().mean()


def train(model: Layer, opt: NullSpaceOptimizer, task: SyntheticTask, steps: int, first: int = 0) -> float:
    for step in range(first, first + steps):
        loss = loss_of(model, task.inputs(step), task)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return float(loss.detach())


def small_llama(spread: float = 0.2) -> Any:
    """A Llama of two layers of width 32 and 48 tokens, in evaluation mode; its values have the deviation `spread`."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow, and most users of this file do without

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=spread,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
