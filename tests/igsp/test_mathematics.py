"""The pure parts against slow twins and exact answers."""

from __future__ import annotations

import pytest
import torch
from reference_impl import orthogonality_error

import nullspace_optim.igsp.moe.convergence as convergence
import nullspace_optim.igsp.moe.pruning as pruning
import nullspace_optim.igsp.moe.regularization as regularizer
import nullspace_optim.igsp.moe.router as router
from nullspace_optim import IGSP
from nullspace_optim.errors import PruningError
from nullspace_optim.igsp.moe.convergence import ConvergenceMonitor
from nullspace_optim.igsp.moe.experts import (
    Expert,
    emitted_rows,
    extend_basis,
    fresh_directions,
    mix,
    second_moment,
    span_rows,
    stack,
)


def random_stack(
    kind: str, experts: int = 5, rank: int = 3, inputs: int = 7, outputs: int = 4
) -> dict[str, torch.Tensor]:
    parts = {"down": torch.randn(experts, rank, inputs), "up": torch.randn(experts, rank, outputs)}
    if kind == "bottleneck":
        parts |= {"down_bias": torch.randn(experts, rank), "up_bias": torch.randn(experts, outputs)}
    return parts


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("shape", [(6, 7), (6, 5, 7), (6, 2, 3, 7)])
def test_mix_equals_one_expert_and_one_sample_at_a_time(kind: str, shape: tuple[int, ...]) -> None:
    x, parts = torch.randn(shape), random_stack(kind)
    choice = router.top_k(torch.randn(6, 5), 2)
    expected = torch.zeros(*shape[:-1], 4)
    for sample in range(6):
        for expert, gate in zip(choice.experts[sample].tolist(), choice.gates[sample].tolist()):
            hidden = x[sample] @ parts["down"][expert].T
            if kind == "bottleneck":
                hidden = torch.relu(hidden + parts["down_bias"][expert])
            out = hidden @ parts["up"][expert]
            expected[sample] += 0.5 * gate * (out + parts["up_bias"][expert] if kind == "bottleneck" else out)
    torch.testing.assert_close(mix(x, parts, choice, 0.5), expected)


def test_mix_does_not_notice_experts_that_are_not_chosen() -> None:
    x, parts = torch.randn(6, 5, 7), random_stack("lora")
    choice = router.top_k(torch.randn(6, 5), 2)
    more = {part: torch.cat([value, torch.randn_like(value)]) for part, value in parts.items()}
    assert torch.equal(mix(x, parts, choice, 1.0), mix(x, more, choice, 1.0))


def test_a_new_expert_changes_nothing_and_its_rows_leave_the_history_alone() -> None:
    basis = torch.linalg.qr(torch.randn(20, 9)).Q
    downs = fresh_directions(basis, 4, 4, torch.Generator().manual_seed(0))
    assert downs.shape == (2, 4, 20), "only two experts of rank 4 fit beside 9 of 20 directions"
    rows = downs.flatten(0, 1)
    assert float((rows @ basis).abs().max()) < 1e-6
    assert orthogonality_error(rows.T) < 1e-6
    assert torch.count_nonzero(Expert(downs[0].clone(), 3, "bottleneck").up) == 0
    assert fresh_directions(torch.eye(20)[:, :18], 4, 4, torch.Generator()).shape == (0, 4, 20)


def test_extended_holds_old_and_new_directions_and_keeps_the_old_columns() -> None:
    basis = torch.linalg.qr(torch.randn(12, 3)).Q
    rows = torch.cat([torch.randn(2, 12), basis.T[:1] * 3])
    grown = extend_basis(basis, rows)
    assert grown.shape == (12, 5), "a direction that is there already is not added"
    assert torch.equal(grown[:, :3], basis) and orthogonality_error(grown) < 1e-6
    torch.testing.assert_close(rows - rows @ grown @ grown.T, torch.zeros_like(rows), atol=1e-5, rtol=0)
    assert extend_basis(torch.eye(12), rows).shape == (12, 12)
    assert extend_basis(basis, torch.zeros(3, 12)) is basis


