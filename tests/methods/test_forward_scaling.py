"""Forward scaling (TRGP, CODE-CL): the formula, old tasks as they were, and a capture that sees through it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference_impl as slow
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import train

from nullspace_optim import Energy, Fate, NullSpaceOptimizer
from nullspace_optim.errors import CaptureError, OptionError
from nullspace_optim.methods import ForwardScaling, declare_rows, shared_directions, trust_regions
from nullspace_optim.policies import CODECL, TRGP


class Net(nn.Module):
    """A convolution, a grouped convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.grouped = nn.Conv2d(8, 8, 2, groups=2, bias=False)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.grouped(self.conv(images).relu()).relu().mean((2, 3)))


def task(seed: int, n: int = 12) -> Tensor:
    """Images `[n, 3, 6, 6]` of one colour each, in a plane of colours: rows of few dimensions meet every weight."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(n, 2, generator=generator) @ torch.randn(2, 3, generator=generator)
    return colours[:, :, None, None].expand(-1, -1, 6, 6).contiguous()


def protected(policy: Any, base: Any = None) -> tuple[Net, NullSpaceOptimizer]:
    model = Net()
    optimizer = NullSpaceOptimizer(
        base(model) if base else AdamW(model.parameters(), lr=0.01), model, policy=policy, project="update"
    )
    optimizer.consolidate([task(0)], name="a", progress=False)
    return model, optimizer


def first_gradient(optimizer: Any, model: nn.Module, inputs: Tensor) -> None:
    optimizer.zero_grad()
    (model(inputs) - 1).square().mean().backward()


def test_trust_regions_are_scored_by_the_first_gradient() -> None:
    model, optimizer = protected(TRGP(0.99))
    optimizer.consolidate([task(1)], name="b", progress=False)
    first_gradient(optimizer, model, task(0))
    regions = trust_regions(optimizer, threshold=0.0, most=2)
    for name, layout in (("conv.weight", 1), ("head.weight", 1), ("grouped.weight", 2)):
        basis = optimizer.bases[name]
        gradient = basis.layout.to_matrix(dict(model.named_parameters())[name].grad)
        part = basis.subspaces["right"]
        assert gradient.shape[0] == layout
        scores = {
            t: slow.protected_part(gradient, part.basis * part.members[i][:, None, :], "right").norm() / gradient.norm()
            for i, t in enumerate(("a", "b"))
        }
        ordered = [float(scores[t]) for t in regions[name]]
        assert len(ordered) == 2 and ordered[0] >= ordered[1] - 1e-5
        for threshold in (0.3, 0.9, 0.99):
            related = [t for t in scores if float(scores[t]) > threshold]
            assert sorted(trust_regions(optimizer, threshold, most=2).get(name, {})) == related
    assert len(trust_regions(optimizer, threshold=0.0, most=1)["head.weight"]) == 1
    assert trust_regions(optimizer, threshold=1.1) == {}


def test_the_effective_weight_is_the_papers_formula_and_starts_plain() -> None:
    model, optimizer = protected(TRGP(0.99))
    before = model(task(3)).detach()
    first_gradient(optimizer, model, task(0))
    scaling = ForwardScaling(optimizer)
    mixing = scaling.begin("b", trust_regions(optimizer, 0.0))
    assert torch.allclose(model(task(3)), before, atol=1e-6) and len(mixing) == 3
    plain = {
        name: getattr(model, name).parametrizations.weight.original.detach() for name in ("conv", "grouped", "head")
    }
    for mix in mixing:
        nn.init.normal_(mix)
    for name, weight in plain.items():
        basis = optimizer.bases[f"{name}.weight"]
        scaled = getattr(model, name).parametrizations.weight[0]
        (S, Q), matrix = next(iter(scaled.pairs("b"))), basis.layout.to_matrix(weight)
        expected = torch.stack([w + w @ s @ q @ s.T - w @ s @ s.T for w, s, q in zip(matrix, S, Q, strict=True)])
        assert torch.allclose(basis.layout.to_matrix(getattr(model, name).weight), expected, atol=1e-4)
    with scaling.task("a"):
        assert torch.allclose(model(task(3)), before, atol=1e-6)
    with scaling.task(None):
        assert torch.allclose(model(task(3)), before, atol=1e-6)
    assert not torch.allclose(model(task(3)), before, atol=1e-3)
    scaling.detach()
    assert torch.equal(model.conv.weight, plain["conv"]) and "conv.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("policy", [TRGP(0.99999), CODECL(aperture=50.0)], ids=["TRGP", "CODECL"])
def test_a_scaled_task_is_learnt_consolidated_and_leaves_old_tasks_alone(policy: Any) -> None:
    model, optimizer = protected(policy)
    outputs = model(task(0)).detach()
    new = task(0).flip(0)
    new[:6] = task(5)[:6]
    if isinstance(policy, TRGP):
        first_gradient(optimizer, model, new)
        directions = trust_regions(optimizer, 0.1)
    else:
        directions = shared_directions(optimizer, optimizer.measure([new], progress=False), threshold=0.1)
    assert "conv.weight" in directions
    scaling = ForwardScaling(optimizer)
    mixing = scaling.begin("b", directions)
    optimizer.add_param_group({"params": mixing, "weight_decay": 0.0})
    start = train(optimizer, model, 1, new)
    assert train(optimizer, model, 60, new) < 0.9 * start
    eyes = [torch.eye(mix.shape[-1]).expand_as(mix) for mix in mixing]
    assert all(float((mix - eye).norm()) > 1e-3 for mix, eye in zip(mixing, eyes, strict=True))
    report = optimizer.consolidate([new], name="b", progress=False)
    assert optimizer.bases["conv.weight"].fate is Fate.PROTECTED and optimizer.bases["conv.weight"].tasks == ("a", "b")
    assert not [p for p in report.parameters if p.fate is Fate.FROZEN]
    learnt = model(new).detach()
    third = scaling.begin("c", {})
    assert third == [] and not any(mix.requires_grad for mix in mixing)
    train(optimizer, model, 30, task(7))
    assert optimizer.verify().ok
    with scaling.task("b"):
        drift_b = float((model(new) - learnt).norm() / learnt.norm())
    with scaling.task("a"):
        drift_a = float((model(task(0)) - outputs).norm() / outputs.norm())
    if isinstance(policy, TRGP):  # rows are of rank two and three: the threshold keeps nearly all of them
        assert drift_a < 0.05 and drift_b < 0.05
    else:
        assert drift_a < 0.5 and drift_b < 0.5


def test_shared_directions_lead_the_and_of_both_conceptors() -> None:
    """Relation `tr(C and B) / tr C` and directions against Jaeger's formula, with adapted apertures and the floor."""
    model = nn.Linear(12, 4, bias=False)
    old, new = (torch.randn(40, 12) * torch.logspace(0.5, -1, 12)[torch.randperm(12)] for _ in range(2))
    policy = CODECL(aperture=1.5, gain=0.9)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=policy, project="update")
    optimizer.consolidate([old], progress=False)
    moments = optimizer.measure([new], progress=False)
    C, B = (slow.code_cl([rows], 1.5, 0.9, policy.floor) for rows in (old, new))
    both = slow.conceptor_and(C, B)
    related = float(both.trace() / C.trace())
    leading = torch.linalg.eigh((both + both.T) / 2)[1].flip(1)[:, :3]
    assert 0.05 < related < 0.95
    assert shared_directions(optimizer, moments, threshold=related + 1e-4) == {}
    found = shared_directions(optimizer, moments, threshold=related - 1e-4, most=3)["weight"]["shared"]
    assert found.shape == (1, 12, 3) and slow.principal_angles(found[0], leading).max() < 2e-3


