"""The two phases with tasks whose answer is known, and what must hold around them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from synthetic import QUICK, Layer, SyntheticTask, make, train
from torch import nn
from torch.optim import AdamW

from nullspace_optim import IGSP, ConsolidationError, NullSpaceOptimizer
from nullspace_optim.errors import OptionError, PruningError
from nullspace_optim.igsp import ExpertReport


@pytest.fixture(scope="module")
def story() -> dict[str, object]:
    """Task 1; task 2 in its subspace; task 3 orthogonal to it. Reports, drifts and outputs."""
    model, opt = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    facts: dict[str, object] = {"model": model, "opt": opt, "before": before, "reports": [], "drift": [], "outputs": {}}
    for name, place in (("one", 0), ("two", 0), ("three", 2)):
        task = SyntheticTask(place)
        loss = train(model, opt, task, 300)
        assert loss < 1e-3 and opt.status().phase == 2
        facts["drift"].append(opt.verify().kept)  # type: ignore[attr-defined]
        report = opt.consolidate(task.loader(), name=name, progress=False)
        facts["reports"].append(report)  # type: ignore[attr-defined]
        with torch.no_grad(), opt.task(name):
            facts["outputs"][name] = model(task.inputs(7))  # type: ignore[index]
    return facts


def layer_of(report: ExpertReport):  # type: ignore[no-untyped-def]
    assert isinstance(report, ExpertReport)
    return report.layers[0]


def test_a_task_inside_the_history_prunes_all_candidates_for_one_router(story) -> None:  # type: ignore[no-untyped-def]
    one, two, _ = (layer_of(report) for report in story["reports"])
    assert one.kept == 1 and one.pruned == 1
    assert two.kept == 0 and two.pruned == 2 and two.reused == 1 and two.reuse > 0.9
    first, second, _ = story["reports"]
    assert second.experts == first.experts, "no new expert is stored"
    assert second.routers - first.routers == 33 + 1 + 64 + 1 + 2 + 1, (
        "weight, number, centre and owner, spread and limit"
    )
    assert second.trainable.second == 33, "phase 2 trains the router alone"


def test_an_orthogonal_task_keeps_candidates(story) -> None:  # type: ignore[no-untyped-def]
    three = layer_of(story["reports"][2])
    assert three.kept == 1 and three.reuse < 0.1
    assert story["reports"][2].experts == 2 * story["reports"][0].experts


def test_phase_two_is_orthogonal_to_the_historical_subspace_under_adamw(story) -> None:  # type: ignore[no-untyped-def]
    first, second, third = story["drift"]
    assert first == {} and second == {}, "no history, no survivors"
    assert set(third) == {"igsp.fc.fresh.0.down"} and 0 < third["igsp.fc.fresh.0.down"] <= 1e-5


def test_old_outputs_are_bitwise_unchanged(story) -> None:  # type: ignore[no-untyped-def]
    model, opt = story["model"], story["opt"]
    task = SyntheticTask(1, seed=9)
    train(model, opt, task, 150)
    opt.consolidate(task.loader(), name="four", progress=False)
    for name, place in (("one", 0), ("two", 0), ("three", 2)):
        with torch.no_grad(), opt.task(name):
            assert torch.equal(model(SyntheticTask(place).inputs(7)), story["outputs"][name]), name
    for name, value in story["before"].items():
        assert torch.equal(model.state_dict()[name], value), name
    assert list(model.state_dict()) == list(story["before"])


def test_verify_finds_the_samples_of_each_task(story) -> None:  # type: ignore[no-untyped-def]
    report = story["opt"].verify(SyntheticTask(0).loader())
    assert report.drift("one") == 0.0 and report.drift("two") == 0.0 and "three" in report.missing


def test_samples_are_routed_without_a_task_id(story) -> None:  # type: ignore[no-untyped-def]
    model, opt = story["model"], story["opt"]
    one, three = SyntheticTask(0).inputs(7), SyntheticTask(2).inputs(7)
    mixed = torch.stack([one, three], dim=1).reshape(-1, one.shape[1])
    with torch.no_grad(), opt.task(None):
        together = model(mixed)
        alone = torch.cat([model(row[None]) for row in mixed])
        stranger = model(torch.full((1, 32), 50.0))
    torch.testing.assert_close(together, alone)
    expected = torch.stack([story["outputs"]["two"], story["outputs"]["three"]], dim=1).reshape(together.shape)
    close = (together - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)
    assert float(close.float().mean()) > 0.9
    assert torch.equal(stranger, nn.functional.linear(torch.full((1, 32), 50.0), model.fc.weight, model.fc.bias))


def test_a_task_without_router_runs_the_plain_backbone(story) -> None:  # type: ignore[no-untyped-def]
    model, x = story["model"], SyntheticTask(0).inputs(7)
    with torch.no_grad(), story["opt"].task("never trained"):
        assert torch.equal(model(x), nn.functional.linear(x, model.fc.weight, model.fc.bias))


def test_evaluation_uses_the_task_at_work_once_it_has_begun() -> None:
    model, opt = make()
    x, plain = SyntheticTask(0).inputs(3), None
    model.eval()
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(plain, nn.functional.linear(x, model.fc.weight, model.fc.bias))
    train(model, opt, SyntheticTask(0), 5)
    with torch.no_grad():
        assert not torch.equal(model(x), plain)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    with torch.no_grad(), opt.task("one"):
        known = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), known), "before the next task begins the last one stands"


def test_the_backbone_is_frozen_and_its_gradients_are_the_users() -> None:
    model, opt = make()
    before = model.fc.weight.detach().clone()
    loss = model(SyntheticTask(0).inputs(0)).square().mean()
    loss.backward()
    gradient = model.fc.weight.grad.clone()
    opt.step()
    assert torch.equal(model.fc.weight, before) and torch.equal(model.fc.weight.grad, gradient)
    assert model.fc.weight.requires_grad and not opt.state.get(model.fc.weight)


@pytest.mark.parametrize("base", ["foreign", "lbfgs"])
def test_bases_that_leave_no_mark_or_search_lines_cannot_move_the_backbone(base: str) -> None:
    class Careless(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(0.9)

    torch.manual_seed(0)
    model = Layer()
    kind = Careless if base == "foreign" else torch.optim.LBFGS
    optimizer = kind(model.parameters(), lr=0.1)
    if base == "lbfgs":
        with pytest.raises(OptionError, match="LBFGS takes one group only"):
            NullSpaceOptimizer(optimizer, model, mode=IGSP(**QUICK))
        assert not hasattr(model, "igsp") and len(optimizer.param_groups) == 1
        return
    opt = NullSpaceOptimizer(optimizer, model, mode=IGSP(**QUICK))
    before = model.fc.weight.detach().clone()
    model(SyntheticTask(0).inputs(0)).square().mean().backward()
    opt.step()
    assert torch.equal(model.fc.weight, before)


def test_experts_have_their_own_group_with_a_hundred_times_the_rate() -> None:
    _, opt = make()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([2e-4, 2e-2])
    assert len(opt.param_groups[1]["params"]) == 2 * 2 + 1
    _, other = make(lr=1e-3)
    assert other.param_groups[1]["lr"] == 1e-3


def test_pruned_weights_and_their_optimizer_state_are_gone() -> None:
    model, opt = make()
    task = SyntheticTask(0)
    train(model, opt, task, 60)
    assert opt.status().phase == 1
    old = list(opt.param_groups[1]["params"])
    train(model, opt, task, 240, first=60)
    now = opt.param_groups[1]["params"]
    assert opt.status().phase == 2 and len(now) == 2, "one expert; the router is frozen beside a survivor"
    assert set(opt.state) == set(now)
    assert not any(p is q for p in old if p.shape[0] == 2 for q in now)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad and p.shape != model.fc.weight.shape) < 1000


def test_a_router_that_trains_on_keeps_the_moments_of_its_rows() -> None:
    model, opt = make(router_after="train", cap=5, window=5, on_cap="prune", threshold=0.5)
    train(model, opt, SyntheticTask(0), 4)
    layer = opt._core.mode.experts.layers[0]
    old = layer.router
    moments = opt.state[old]["exp_avg"].clone()
    train(model, opt, SyntheticTask(0), 1, first=4)
    assert opt.status().phase == 2 and layer.router is not old and old not in opt.state
    assert opt.state[layer.router]["exp_avg"].shape == layer.router.shape and moments.shape != layer.router.shape


@pytest.mark.fault(111)
def test_a_router_that_never_converges_stops_at_the_cap_and_keeps_all(caplog: pytest.LogCaptureFixture) -> None:
    model, opt = make(cap=10, window=20)
    with caplog.at_level(logging.INFO, logger="nullspace_optim.igsp"):
        train(model, opt, SyntheticTask(0), 12)
    assert opt.status().phase == 2 and opt.status().step == 2
    assert "the cap of 10 steps was reached, 1 routers had not converged: they keep all experts" in opt.status().reason
    assert len([r for r in caplog.records if "phase 2 of task 1 begins" in r.getMessage()]) == 1
    report = opt.consolidate(SyntheticTask(0).loader(), progress=False)
    assert layer_of(report).kept == 2 and layer_of(report).converged is None
    assert report.trainable.first_steps == 10 and report.trainable.second_steps == 2
    assert report.trainable.mean == pytest.approx((10 * report.trainable.first + 2 * report.trainable.second) / 12)


def test_a_task_that_ends_in_phase_one_is_pruned_then() -> None:
    model, opt = make()
    train(model, opt, SyntheticTask(0), 3)
    report = opt.consolidate(SyntheticTask(0).loader(), progress=False)
    assert "ended after 3 steps in phase 1" in report.reason and opt.status().phase == 1 and opt.status().task == 2


@pytest.mark.fault(112)
def test_a_threshold_that_removes_the_last_expert_is_refused() -> None:
    model, opt = make(threshold=0.9, cap=4, on_cap="prune")
    train(model, opt, SyntheticTask(0), 3)
    with pytest.raises(PruningError, match=r"'fc': pruning below 0\.9 would remove the last expert"):
        train(model, opt, SyntheticTask(0), 1, first=3)
    assert opt.status().phase == 1 and len(opt.param_groups[1]["params"]) == 5


def test_consolidation_is_all_or_nothing() -> None:
    model, opt = make()
    task = SyntheticTask(0)
    train(model, opt, task, 45)
    x = task.inputs(3)
    with torch.no_grad():
        before = model(x)
    state = opt.state_dict()["nullspace"]["metadata"]
    parameters = list(opt.param_groups[1]["params"])

    def broken():  # type: ignore[no-untyped-def]
        yield task.inputs(1)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        opt.consolidate(broken(), name="one", progress=False)
    with pytest.raises(ConsolidationError, match="no batches"):
        opt.consolidate([], name="one", progress=False)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert opt.state_dict()["nullspace"]["metadata"] == state
    assert all(p is q for p, q in zip(opt.param_groups[1]["params"], parameters)) and all(
        p in opt.state for p in parameters
    )
    train(model, opt, task, 5, first=45)
    opt.consolidate(task.loader(), name="one", progress=False)
    with pytest.raises(ConsolidationError, match="no step was taken"):
        opt.consolidate(task.loader(), name="two", progress=False)
    train(model, opt, task, 1)
    with pytest.raises(ConsolidationError, match="'one' has been consolidated already"):
        opt.consolidate(task.loader(), name="one", progress=False)


def test_regularization_by_hand_replaces_the_automatic_one() -> None:
    results = []
    for by_hand in (False, True):
        model, opt = make(noise=0.0)
        train(model, opt, SyntheticTask(0), 40)
        opt.consolidate(SyntheticTask(0).loader(), progress=False)
        for step in range(3):
            out = model(SyntheticTask(2).inputs(step)).square().mean()
            loss = out + opt.regularization() if by_hand else out
            opt.zero_grad()
            loss.backward()
            opt.step()
        results.append(opt._core.mode.experts.layers[0].router.detach().clone())
    torch.testing.assert_close(results[0], results[1])
    model, opt = make(noise=0.0, strength=0.0)
    assert float(opt.regularization()) == 0.0


def test_function_prices_what_a_candidate_puts_out_beside_the_history() -> None:
    """The penalty is the dense share of the candidate's outputs for the batch, and its gradient reaches `A` and `B`."""
    model, opt = make(regularization="function", strength=0.5, rank=4, candidates=1, cap=10, window=10, warmup=0)
    train(model, opt, SyntheticTask(0), 30)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    layer, data = opt.mode.experts.layers[0], torch.cat(SyntheticTask(0).loader())
    old = data @ layer.history["down"][0].T @ layer.history["up"][0]
    left, values, _ = torch.linalg.svd(old.T, full_matrices=False)
    count = int((values.square().cumsum(0) < 0.99 * values.square().sum()).sum()) + 1
    assert layer.emitted.shape[1] == count < layer.outputs.shape[1] == 4, "rarely used directions are left out"
    assert torch.linalg.matrix_norm(left[:, :count] @ left[:, :count].T - layer.emitted @ layer.emitted.T, 2) < 1e-3
    train(model, opt, SyntheticTask(2), 3)
    x, (expert,) = SyntheticTask(2).inputs(9), layer.fresh
    opt.zero_grad()
    model(x).sum()
    penalty = opt.regularization()
    outputs = x @ expert.down.T @ expert.up
    dense = 0.5 * (outputs - outputs @ layer.emitted @ layer.emitted.T).square().sum() / outputs.square().sum()
    torch.testing.assert_close(penalty, dense)
    assert float(penalty.detach()) > 0.05
    for parameter in (expert.down, expert.up):
        (found,), (wanted,) = (torch.autograd.grad(one, [parameter], retain_graph=True) for one in (penalty, dense))
        assert bool(wanted.any())
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    copy.deepcopy(model)