def test_stack_puts_history_first() -> None:
    history = random_stack("lora", experts=2)
    expert = Expert(torch.randn(3, 7), 4, "lora")
    joined = stack([expert], "lora", history)
    assert torch.equal(joined["down"][:2], history["down"]) and torch.equal(joined["down"][2], expert.down)


def test_mass_is_the_mean_price_of_the_candidates() -> None:
    scores = torch.randn(9, 5)
    flat, graded = regularizer.prices(2, "flat"), regularizer.prices(2, "graded")
    assert flat.tolist() == [1.0, 1.0] and graded.tolist() == [0.5, 1.0]
    for price in (flat, graded):
        expected = sum(float(torch.softmax(row, 0)[3:] @ price) for row in scores) / 9
        assert float(regularizer.mass(scores, price)) == pytest.approx(expected, rel=1e-6)


def test_candidates_and_history_start_alike_however_many_there_are() -> None:
    for history, candidates in ((1, 4), (4, 4), (40, 4), (40, 1)):
        shift = router.head_start(history, candidates, 0.7)
        scores = 0.7 * torch.randn(40_000, history + candidates, generator=torch.Generator().manual_seed(0))
        scores[:, history:] += shift
        best = float((scores.argmax(dim=1) >= history).float().mean())
        mean = scores[:, history:].amax(1).mean() - scores[:, :history].amax(1).mean()
        assert abs(float(mean)) < 0.03 and 0.4 < best < 0.6, (history, candidates)
    assert router.head_start(40, 4, 0.0) == 0.0