def test_under_sgd_weights_move_as_if_the_scaling_were_differentiated() -> None:
    """The published forward differentiates `W S Q S^T` too; what that adds to the gradient is projected away."""
    model, optimizer = protected(TRGP(0.99), lambda m: SGD(m.parameters(), lr=0.1))
    first_gradient(optimizer, model, task(0))
    scaling = ForwardScaling(optimizer)
    for mix in scaling.begin("b", trust_regions(optimizer, 0.0)):
        nn.init.normal_(mix, std=0.5)
    part = optimizer.bases["head.weight"].subspaces["right"]
    weight = model.head.parametrizations.weight.original
    before = weight.detach().clone()
    live = before.clone().requires_grad_(True)
    S, Q = (t[0].detach() for t in next(iter(model.head.parametrizations.weight[0].pairs("b"))))
    features = model.grouped(model.conv(task(4)).relu()).relu().mean((2, 3)).detach()
    effective = live + live @ S @ Q @ S.T - live @ S @ S.T
    (nn.functional.linear(features, effective) - 1).square().mean().backward()
    gradient = live.grad - slow.protected_part(live.grad[None], part.basis, "right")[0].float()
    train(optimizer, model, 1, task(4))
    assert torch.allclose(weight.detach(), before - 0.1 * gradient, atol=1e-5)


