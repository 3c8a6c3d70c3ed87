"""After `detach()` nothing acts on model and base again, and what needs experts is one clear error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from training import mlp

from nullspace_optim import IGSP, NullSpaceOptimizer
from nullspace_optim.errors import OptionError
from nullspace_optim.igsp import save_peft_adapter

OLD = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, Callable[[NullSpaceOptimizer], Any]] = {
    "reanchor": lambda opt: opt.reanchor(),
    "restore": lambda opt: opt.restore(),
    "verify": lambda opt: opt.verify([OLD]),
    "measure": lambda opt: opt.measure([OLD], progress=False),
    "preview": lambda opt: opt.preview([OLD], progress=False),
    "prune": lambda opt: opt.prune({"old": [OLD]}, bound=0.1, progress=False),
    "release": lambda opt: opt.release(next(iter(opt.bases))),
    "state_dict": lambda opt: opt.state_dict(),
}
EXPERTS: dict[str, Callable[[NullSpaceOptimizer], Any]] = {
    "status": lambda opt: opt.status(),
    "task": lambda opt: opt.task("old"),
    "regularization": lambda opt: opt.regularization(),
    "calibrate": lambda opt: opt.mode.calibrate([OLD], progress=False),  # type: ignore[attr-defined]
    "consolidate": lambda opt: opt.consolidate([OLD], progress=False),
    "checkpoint": lambda opt: opt.checkpoint().state_dict(),
    "adapter": lambda opt: save_peft_adapter(opt, "old", "/dev/null/none"),
    **{name: CALLS[name] for name in ("reanchor", "restore", "verify", "measure", "state_dict")},
}


def finished(mode: Any = "null-space") -> tuple[nn.Module, NullSpaceOptimizer]:
    """Return a model and its optimizer after one task, `old`."""
    torch.manual_seed(0)
    model = nn.Sequential(*mlp(24, 32, 4), nn.BatchNorm1d(4))
    kind = SGD if mode == "null-space" else AdamW
    opt = NullSpaceOptimizer(kind(model.parameters(), lr=1e-2), model, mode=mode)
    step(model, opt)
    opt.consolidate([OLD], name="old", progress=False)
    return model, opt


def step(model: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    model(OLD).square().sum().backward()
    opt.step()


def hooks(model: nn.Module, opt: NullSpaceOptimizer) -> int:
    """Count the hooks on parameters, modules and base optimizers."""
    on_parameters = [p._post_accumulate_grad_hooks or {} for p in model.parameters()]
    on_modules = [table for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks)]
    on_bases = [t for b in opt._core.bases for t in (b._optimizer_step_pre_hooks, b._optimizer_step_post_hooks)]
    return sum(map(len, [*on_parameters, *on_modules, *on_bases]))


@pytest.mark.parametrize("call", CALLS)
def test_no_hook_comes_back_after_a_detach(call: str) -> None:
    model, opt = finished()
    opt.detach()
    assert hooks(model, opt) == 0
    CALLS[call](opt)
    assert hooks(model, opt) == 0
    NullSpaceOptimizer(AdamW(model.parameters()), model, mode=IGSP(target_modules=["0"], rank=2))  # nothing is claimed


@pytest.mark.parametrize("mode", ["null-space", IGSP(target_modules=["0"], rank=2)], ids=["null-space", "igsp"])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deep", "pickle"])
def test_a_copy_of_a_detached_optimizer_is_detached(mode: Any, make: Any) -> None:
    model, opt = finished(mode)
    opt.detach()
    twin, other = make((model, opt))
    assert hooks(twin, other) == 0
    before = twin[0].weight.detach().clone()
    step(twin, other)
    assert not torch.equal(twin[0].weight, before) and hooks(twin, other) == 0


def test_a_detached_copy_claims_nothing() -> None:
    twin, other = copy.deepcopy(finished())
    other.detach()
    assert hooks(twin, other) == 0
    NullSpaceOptimizer(AdamW(twin.parameters()), twin, mode=IGSP(target_modules=["0"], rank=2))


@pytest.mark.parametrize("call", EXPERTS)
def test_what_needs_experts_after_a_detach_is_one_error(call: str) -> None:
    model, opt = finished(IGSP(target_modules=["0"], rank=2))
    opt.detach()
    with pytest.raises(OptionError, match=r"detach\(\) took the experts away.*make a new NullSpaceOptimizer"):
        EXPERTS[call](opt)
    assert hooks(model, opt) == 0


def test_experts_can_be_saved_after_a_detach_and_go_on_elsewhere(tmp_path: Path) -> None:
    model, opt = finished(IGSP(target_modules=["0"], rank=2))
    with torch.no_grad(), opt.task("old"):
        expected = model.eval()(OLD)
    opt.detach()
    opt.save(tmp_path / "experts.safetensors")
    new = NullSpaceOptimizer(AdamW(model.parameters()), model, mode=IGSP(target_modules=["0"], rank=2))
    new.load(tmp_path / "experts.safetensors")
    with torch.no_grad(), new.task("old"):
        torch.testing.assert_close(model(OLD), expected, rtol=0, atol=0)