@pytest.mark.parametrize("energy", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_spanned_holds_the_energy_with_fewest_directions_and_old_columns(energy: float) -> None:
    basis = torch.linalg.qr(torch.randn(12, 2)).Q
    rows = torch.randn(30, 12) * torch.logspace(0, -3, 12)
    grown = span_rows(basis, rows, energy)
    assert torch.equal(grown[:, :2], basis) and orthogonality_error(grown) < 1e-6
    share = float((rows @ grown).square().sum() / rows.square().sum())
    assert share >= energy - 1e-6
    if grown.shape[1] > 2:
        fewer = grown[:, :-1]
        assert float((rows @ fewer).square().sum() / rows.square().sum()) < energy + 1e-6
    assert energy < 1.0 or grown.shape == (12, 12)


def test_geom_equals_the_dense_formula_and_vanishes_inside_the_history() -> None:
    down, up, history = torch.randn(3, 4, 9), torch.randn(3, 4, 6), torch.linalg.qr(torch.randn(6, 2)).Q
    outside = torch.eye(6) - history @ history.T
    products = [u.T @ d for u, d in zip(up, down)]
    expected = sum(float((outside @ p).square().sum() / p.square().sum()) for p in products)
    assert float(regularizer.geom(down, up, history)) == pytest.approx(expected, rel=1e-5)
    assert float(regularizer.geom(down, up @ history @ history.T, history)) < 1e-9
    assert float(regularizer.geom(down, torch.zeros_like(up), history)) == 0.0


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("shape", [(30, 7), (6, 5, 7)])
def test_function_equals_the_dense_formula_with_its_gradients(kind: str, shape: tuple[int, ...]) -> None:
    x, parts = torch.randn(shape) * torch.logspace(0, -2, 7), random_stack(kind, outputs=6)
    history = torch.linalg.qr(torch.randn(6, 2)).Q
    found, wanted = [{part: value.clone().requires_grad_() for part, value in parts.items()} for _ in range(2)]
    dense, tokens = torch.zeros(()), x.reshape(-1, 7)
    for expert in range(5):
        of = {part: value[expert] for part, value in wanted.items()}
        hidden = tokens @ of["down"].T
        outputs = hidden @ of["up"]
        if kind == "bottleneck":
            outputs = torch.relu(hidden + of["down_bias"]) @ of["up"] + of["up_bias"]
        dense = dense + (outputs @ (torch.eye(6) - history @ history.T)).square().sum() / outputs.square().sum()
    penalty = regularizer.function(x, found, history)
    torch.testing.assert_close(penalty, dense)
    for part in parts:
        (one,), (other,) = (
            torch.autograd.grad(s, [p[part]], retain_graph=True) for s, p in ((penalty, found), (dense, wanted))
        )
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    if kind == "lora":
        second = tokens.T @ tokens
        assert float(penalty.detach()) == pytest.approx(sum(
            float(torch.trace(d @ second @ d.T @ u @ (torch.eye(6) - history @ history.T) @ u.T))
            / float(torch.trace(d @ second @ d.T @ u @ u.T))
            for d, u in zip(parts["down"], parts["up"])
        ), rel=1e-4)  # fmt: skip
        inside = {**parts, "up": parts["up"] @ history @ history.T}
        assert float(regularizer.function(x, inside, history)) < 1e-9
        assert float(regularizer.function(x, {**parts, "up": torch.zeros_like(parts["up"])}, history)) == 0.0


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_rows_of_what_experts_put_out_have_the_second_moment_of_all_outputs(kind: str) -> None:
    x, parts = torch.randn(40, 3, 7), random_stack(kind)
    whole = torch.zeros(4, 4)
    for expert in range(5):
        hidden = x.reshape(-1, 7) @ parts["down"][expert].T
        outputs = hidden @ parts["up"][expert]
        if kind == "bottleneck":
            outputs = torch.relu(hidden + parts["down_bias"][expert]) @ parts["up"][expert] + parts["up_bias"][expert]
        whole += outputs.T @ outputs
    moment = sum((second_moment(part, parts) for part in x.split(9)), torch.zeros(()))
    rows = emitted_rows(moment, parts).float()
    torch.testing.assert_close(rows.T @ rows, whole, rtol=1e-4, atol=1e-2)


def test_top_k_takes_all_experts_if_there_are_fewer() -> None:
    choice = router.top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    assert choice.experts.tolist() == [[1, 2]]
    torch.testing.assert_close(choice.gates, torch.softmax(torch.tensor([[3.0, 2.0]]), dim=1))
    assert router.top_k(torch.tensor([[5.0]]), 2).gates.tolist() == [[1.0]]


def test_the_gate_input_is_one_vector_a_sample_with_a_constant() -> None:
    x = torch.randn(4, 6, 9, dtype=torch.bfloat16)
    mean = router.gate_input(x)
    torch.testing.assert_close(mean[:, :-1], x.float().mean(dim=1))
    assert mean[:, -1].tolist() == [3.0] * 4 and mean.dtype == torch.float32
    torch.testing.assert_close(3 * router.gate_input(x, "width"), mean)
    alone = torch.cat([router.gate_input(sample[None]) for sample in x])
    torch.testing.assert_close(alone, mean)


def test_noise_is_the_same_when_a_forward_is_computed_twice() -> None:
    scores = torch.zeros(3, 4)
    assert torch.equal(router.noise(scores, 0.7, 0, 1, 2), router.noise(scores, 0.7, 0, 1, 2))
    assert not torch.equal(router.noise(scores, 0.7, 0, 1, 2), router.noise(scores, 0.7, 0, 1, 3))


def test_agreement_is_the_jaccard_index_of_top_k_sets() -> None:
    now = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    then = torch.tensor([[2.0, 3.0, 1.0, 0.0], [3.0, 0.0, 2.0, 1.0]])
    assert float(convergence.agreement(now, then, 2)) == pytest.approx((1 + 1 / 3) / 2)


def test_divergence_is_kullback_leibler() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    expected = 0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0))
    assert float(convergence.divergence(p, q)) == pytest.approx(float(expected), rel=1e-4)
    assert float(convergence.divergence(p, p)) == 0.0


@pytest.mark.parametrize(("experts", "samples"), [(3, 60), (5, 200), (8, 1000)])
def test_chance_divergence_is_that_of_two_samples_of_one_router(experts: int, samples: int) -> None:
    torch.manual_seed(experts)
    use = torch.softmax(torch.randn(experts, dtype=torch.float64), dim=0)
    drawn = torch.multinomial(use.expand(4000, -1), samples, replacement=True)
    counts = torch.nn.functional.one_hot(drawn, experts).sum(dim=1) / samples
    found = torch.stack([convergence.divergence(now, then) for now, then in zip(counts[::2], counts[1::2])])
    assert float(found.mean()) == pytest.approx(convergence.chance_divergence(experts, samples), rel=0.25)