@pytest.mark.parametrize("kind", ["mass", "geom", "function", "both", "none"])
def test_every_kind_of_regularization_trains(kind: str) -> None:
    model, opt = make(regularization=kind)
    for place, name in ((0, "one"), (1, "two")):
        train(model, opt, SyntheticTask(place), 15)
        opt.consolidate(SyntheticTask(place).loader(), name=name, progress=False)
    assert opt.status().finished == ("one", "two")


@pytest.mark.parametrize("orthogonal", ["input", "both", "structural", "none"])
def test_what_phase_two_keeps(orthogonal: str) -> None:
    model, opt = make(orthogonal=orthogonal, rank=4, cap=10, window=5)
    train(model, opt, SyntheticTask(0), 20)
    opt.consolidate(SyntheticTask(0).loader(), progress=False)
    layer = opt._core.mode.experts.layers[0]
    train(model, opt, SyntheticTask(2), 10)
    before = [(e.down.detach().clone(), e.up.detach().clone()) for e in layer.fresh]
    train(model, opt, SyntheticTask(2), 20, first=10)
    kept = {"input": {"down"}, "both": {"down", "up"}, "structural": set(), "none": set()}[orthogonal]
    assert {name.rsplit(".", 1)[1] for name in opt.verify().kept} == kept and opt.verify().worst <= 1e-5
    for (down, up), expert in zip(before, layer.fresh):
        moved, lifted = expert.down - down, expert.up - up
        assert torch.equal(expert.down, down) == (orthogonal == "structural")
        leak = float(((moved @ layer.inputs).norm() / moved.norm().clamp_min(1e-9)).detach())
        assert (leak < 1e-4) == (orthogonal != "none"), leak
        if orthogonal == "both":
            assert float(((lifted @ layer.outputs).norm() / lifted.norm()).detach()) < 1e-4


