"""The plain loop, and the pages that need no framework: Schedule-Free, torchao, torch.compile."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from two_tasks import build_net, data, example, holding, loader, same_weights, wrap

from nullspace_optim import NullSpaceOptimizer, NumericalRank

PAGES = {"plain_loop.md": "torch", "compile.md": "torch", "schedule_free.md": "schedulefree", "torchao.md": "torchao"}


def train(model: nn.Module, optimizer: Optimizer, task: int, epochs: int = 5) -> None:
    for _ in range(epochs):
        for inputs, labels in loader(task):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_two_tasks_saved_in_the_middle_and_resumed_bitwise(tmp_path: Path) -> None:
    model = build_net()
    optimizer = wrap(model)
    train(model, optimizer, 0)
    optimizer.consolidate(loader(0), progress=False)
    train(model, optimizer, 1, 2)
    other = build_net()
    resumed = wrap(other)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for its, one in ((model, optimizer), (other, resumed)):
        with holding(its, lambda its=its: its(data(0).tensors[0]), optimizer=lambda one=one: one):
            train(its, one, 1)
    assert same_weights(model, other)


def test_basis_file_and_weights_alone_protect_a_new_run(tmp_path: Path) -> None:
    model = build_net()
    optimizer = wrap(model)
    train(model, optimizer, 0)
    optimizer.consolidate(loader(0), progress=False)
    optimizer.save(tmp_path / "bases.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build_net()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    later = wrap(other)
    later.load(tmp_path / "bases.safetensors")
    with holding(other, lambda: other(data(0).tensors[0]), optimizer=lambda: later):
        train(other, later, 1)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantized_states_save_and_resume_protected(name: str) -> None:
    """torchao keeps its states in 8 or 4 bits where a parameter has at least 4096 entries."""
    module = pytest.importorskip("torchao.optim")

    def build() -> tuple[nn.Module, NullSpaceOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 192), nn.Tanh(), nn.Linear(192, 8))
        base = getattr(module, name)(model.parameters(), lr=3e-3)
        return model, NullSpaceOptimizer(base, model, policy=NumericalRank())

    with torch.compiler.set_stance("force_eager"):  # its update is compiled otherwise: the same numbers, much later
        model, optimizer = build()
        train(model, optimizer, 0)
        assert type(optimizer.state[model[0].weight]["exp_avg"]) is not torch.Tensor
        optimizer.consolidate(loader(0), progress=False)
        other, resumed = build()
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        for its, one in ((model, optimizer), (other, resumed)):
            with holding(its, lambda its=its: its(data(0).tensors[0]), optimizer=lambda one=one: one):
                train(its, one, 1)
        assert same_weights(model, other)


@pytest.mark.parametrize("page", PAGES)
def test_the_example_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(PAGES[page])
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    stance = "force_eager" if page == "torchao.md" else "default"
    with torch.compiler.set_stance(stance):
        exec(compile(example(page), page, "exec"), {"__name__": "__main__"})
