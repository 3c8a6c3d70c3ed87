from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.config import Config, load_config
from reference.data.tasks import ORDERS
from reference.experiment import Experiment, prepare
from reference.methods import METHODS, Method, Setting
from reference.methods.gnsp import TUNED
from reference.methods.nullspace import NullSpaceReference, random_like, stored_bytes
from reference.methods.rehearsal import Replay
from reference.sequence import Sequence, StoppedError
from reference.training.steps import Batch, learn

SMALL = {
    "tasks": ["colours", "photographs"], "methods": "all", "iterations": 5, "pretrain_iterations": 4, "warmup": 2,
    "batch_size": 8, "evaluation_images": 40, "consolidation_images": 32, "reference_images": 32, "ensemble_share": 0.4,
    "output": "unused",
}  # fmt: skip
SLOW = {
    "moe-adapters", "nullspace-reference", "gradient-reference", "random-basis", "gradient", "gnsp-exact", "osf",
    "nullspace-replay",
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    prepared = prepare(load_config("demo", SMALL))
    clip = prepared.pretrained(0)
    return Experiment(prepared.tasks, prepared.pool, lambda seed: clip)


def config(**settings: Any) -> Config:
    return load_config("demo", {**SMALL, **settings})


def method(name: str, experiment: Experiment, **settings: Any) -> Method:
    clip = experiment.pretrained(0).copy()
    return METHODS[name](Setting(clip, config(**settings), experiment.tasks, experiment.pool, 0))


def run_task(made: Method, number: int) -> None:
    made.before_task(number)
    schedule = made.schedule(number)
    learn(made, made.setting.tasks[number], made.config, schedule, seed=0, number=number)
    made.after_task(number)


def weights(made: Method) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.clip.model.named_parameters()}


def moved(before: dict[str, torch.Tensor], made: Method) -> set[str]:
    return {name for name, p in made.clip.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in SLOW else ())
        for name in sorted(set(METHODS) - {"zero-shot", "finetune", "nullspace"})
    ],
)
def test_every_method_resumes_bitwise_in_its_second_task(name: str, experiment: Experiment, tmp_path: Path) -> None:
    straight = Sequence(experiment, METHODS[name], config(), 0, tmp_path / "straight")
    expected = straight.run()
    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        Sequence(experiment, METHODS[name], config(), 0, tmp_path / "two", lambda: next(asked) >= 7).run()
    resumed = Sequence(experiment, METHODS[name], config(), 0, tmp_path / "two")
    assert str(resumed.run(resume=True)["accuracy"]) == str(expected["accuracy"])
    for (key, one), two in zip(straight.clip.model.state_dict().items(), resumed.clip.model.state_dict().values()):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("name", ["gnsp", "gnsp-exact", "losses-only", "projection-only"])
def test_gnsp_trains_everything_first_and_mlps_and_the_projection_then(name: str, experiment: Experiment) -> None:
    made = method(name, experiment)
    everything = {n for n, p in made.clip.model.named_parameters() if n != "logit_scale"}
    before = weights(made)
    run_task(made, 0)
    assert moved(before, made) >= everything - {"token_embedding.weight"} - {n for n in everything if "bias" in n}
    before = weights(made)
    run_task(made, 1)
    expected = {f"visual.transformer.resblocks.{b}.mlp.{m}.weight" for b in range(4) for m in ("c_fc", "c_proj")}
    assert moved(before, made) == expected | {"visual.proj"}
    assert made.trained_parameters() == sum(before[n].numel() for n in expected | {"visual.proj"})


@pytest.mark.parametrize("name, exact", [("gnsp", False), ("gnsp-exact", True)])
def test_only_the_exact_variant_holds_its_directions(name: str, exact: bool, experiment: Experiment) -> None:
    made: Any = method(name, experiment)
    run_task(made, 0)
    made.before_task(1)
    learn(made, made.setting.tasks[1], made.config, made.schedule(1), seed=0, number=1)
    drift = max(made.optimizer.verify().kept.values())
    assert (drift < 1e-5) == exact