def test_a_shared_router_serves_all_tasks() -> None:
    model, opt = make(router="shared")
    for place, name in ((0, "one"), (2, "two")):
        train(model, opt, SyntheticTask(place), 60)
        report = opt.consolidate(SyntheticTask(place).loader(), name=name, progress=False)
    layer = opt._core.mode.experts.layers[0]
    assert layer.finished[-1].weight.shape[0] == layer.size
    x = SyntheticTask(2).inputs(3)
    with torch.no_grad(), opt.task(None):
        shared = model(x)
    with torch.no_grad(), opt.task("two"):
        assert torch.equal(model(x), shared)
    with torch.no_grad(), opt.task("unknown"):
        assert torch.equal(model(x), nn.functional.linear(x, model.fc.weight, model.fc.bias))
    assert report.routers < 2 * 200


def test_candidates_warm_up_before_routers_move() -> None:
    model, opt = make(warmup=10, cap=30)
    layer = opt._core.mode.experts.layers[0]
    before = layer.router.detach().clone()
    train(model, opt, SyntheticTask(0), 10)
    assert torch.equal(layer.router, before) and layer.router not in opt.state
    assert all(bool(expert.up.any()) for expert in layer.fresh), "noise alone reaches every candidate"
    train(model, opt, SyntheticTask(0), 1, first=10)
    assert not torch.equal(layer.router, before)
    assert IGSP(cap=50).plan(None).warm == 5


