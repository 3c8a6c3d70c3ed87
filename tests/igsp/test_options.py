"""Options through the mode: each changes what its line in `IGSP` says, by the amount it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from synthetic import QUICK, WIDTH, Layer, SyntheticTask, loss_of, make, train
from torch import Tensor
from torch.optim import AdamW

from nullspace_optim import IGSP, NullSpaceOptimizer


def finished(**options: object) -> tuple[torch.nn.Module, NullSpaceOptimizer]:
    """Return a model with one finished task, of which all candidates are kept."""
    model, opt = make(candidates=3, cap=10, on_cap="keep", window=50, rank=4, **options)
    train(model, opt, SyntheticTask(0), 30)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    return model, opt


def expert_outputs(opt: NullSpaceOptimizer, x: Tensor) -> Tensor:
    """Return `B A x` of each expert, `[n, E, o]`."""
    history = opt.mode.experts.layers[0].history  # type: ignore[attr-defined]
    return torch.einsum("nd,erd,ero->neo", x, history["down"], history["up"])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_sample_uses_so_many_experts_as_top_k(top_k: int) -> None:
    model, opt = finished(top_k=top_k)
    x = SyntheticTask(0).inputs(7)
    record = opt.mode.experts.layers[0].record(0)  # type: ignore[attr-defined]
    logits = torch.cat([x, torch.full((len(x), 1), WIDTH**0.5)], dim=1) @ record.weight.T
    kept = logits >= logits.topk(top_k).values[:, -1:]
    gates = torch.softmax(logits.masked_fill(~kept, -torch.inf), dim=1)
    assert bool(((gates > 0).sum(1) <= top_k).all())
    with torch.no_grad(), opt.task("one"):
        added = model(x) - F.linear(x, model.fc.weight, model.fc.bias)
    assert float(added.norm()) > 0.1
    torch.testing.assert_close(added, torch.einsum("ne,neo->no", gates, expert_outputs(opt, x)), rtol=1e-4, atol=1e-5)


def test_scale_multiplies_what_experts_add() -> None:
    model, opt = finished(scale=0.3, top_k=1)
    x = SyntheticTask(0).inputs(7)
    with torch.no_grad(), opt.task("one"):
        added = model(x) - F.linear(x, model.fc.weight, model.fc.bias)
    errors = (0.3 * expert_outputs(opt, x) - added.unsqueeze(1)).norm(dim=2).amin(dim=1)
    assert float(added.norm()) > 0.1 and float(errors.max()) < 1e-4


def test_a_gate_scaled_by_the_width_has_a_gradient_smaller_by_its_root() -> None:
    gradients = []
    for gate_scale in ("none", "width"):
        model, opt = make(gate_scale=gate_scale, noise=0.0, warmup=0, strength=0.0)
        layer = opt.mode.experts.layers[0]  # type: ignore[attr-defined]
        with torch.no_grad():
            for expert in layer.fresh:
                expert.up.normal_(generator=torch.Generator().manual_seed(0))
        loss_of(model, SyntheticTask(0).inputs(0), SyntheticTask(0)).backward()
        gradients.append(layer.router.grad)
    assert float(gradients[0].norm()) > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1] * WIDTH**0.5)


@pytest.mark.parametrize(("price", "first", "mean"), [("graded", 0.75, 0.75), ("flat", 0.0, 1.0)])
def test_the_price_of_candidates_is_graded_or_flat(price: str, first: float, mean: float) -> None:
    """Two candidates cost 1/2 and 1, or 1 each; where routing is in equal parts, times their share of the experts."""
    model, opt = make(price=price, noise=0.0, warmup=0, cap=4, strength=0.2)
    model(SyntheticTask(0).inputs(0))
    assert float(opt.regularization().detach()) == pytest.approx(0.2 * first)
    train(model, opt, SyntheticTask(0), 30)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    model(SyntheticTask(0).inputs(0))
    old = opt.mode.experts.layers[0].size  # type: ignore[attr-defined]
    assert old > 0
    assert float(opt.regularization().detach()) == pytest.approx(0.2 * mean * 2 / (old + 2))


def test_the_seed_draws_experts_and_noise() -> None:
    downs, routers = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = Layer()
        opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=2e-4), model, mode=IGSP(**{**QUICK, "seed": seed}))
        layer = opt.mode.experts.layers[0]  # type: ignore[attr-defined]
        downs.append(layer.fresh[0].down.detach().clone())
        train(model, opt, SyntheticTask(0), 3)
        routers.append(layer.watch.flow.clone())
    assert torch.equal(downs[0], downs[1]) and torch.equal(routers[0], routers[1])
    assert not torch.equal(downs[0], downs[2]) and not torch.equal(routers[0], routers[2])