def scaled_linear(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, ForwardScaling, list[nn.Parameter]]:
    """A linear layer 30 -> 20 with two related tasks of nine directions each."""
    model = nn.Sequential(nn.Linear(30, 20)).to(dtype)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=TRGP(0.99), project="update")
    optimizer.consolidate([torch.randn(40, 30, dtype=dtype)], name="a", progress=False)
    scaling = ForwardScaling(optimizer)
    spans = {name: torch.linalg.qr(torch.randn(30, 9))[0][None] for name in "ab"}
    mixing = scaling.begin("b", {"0.weight": spans})
    for mix in mixing:
        nn.init.normal_(mix)
    return model, scaling, mixing


def counted(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every scaled weight that is made."""
    scaled, made = model[0].parametrizations.weight[0], []
    whole = scaled._scaled
    monkeypatch.setattr(scaled, "_scaled", lambda *rest: made.append(1) or whole(*rest))
    return made


@pytest.mark.parametrize("rows", [(2,), (2, 3), ()], ids=str)
def test_few_rows_are_scaled_beside_the_weight_with_the_same_gradients(rows: Any, monkeypatch: Any) -> None:
    model, _, mixing = scaled_linear()
    layer, made = model[0], counted(model, monkeypatch)
    wanted = [*mixing, layer.parametrizations.weight.original, layer.bias]
    inputs = torch.randn(*rows, 30, dtype=torch.float64, requires_grad=True)
    one = layer(inputs)
    assert not made
    other = nn.functional.linear(inputs, layer.weight, layer.bias)
    assert len(made) == 1 and torch.allclose(one, other, atol=1e-12)
    gradients, expected = (torch.autograd.grad(y.square().sum(), [inputs, *wanted]) for y in (one, other))
    for gradient, twin in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, twin, rtol=1e-5, atol=1e-6)


def test_a_capture_sees_the_few_rows_themselves() -> None:
    """Not the scaled rows that meet the weight beside them."""
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=TRGP(0.99), project="update")
    optimizer.consolidate([torch.randn(40, 30)], name="a", progress=False)
    scaling = ForwardScaling(optimizer)
    for mix in scaling.begin("b", {"0.weight": {"a": torch.linalg.qr(torch.randn(30, 9))[0][None]}}):
        nn.init.normal_(mix)
    few = torch.randn(2, 30)
    moment = optimizer.measure([few], progress=False)["0.weight"]
    assert moment.rows.tolist() == [2] and torch.allclose(moment.matrix[0], few.T @ few, atol=1e-5)


def test_many_rows_and_readers_of_the_weight_meet_the_scaled_weight(monkeypatch: Any) -> None:
    model, scaling, _ = scaled_linear()
    layer, made = model[0], counted(model, monkeypatch)
    few, many = torch.randn(2, 30, dtype=torch.float64), torch.randn(50, 30, dtype=torch.float64)
    weight = layer.weight.detach()
    for inputs in (few, many):
        assert torch.allclose(layer(inputs), nn.functional.linear(inputs, weight, layer.bias), atol=1e-12)
    assert len(made) == 2  # read above, and for many rows
    assert torch.allclose(layer(input=few), nn.functional.linear(few, weight, layer.bias), atol=1e-12)
    with nn.utils.parametrize.cached():
        for _ in range(2):
            assert torch.allclose(layer(few), nn.functional.linear(few, weight, layer.bias), atol=1e-12)
        assert torch.equal(layer.weight, weight)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 29, dtype=torch.float64))
    assert torch.equal(layer.weight, weight)
    with scaling.task("a"):
        assert torch.allclose(layer(few), few @ layer.parametrizations.weight.original.T + layer.bias)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for mix in twin[0].parametrizations.weight[0].parameters():
            mix.zero_()
    assert not torch.allclose(twin(few), layer(few), atol=1e-3)
    assert torch.allclose(twin(few), nn.functional.linear(few, twin[0].weight, twin[0].bias), atol=1e-12)
    scaling.detach()
    assert torch.allclose(layer(few), few @ layer.weight.T + layer.bias)
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_rows_are_scaled_in_autocast_and_in_half_precision(monkeypatch: Any) -> None:
    model, _, mixing = scaled_linear(torch.float32)
    few = torch.randn(2, 30)
    exact = nn.functional.linear(few, model[0].weight, model[0].bias).detach()
    made = counted(model, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = model(few)
    assert lower.dtype == torch.bfloat16
    lower.float().sum().backward()
    assert all(mix.grad is not None and mix.grad.dtype == torch.float32 for mix in mixing)
    half = model.to(torch.bfloat16)(few.bfloat16())
    assert not made
    for output in (lower, half):
        assert output.dtype == torch.bfloat16
        assert float((output.float() - exact).norm() / exact.norm()) < 0.05


def test_checkpoints_carry_the_mixing_of_every_task() -> None:
    model, optimizer = protected(TRGP(0.99))
    fresh, other = protected(TRGP(0.99))
    first_gradient(optimizer, model, task(0))
    scaling = ForwardScaling(optimizer)
    for mix in scaling.begin("task/2 .é", trust_regions(optimizer, 0.0)):
        nn.init.normal_(mix)
    expected = model(task(3))
    again = ForwardScaling(other)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    with again.task("task/2 .é"):
        assert torch.allclose(fresh(task(3)), expected, atol=1e-6)


def test_weights_protected_later_are_scaled_by_group_and_taken_up_again() -> None:
    model, fresh = Net(), Net()
    optimizer, other = (
        NullSpaceOptimizer(AdamW(m.parameters()), m, policy=TRGP(0.99), uncovered="train", project="update")
        for m in (model, fresh)
    )
    optimizer.consolidate([task(0)], name="a", forward=model.conv, progress=False)
    scaling = ForwardScaling(optimizer)  # of the convolution alone
    optimizer.consolidate([task(1)], name="b", progress=False)
    first_gradient(optimizer, model, task(0))
    directions = trust_regions(optimizer, 0.0)
    mixing = scaling.begin("c", {name: directions[name] for name in ("conv.weight", "grouped.weight")})
    for mix in mixing:
        nn.init.normal_(mix)
    assert mixing[-1].shape[0] == 2
    weight = model.grouped.parametrizations.weight.original.detach()
    matrix, effective = (optimizer.bases["grouped.weight"].layout.to_matrix(w) for w in (weight, model.grouped.weight))
    for group in range(2):
        expected = matrix[group].clone()
        for span, mix in model.grouped.parametrizations.weight[0].pairs("c"):
            s, q = span[group], mix[group].detach()
            expected += matrix[group] @ s @ (q - torch.eye(len(q))) @ s.T
        assert torch.allclose(effective[group], expected, atol=1e-4)
    state, outputs = copy.deepcopy(model.state_dict()), model(task(3)).detach()
    with pytest.raises(OptionError, match=r"saved: 'conv.weight' is scaled there.* load its state first"):
        ForwardScaling(other, saved=state)
    other.load_state_dict(optimizer.state_dict())
    again = ForwardScaling(other)
    with pytest.raises(RuntimeError, match=r"head\.weight"):  # protected by now, and never scaled
        fresh.load_state_dict(state)
    again.detach()
    again = ForwardScaling(other, saved=state)
    fresh.load_state_dict(state)
    with again.task("c"):
        assert torch.allclose(fresh(task(3)), outputs, atol=1e-6)
    with again.task("a"):
        assert not torch.allclose(fresh(task(3)), outputs, atol=1e-3)


def test_a_model_that_is_one_matrix_is_taken_up() -> None:
    model, fresh = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    optimizer, other = (
        NullSpaceOptimizer(SGD(m.parameters(), lr=0.1), m, policy=TRGP(), project="update") for m in (model, fresh)
    )
    optimizer.consolidate([torch.randn(20, 2) @ torch.randn(2, 6)], name="a", progress=False)
    scaling = ForwardScaling(optimizer)
    span = optimizer.bases["weight"].subspaces["right"].basis
    nn.init.normal_(scaling.begin("b", {"weight": {"a": span}})[0])
    other.load_state_dict(optimizer.state_dict())
    ForwardScaling(other, saved=model.state_dict()).use("b")
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh(torch.ones(3, 6)), model(torch.ones(3, 6)), atol=1e-6)


def test_what_is_wrong_is_named() -> None:
    model, optimizer = protected(Energy())
    first_gradient(optimizer, model, task(0))
    assert trust_regions(optimizer) == {}
    with pytest.raises(OptionError, match=r"policy=CODECL"):
        shared_directions(optimizer, {})
    scaling = ForwardScaling(optimizer)
    scaling.begin("b", {"conv.weight": {"a": torch.eye(27)[None, :, :2]}})
    with pytest.raises(OptionError, match=r"begin\('b'\)"):
        scaling.begin("b", {})
    with pytest.raises(OptionError, match=r"no parameter 'lost.weight' in Net; it has conv"):
        scaling.begin("c", {"lost.weight": {"a": torch.eye(27)[None, :, :2]}})


# ---- measure and declare_rows


def test_measure_is_what_consolidate_would_see_and_keeps_nothing() -> None:
    model = Net()
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, project="update")
    moments = optimizer.measure([task(0), task(1)], progress=False)
    patches = nn.functional.unfold(torch.cat([task(0), task(1)]), 3).mT.reshape(-1, 27).double()
    assert torch.allclose(moments["conv.weight"].matrix[0].double(), patches.T @ patches, rtol=1e-4, atol=1e-2)
    assert moments["grouped.weight"].matrix.shape == (2, 16, 16) and not optimizer.bases
    assert int(moments["conv.weight"].rows) == len(patches)


class Prompted(nn.Module):
    """Prompts `[3, 6]` before the tokens; what reaches the output is the mean of all through a head."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.prompts, self.head, self.side = nn.Parameter(torch.randn(3, 6)), nn.Linear(6, 4), side

    def forward(self, tokens: Tensor) -> Tensor:
        joined = torch.cat([self.prompts.expand(len(tokens), -1, -1), tokens], dim=1)
        rows = tokens if self.side == "right" else tokens[..., :3]
        if self.side != "none":
            declare_rows(self.prompts, rows, self.side)
        return self.head(joined.mean(1))


@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_declared_rows_replace_what_the_capture_saw(side: Any) -> None:
    model, tokens = Prompted(side), torch.randn(2, 1, 6)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=Energy(0.9999), project="update")
    optimizer.consolidate([tokens], progress=False)
    basis = optimizer.bases["prompts"]
    if side == "none":
        assert (basis.fate is Fate.FROZEN and "cat" in basis.reason) or "expand" in basis.reason
        return
    assert basis.fate is Fate.PROTECTED and list(basis.subspaces) == [side] and basis.rank == 2
    before = model.prompts.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6)).square().sum().backward()
        optimizer.step()
    moved = model.prompts.detach() - before
    rows = tokens.reshape(-1, 6) if side == "right" else tokens.reshape(-1, 6)[:, :3]
    kept = moved @ rows.T if side == "right" else rows @ moved
    assert float(moved.norm()) > 1e-2 and float(kept.norm()) < 1e-4 * float(moved.norm())
    declare_rows(model.prompts, torch.zeros(1, 9))  # outside a capture nothing happens, not even a check


def test_declared_rows_that_do_not_fit_are_refused() -> None:
    model = Prompted("right")
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, project="update")
    with pytest.raises(CaptureError, match=r"rows \(2, 5\) do not fit a parameter \(3, 6\) on the left side"):
        optimizer.consolidate(
            [torch.randn(2, 1, 6)],
            forward=lambda tokens: (model(tokens), declare_rows(model.prompts, torch.zeros(2, 5), "left"))[0],
            progress=False,
        )
