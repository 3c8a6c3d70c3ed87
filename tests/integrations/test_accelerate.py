"""Hugging Face Accelerate: what `prepare` makes of us still protects; saved state, clipping, accumulation, bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from two_tasks import build_net, data, example, holding, loader, same_weights, wrap

from nullspace_optim import NullSpaceOptimizer, unwrap
from nullspace_optim.errors import OptionError

accelerate = pytest.importorskip("accelerate")


def prepared(precision: str = "no", every: int = 1) -> tuple[Any, Any, Any, Any]:
    """An accelerator and what it made of model, optimizer and a scheduler."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=every)
    model = build_net()
    optimizer = wrap(model)
    return accelerator, *accelerator.prepare(model, optimizer, lr_scheduler.StepLR(optimizer, 3, 0.9))


def train(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, task: int, epochs: int = 5) -> None:
    batches = accelerator.prepare(loader(task))
    for _ in range(epochs):
        for inputs, labels in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize(("precision", "every"), [("no", 1), ("no", 2), ("bf16", 1)])
@pytest.mark.fault(36)
def test_two_tasks(precision: str, every: int) -> None:
    accelerator, model, optimizer, scheduler = prepared(precision, every)
    train(accelerator, model, optimizer, scheduler, 0)
    unwrap(optimizer).consolidate(loader(0), progress=False)
    old = data(0).tensors[0]
    limit = 2**-8 if precision == "bf16" else 1e-5  # the rounding of a bfloat16 forward pass
    with holding(model, lambda: model(old), limit, lambda: unwrap(optimizer)):
        train(accelerator, model, optimizer, scheduler, 1)


def test_saved_state_resumes_bitwise_and_protected(tmp_path: Path) -> None:
    first = prepared()
    train(*first, 0)
    unwrap(first[2]).consolidate(loader(0), progress=False)
    train(*first, 1)
    first[0].save_state(str(tmp_path))
    train(*first, 1)
    second = prepared()
    second[0].load_state(str(tmp_path))
    with holding(second[1], lambda: second[1](data(0).tensors[0]), optimizer=lambda: unwrap(second[2])):
        train(*second, 1)
    assert same_weights(first[1], second[1])


def test_preparing_again_adds_no_task_and_changes_nothing() -> None:
    """`prepare` loads the optimizer's own state dict into it."""
    model = build_net()
    optimizer = wrap(model)
    optimizer.consolidate(loader(0), progress=False)
    before = {name: basis.U.clone() for name, basis in optimizer.bases.items() if basis.subspaces}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    assert len(optimizer._core.store.tasks) == 1
    assert all(torch.equal(optimizer.bases[name].U, kept) for name, kept in before.items())


def test_wrapping_what_accelerate_prepared_is_refused() -> None:
    _, model, optimizer, _ = prepared()
    unwrap(optimizer).detach()
    with pytest.raises(OptionError, match=r"step.. runs no step hooks|NullSpaceOptimizer already"):
        NullSpaceOptimizer(optimizer, model)


def test_nothing_to_unwrap_is_an_error_with_the_way_out() -> None:
    with pytest.raises(OptionError, match="wrap the base optimizer before"):
        unwrap(torch.optim.AdamW(build_net().parameters()))


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    exec(compile(example("accelerate.md"), "accelerate.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "state").is_dir()
