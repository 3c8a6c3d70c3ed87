"""`restore`: what is kept comes back by hand, whatever moved it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import OLD, mlp, relative_drift, train, wrap

from nullspace_optim import SGP, NullSpaceOptimizer, StaleAnchorError

MOST = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))


def protected(model: nn.Module, base: Any, rows: Tensor = OLD, **options: Any) -> NullSpaceOptimizer:
    optimizer = wrap(model, base, **options)
    optimizer.consolidate([rows], progress=False)
    return optimizer


@pytest.mark.fault(130)
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
@pytest.mark.parametrize(
    "options", [{}, {"bias": "joint"}, {"precision": "fast"}, {"policy": SGP(0.9)}, {"project": "gradient"}], ids=str
)
@pytest.mark.parametrize("rows", [OLD, MOST], ids=["few kept", "most kept"])
def test_restore_puts_kept_directions_back_and_leaves_free_ones(options: dict[str, Any], rows: Tensor) -> None:
    model = mlp()
    optimizer = protected(model, AdamW(model.parameters(), lr=1e-3), rows, **options)
    before = model(rows).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    free = model[0].weight.detach().clone()
    optimizer.restore()
    assert optimizer.verify().ok
    assert "policy" in options or relative_drift(model(rows), before) <= 1e-5
    span = torch.linalg.qr(rows.T).Q
    free -= free @ span @ span.T
    assert "policy" in options or relative_drift(model[0].weight - model[0].weight @ span @ span.T, free) <= 1e-5
    train(optimizer, model)


@pytest.mark.fault(130)
def test_restore_cannot_mend_weights_that_are_not_finite_and_says_so() -> None:
    model = mlp()
    optimizer = protected(model, AdamW(model.parameters()))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(StaleAnchorError, match=r"'0\.weight' holds values that are not finite.*checkpoint"):
        optimizer.restore()


def test_restore_brings_frozen_buffers_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optimizer = protected(model, SGD(model.parameters(), lr=0.1))
    before = model.eval()(OLD).detach()
    model[1].running_mean.add_(1)
    assert not optimizer.verify().ok
    optimizer.restore()
    assert optimizer.verify().ok and relative_drift(model.eval()(OLD), before) <= 1e-5


def test_restore_also_corrects_the_weights_that_schedule_free_keeps() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = mlp()
    base = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    base.train()
    optimizer = protected(model, base)
    train(optimizer, model, 5)
    before = model(OLD).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
            if "z" in base.state[parameter]:
                base.state[parameter]["z"].add_(1.0)
    optimizer.restore()
    assert relative_drift(model(OLD), before) <= 1e-5
    base.eval()
    assert relative_drift(model(OLD), before) <= 1e-5