def test_gnsp_first_task_can_be_restricted_or_held_to_the_pool(experiment: Experiment) -> None:
    made: Any = method("gnsp-exact", experiment, gnsp_first_task="reference")
    assert "report" in made.before_sequence() and len(made.optimizer.bases) == 9
    before = weights(made)
    run_task(made, 0)
    assert len(moved(before, made)) == 9
    assert method("gnsp", experiment, gnsp_first_task="restricted").before_sequence() == {}


def test_gnsp_schedules_are_those_of_its_released_files(experiment: Experiment) -> None:
    assert all(set(TUNED[order]) == set(ORDERS[order]) for order in ORDERS)
    made = method("gnsp", experiment, schedule="gnsp", iterations=1000, learning_rate=1e-5)
    object.__setattr__(made.setting.tasks[0], "name", "dtd")
    try:
        assert (made.schedule(0).iterations, made.schedule(0).rate) == (500, 5e-5)
    finally:
        object.__setattr__(made.setting.tasks[0], "name", "colours")


def test_the_pool_is_in_order_beside_the_steps_and_its_teacher_pretrained(experiment: Experiment) -> None:
    made: Any = method("gnsp", experiment)
    pool = made.guided.pool
    from reference.training.steps import Batch

    none = torch.zeros(0)
    drawn = [pool.drawn(Batch(none, none, none, 0, step, none)) for step in range(5)]
    assert torch.equal(torch.cat(drawn[:4]).sort().values, torch.arange(32)) and torch.equal(drawn[4], drawn[0])
    before = pool.images.clone()
    run_task(made, 0)
    torch.testing.assert_close(pool.images, before)
    pretrained: Any = experiment.pretrained(0)
    with torch.no_grad():
        expected = pretrained.model.eval().encode_image(
            pretrained.normalised(experiment.pool.images[:4]), normalize=True
        )  # type: ignore[union-attr]
    torch.testing.assert_close(pool.images[:4], expected, rtol=1e-4, atol=1e-5)


def test_zscl_goes_on_with_the_mean_of_start_and_visited_weights(experiment: Experiment) -> None:
    made: Any = method("zscl", experiment)
    made.before_task(0)
    visited = [weights(made)]
    after_step: Callable[[Any], None] = made.after_step

    def spy(batch: Any) -> None:
        after_step(batch)
        if batch.step in (0, 2, 4):
            visited.append(weights(made))

    made.after_step = spy
    learn(made, made.setting.tasks[0], made.config, made.schedule(0), seed=0)
    assert made.after_task(0) == {"ensemble": 4}
    for name, value in weights(made).items():
        torch.testing.assert_close(value, torch.stack([w[name] for w in visited]).mean(0), rtol=1e-5, atol=1e-7)


def test_wise_ft_ends_half_way_to_the_pretrained_weights(experiment: Experiment) -> None:
    made = method("wise-ft", experiment)
    before = weights(made)
    made.before_task(0)
    learn(made, made.setting.tasks[0], made.config, made.schedule(0), seed=0)
    trained = weights(made)
    made.after_task(0)
    for name, value in weights(made).items():
        torch.testing.assert_close(value, (before[name] + trained[name]) / 2)


def test_the_bound_by_task_starts_from_the_pretrained_weights(experiment: Experiment) -> None:
    made = method("finetune-per-task", experiment)
    before = weights(made)
    run_task(made, 0)
    assert moved(before, made)
    made.before_task(1)
    assert not moved(before, made)


def test_replay_keeps_as_many_bytes_as_it_may(experiment: Experiment) -> None:
    made = method("replay", experiment, replay_bytes=10 * 3 * 32 * 32)
    assert isinstance(made, Replay)
    assert len(made.stored(0, 1)) == 10 and len(made.stored(0, 2)) == 5
    assert torch.equal(made.stored(0, 1)[:5], made.stored(0, 2))
    assert made.facts() == {"bytes": 10 * 3 * 32 * 32}