def shared_story(energy: float) -> tuple[float, float, float]:
    """Train two tasks with one router: drift of the first one's outputs, of its kept logits, loss of the second."""
    model, opt = make(router="shared", shared_energy=energy)
    old, new = SyntheticTask(0), SyntheticTask(2)
    train(model, opt, old, 300)
    opt.consolidate(old.loader(), name="one", progress=False)
    x = old.inputs(7)
    with torch.no_grad(), opt.task(None):
        before = model(x)
    loss = train(model, opt, new, 300)
    kept = opt.verify().kept.get("igsp.fc.router", float("nan"))
    opt.consolidate(new.loader(), name="two", progress=False)
    with torch.no_grad(), opt.task(None):
        return float((model(x) - before).norm() / before.norm()), kept, loss


def test_a_shared_router_goes_on_routing_old_tasks_as_it_did() -> None:
    protected, kept, learned = shared_story(1.0)
    drifting, none, _ = shared_story(0.0)
    assert kept <= 1e-5 and none != none, "kept by the kernel of null-space protection, under AdamW"
    assert protected < 2e-3 and drifting > 0.05 and learned < 0.5, (protected, drifting, learned)


def test_a_closure_is_regularized_as_well() -> None:
    results = []
    for closure in (False, True):
        model, opt = make(noise=0.0)
        train(model, opt, SyntheticTask(0), 30)
        opt.consolidate(SyntheticTask(0).loader(), progress=False)

        def evaluate(model=model, opt=opt):  # type: ignore[no-untyped-def]
            opt.zero_grad()
            loss = model(SyntheticTask(2).inputs(0)).square().mean()
            loss.backward()
            return loss

        if closure:
            opt.step(evaluate)
        else:
            evaluate()
            opt.step()
        results.append(opt._core.mode.experts.layers[0].router.detach().clone())
    assert torch.equal(*results)


