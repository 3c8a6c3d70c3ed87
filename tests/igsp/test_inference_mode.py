"""`torch.inference_mode` around evaluation, consolidation, construction and loading: training goes on afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import QUICK, Layer, SyntheticTask, make, train
from torch import Tensor
from torch.optim import AdamW

from nullspace_optim import IGSP, NullSpaceOptimizer

CHOICES = [
    {},
    {"kind": "bottleneck", "router_after": "train"},
    {"router": "shared"},
    {"regularization": "both", "orthogonal": "structural"},
]


def evaluate(model: Layer, opt: NullSpaceOptimizer, x: Tensor) -> None:
    """Run every routing in inference mode, as training and as evaluation."""
    for training in (True, False):
        model.train(training)
        with torch.inference_mode():
            inside = x.clone()  # an inference tensor itself
            for inputs in (x, inside):
                model(inputs)
                for name in ("one", "never", None, ["one", None] * (len(x) // 2)):
                    with opt.task(name):
                        model(inputs)
            opt.status()
    model.train()


@pytest.mark.parametrize("options", CHOICES, ids=["default", "bottleneck", "shared", "structural"])
def test_what_is_evaluated_between_steps_leaves_nothing_behind(options: dict[str, object]) -> None:
    finals = []
    for watched in (False, True):
        model, opt = make(**{"cap": 12, "window": 4, "on_cap": "prune", **options})
        for place, name in ((0, "one"), (2, "two")):
            for step in range(20):
                train(model, opt, SyntheticTask(place), 1, first=step)
                if watched and step % 3 == 1:
                    evaluate(model, opt, SyntheticTask(place).inputs(500 + step, 8))
            with torch.inference_mode(watched):
                opt.consolidate(SyntheticTask(place).loader(), name=name, progress=False)
        train(model, opt, SyntheticTask(1), 15)
        assert not any(value.is_inference() for value in (*model.parameters(), *model.buffers()))
        finals.append({name: value.detach().clone() for name, value in model.named_parameters()})
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


@pytest.mark.parametrize("load", ["nothing", "file", "state dict"])
def test_an_optimizer_built_and_loaded_in_inference_mode_trains(load: str, tmp_path: Path) -> None:
    model, opt = make(cap=8, on_cap="prune")
    train(model, opt, SyntheticTask(0), 20)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    train(model, opt, SyntheticTask(2), 3)
    opt.save(tmp_path / "file")
    twin = Layer()
    twin.load_state_dict(model.state_dict())
    with torch.inference_mode():
        mode = IGSP(**{**QUICK, "cap": 8, "on_cap": "prune"})  # type: ignore[arg-type]
        other = NullSpaceOptimizer(AdamW(twin.parameters(), lr=2e-4), twin, mode=mode)
        if load == "file":
            other.load(tmp_path / "file")
        elif load == "state dict":
            other.load_state_dict(opt.state_dict())
    assert not any(value.is_inference() for value in (*twin.parameters(), *twin.buffers()))
    train(twin, other, SyntheticTask(2), 15, first=3)
    assert other.status().phase == 2 and not other.verify().broken