def test_replay_beside_ours_protects_and_remembers(experiment: Experiment) -> None:
    images = 10 * 3 * 32 * 32
    made: Any = method("nullspace-replay", experiment, replay_bytes=images)
    made.before_sequence()
    run_task(made, 0)
    bases = stored_bytes(made.optimizer)
    assert made.facts()["bytes"] == bases + images and 0 < made.facts()["free_share"] < 1
    made.before_task(1)
    task = made.setting.tasks[1]
    batch = Batch(
        made.clip.normalised(task.train.images[:4]), task.train.labels[:4], made.clip.tokens(task.prompts()), 1, 0, None
    )
    with torch.no_grad():
        alone, both = (kind.loss(made, batch) for kind in (NullSpaceReference, type(made)))
    assert both > alone + 0.1  # a batch of the first task is added
    learn(made, task, made.config, made.schedule(1), seed=0, number=1)
    assert made.optimizer.verify().worst < 1e-5


def test_ewc_pulls_back_what_the_old_task_needs(experiment: Experiment) -> None:
    moves = []
    for weight in (0.0, 1e6):
        made: Any = method("ewc", experiment, ewc_weight=weight)
        run_task(made, 0)
        fisher, before = made.fisher, weights(made)
        assert all((value >= 0).all() for value in fisher.values()) and sum(float(v.sum()) for v in fisher.values()) > 0
        run_task(made, 1)
        moves.append(
            sum(float((fisher[n] * (w - before[n]).square()).sum()) for n, w in weights(made).items() if n in fisher)
        )
    assert moves[1] < moves[0]


def test_random_bases_have_the_ranks_of_the_true_ones_and_are_held(experiment: Experiment) -> None:
    made: Any = method("random-basis", experiment)
    made.before_sequence()
    true = {name: basis.rank for name, basis in made.optimizer.bases.items() if basis.subspaces}
    made.before_task(0)
    for parameter, basis in made.optimizer.bases.items():
        for side, subspace in basis.subspaces.items():
            assert subspace.rank == true[parameter] and not torch.equal(subspace.basis, made.true[parameter][side])
    learn(made, made.setting.tasks[0], made.config, made.schedule(0), seed=0)
    assert max(made.optimizer.verify().kept.values()) < 1e-5
    made.after_task(0)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    grown = made.optimizer.bases[name].main.basis
    assert torch.equal(grown[:, :, : true[name]], made.true[name]["right"])
    drawn = random_like(torch.zeros(2, 6, 3), (3, 1), 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn[0].T @ drawn[0], torch.eye(3))
    assert drawn[1, :, 1:].abs().sum() == 0


def test_osf_leaves_half_of_each_weight_on_both_sides_and_moves_the_rest(experiment: Experiment) -> None:
    made: Any = method("osf", experiment)
    before = weights(made)
    made.before_sequence()
    for number in (0, 1):
        run_task(made, number)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    old, new = before[name].double(), weights(made)[name].double()
    left, _, right = torch.linalg.svd(old)
    k = min(old.shape) // 2
    U, V = left[:, :k], right[:k].T
    moved = new - old
    assert moved.norm() > 1e-3 * old.norm()
    assert max((U.T @ moved).norm(), (moved @ V).norm()) < 1e-5 * old.norm()
    trained = {name for name in before if not torch.equal(before[name], weights(made)[name])}
    assert all(before[name].ndim > 1 for name in trained) and name in trained
    assert [side.rank for side in made.optimizer.bases[name].subspaces.values()] == [k, k]


def test_joint_is_one_schedule_over_all_tasks(experiment: Experiment) -> None:
    made = method("joint", experiment, warmup=0)
    parts = [made.schedule(number) for number in (0, 1)]
    rates = [part.at(step) for part in parts for step in range(part.iterations)]
    assert rates == sorted(rates, reverse=True) and rates[0] == made.config.learning_rate