def test_steps_that_train_nothing_do_not_count() -> None:
    model, opt = make()
    opt.step()
    assert opt.status().step == 0
    opt.param_groups[1]["lr"] = 0.0
    model(SyntheticTask(0).inputs(0)).square().mean().backward()
    opt.step()
    assert opt.status().step == 0


def test_detach_gives_the_model_and_the_optimizer_back() -> None:
    model, opt = make()
    train(model, opt, SyntheticTask(0), 3)
    base = opt.detach()
    assert len(base.param_groups) == 1 and not model.fc._forward_hooks and not hasattr(model, "igsp")
    assert set(base.state) <= set(model.parameters())
    NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=IGSP(**QUICK))


def test_status_task_and_regularization_need_a_mode() -> None:
    model = Layer()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model)
    for call in (opt.status, opt.regularization, lambda: opt.task("x")):
        with pytest.raises(OptionError, match="needs a mode"):
            call()


@pytest.mark.parametrize("kind", ["per-task", "shared"])
def test_each_sample_is_routed_for_the_task_that_is_named_for_it(kind: str) -> None:
    model, opt = make(router=kind)
    x = torch.cat([SyntheticTask(0).inputs(7)[:3], SyntheticTask(2).inputs(7)[:3]])
    names = ["one", None, "two", "two", "never trained", "one"]
    with torch.no_grad(), opt.task(names):
        assert torch.equal(model(x), nn.functional.linear(x, model.fc.weight, model.fc.bias)), "no task is finished yet"
    for place, name in ((0, "one"), (2, "two")):
        train(model, opt, SyntheticTask(place), 60)
        opt.consolidate(SyntheticTask(place).loader(), name=name, progress=False)
    expected = []
    for name, row in zip(names, x):
        with torch.no_grad(), opt.task(name or "plain"):
            expected.append(model(row[None]))
    with torch.no_grad(), opt.task(names):
        found = model(x)
        with opt.task("one"):
            inner = model(x)
        again = model(x)
    torch.testing.assert_close(found, torch.cat(expected))
    assert torch.equal(found, again) and not torch.equal(found, inner)
    plain = nn.functional.linear(x, model.fc.weight, model.fc.bias)
    assert torch.equal(found[[1, 4]], plain[[1, 4]]) and not torch.equal(found[0], plain[0])
    with torch.no_grad(), opt.task(names[:2]), pytest.raises(OptionError, match="2 samples, but layer 'fc' sees 6"):
        model(x)
    for wrong in (3, ["one", 2], {"one"}):
        with pytest.raises(OptionError, match="expected the name of a task, one name"), opt.task(wrong):
            pass