def test_a_router_that_stands_still_has_converged_a_drifting_one_has_not() -> None:
    """Windows of 3 steps of 16 other samples each; four experts, decisions nearly one-hot."""
    torch.manual_seed(0)
    weight = 8 * torch.nn.functional.normalize(torch.randn(4, 9), dim=1)
    for drift, settled in ((0.0, True), (6.0, False)):
        watch, moved = ConvergenceMonitor(IGSP(window=3), weight), weight.clone()
        for step in range(1, 31):
            inputs = torch.randn(16, 9)
            scores = inputs @ moved.T
            watch.take(inputs, scores, router.top_k(scores, 2))
            watch.absorb()
            moved += drift * torch.randn(4, 9)
            if step % 3 == 0:
                watch.judge(moved, step)
        assert watch.done is settled
        if settled:
            strict = convergence.Convergence()
            for step, jaccard, kl in watch.convergence.curve:
                strict.judge(step, jaccard, kl, 1e-3)
            assert strict.at is None  # without what chance does it would never have passed


def test_convergence_needs_agreeing_windows_in_a_row() -> None:
    state = convergence.Convergence()
    for step, (jaccard, kl) in enumerate(
        [(1.0, 1e-5), (0.9, 1e-5), (1.0, 1e-5), (1.0, 1e-2), (1.0, 1e-5), (1.0, 1e-5)]
    ):
        state.judge(20 * step, jaccard, kl, 1e-3)
    assert state.at == 100 and len(state.curve) == 6
    assert convergence.Convergence.of(state.plain) == state


def test_pruning_keeps_what_carries_flow() -> None:
    flow = torch.tensor([0.6, 0.3, 0.08, 0.02])
    assert pruning.keep_above(flow, None, "layer", 4).tolist() == [True, True, False, False]
    assert pruning.keep_above(flow, 0.05, "layer", 2).tolist() == [True, True, True, False]
    mixed = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.05, 0.15])
    assert pruning.keep_above(mixed, None, "layer", 1).tolist() == [True, True, True, True, False, False]
    assert pruning.keep_above(mixed, None, "layer", 2).tolist() == [True] * 4 + [False, False]
    many = torch.cat([torch.full((40,), 0.022), torch.tensor([0.1, 0.02])])
    assert pruning.keep_above(many, None, "layer", 2)[40:].tolist() == [False, False], "not by the size of the history"


@pytest.mark.fault(112)
def test_pruning_never_removes_the_last_expert() -> None:
    with pytest.raises(PruningError, match=r"'visual\.mlp': pruning below 0\.9 would remove the last expert.*0\.6"):
        pruning.keep_above(torch.tensor([0.6, 0.4]), 0.9, "visual.mlp", 1)
    draw = torch.Generator().manual_seed(0)
    for size in range(1, 12):
        for candidates in range(size + 1):
            for power in (0.0, 1.0, 9.0):
                flow = torch.rand(size, generator=draw) ** power
                assert pruning.keep_above(flow / flow.sum(), None, "x", candidates).any()


def test_a_step_moves_logits_of_wide_layers_as_far_as_of_narrow_ones() -> None:
    assert router.projection(32, 0) is None
    draw = router.projection(400, 3)
    assert draw is not None and draw.shape == (400, 32) and torch.equal(draw, router.projection(400, 3))
    assert not torch.equal(draw, router.projection(400, 4))
    x = torch.randn(500, 6, 400)
    found = router.gate_input(x, draw=draw)
    torch.testing.assert_close(found[:, :-1], x.mean(dim=1) @ draw)
    assert found.shape == (500, 33) and bool((found[:, -1] == 32**0.5).all())
    lengths = found[:, :-1].norm(dim=1) / x.mean(dim=1).norm(dim=1)
    assert float(lengths.mean()) / (400 / 32) ** 0.5 == pytest.approx(1.0, abs=0.1)
    step = [rows.abs().sum(dim=1).mean() for rows in (found[:, :-1], x.mean(dim=1))]  # of Adam at rate 1
    assert float(step[0] / step[1]) == pytest.approx(1.0, abs=0.1)