def test_phase_one_takes_at_most_a_fifth_of_a_task() -> None:
    model, opt = make(cap=None, window=None, candidates=1)
    for number, (place, steps) in enumerate(((0, 60), (2, 40), (1, 10))):
        train(model, opt, SyntheticTask(place), steps)
        report = opt.consolidate(SyntheticTask(place).loader(), name=str(number), progress=False)
        if not number:
            assert report.trainable.first_steps == 1, "one expert: nothing to choose"
        else:
            assert report.trainable.first_steps <= (12, 8)[number - 1] and report.trainable.second_steps > 0
        assert not report.warnings
    assert [IGSP(steps=steps).plan(500).cap for steps in (1000, 3, None)] == [200, 1, 100]
    assert IGSP().plan(None).cap == 20 and IGSP(cap=7, steps=1000).plan(500).cap == 7
    assert IGSP(steps=1000).plan(None) == (200, 20, 20) and IGSP(cap=10, window=3, warmup=0).plan(None) == (10, 0, 3)


@pytest.mark.parametrize("kind", ["per-task", "shared"])
def test_a_task_without_room_for_candidates_trains_its_router(kind: str) -> None:
    """Nothing has to warm up there; noise alone, which has no gradient, would let no step count."""
    model, opt = make(candidates=4, cap=10, router=kind)
    train(model, opt, SyntheticTask(0), 20)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    model.fc.requires_grad_(False)
    router = opt.mode.experts.layers[0].router
    before = router.detach().clone()
    train(model, opt, SyntheticTask(1), 3)
    assert not len(opt.mode.experts.layers[0].fresh) and opt.status().step == 3
    assert not torch.equal(router, before)
    train(model, opt, SyntheticTask(1), 17)
    assert opt.status().phase == 2
    opt.consolidate(SyntheticTask(1).loader(), name="two", progress=False)
    assert opt.status().finished == ("one", "two")


def test_the_plan_of_a_task_is_that_of_a_resumed_run() -> None:
    model, opt = make(cap=None, window=None)
    train(model, opt, SyntheticTask(0), 70)
    opt.consolidate(SyntheticTask(0).loader(), progress=False)
    _, other = make(cap=None, window=None)
    other.load_state_dict(opt.state_dict())
    assert other.mode.experts.scope.plan == opt.mode.experts.scope.plan and other.mode.experts.scope.plan.cap == 14
