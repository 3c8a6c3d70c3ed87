from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from reference.config import Config, load_config
from reference.data.demo import tasks
from reference.data.tasks import Task
from reference.evaluation.scoring import Board, Scorer, packed, unpacked
from reference.experiment import Experiment, prepare
from reference.methods import Setting
from reference.methods.finetune import FineTune, ZeroShot
from reference.training.steps import Batch, learn


@pytest.mark.parametrize("count", [1, 7, 8, 201])
def test_packed_booleans_come_back(count: int) -> None:
    correct = torch.rand(count) < 0.5
    assert torch.equal(unpacked(packed(correct)), correct)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    settings = {"tasks": ["colours", "photographs"], "pretrain_iterations": 2, "output": "o", "evaluation_images": 30}
    return prepare(load_config("demo", settings))


def setting(experiment: Experiment, **settings: object) -> Setting:
    config = load_config("demo", {"output": "o", "evaluation_images": 30, **settings})
    return Setting(experiment.pretrained(0).copy(), config, experiment.tasks, None, 0)


def test_methods_may_score_their_own_task_or_the_end_only(experiment: Experiment) -> None:
    class Own(FineTune):
        scored = "own"

    class End(FineTune):
        scored = "end"

    for kind, measured in ((Own, [[True, True], [True, True]]), (End, [[False, False], [True, True]])):
        given = setting(experiment)
        method, boards = kind(given), dict[str, Board]()
        scorer = Scorer(method, experiment.tasks, given.config)
        for number in (None, 0, 1):
            scorer.add_row(boards, number)
        (board,) = boards.values()
        assert [[not math.isnan(cell) for cell in row] for row in board.accuracy] == measured
        assert board.accuracy[1] == board.pretrained


def test_ways_of_scoring_are_kept_apart_and_entered(experiment: Experiment) -> None:
    entered = []

    class TwoWays(ZeroShot):
        evaluations = ("task known", "task unknown")

        @contextmanager
        def evaluating(self, evaluation: str, task: Task) -> Iterator[None]:
            entered.append((evaluation, task.name))
            yield

    given = setting(experiment, also_templates=["all"])
    boards: dict[str, Board] = {}
    Scorer(TwoWays(given), experiment.tasks, given.config).add_row(boards, None)
    assert list(boards) == [
        f"task {known}, {rule} templates" for known in ("known", "unknown") for rule in ("first", "all")
    ]
    assert entered == [(f"task {known}", task) for task in ("colours", "photographs") for known in ("known", "unknown")]


def test_gnsp_scores_old_tasks_with_one_template_and_the_latest_with_all() -> None:
    config = Config("demo", "o", evaluation_templates="gnsp")
    task = tasks(Config("demo", "o", tasks=("colours",)))[0]
    three = Task("t", task.class_names, ("{}", "a {}", "the {}"), task.train, task.test)
    scorer = Scorer.__new__(Scorer)
    scorer.tasks, scorer.config = [three] * 3, config
    counts = [[scorer._templates("gnsp", three, i, number) for i in range(3)] for number in (None, 0, 1, 2)]
    assert counts == [[3, 3, 3], [3, 3, 3], [1, 3, 3], [1, 1, 3]]


def test_a_batch_names_its_images(experiment: Experiment) -> None:
    seen: list[Batch] = []

    class Looking(FineTune):
        def loss(self, batch: Batch) -> torch.Tensor:
            seen.append(batch)
            return super().loss(batch)

    given = setting(experiment, iterations=2, batch_size=4)
    task = experiment.tasks[1]
    method = Looking(given)
    learn(method, task, given.config, method.schedule(1), seed=0, number=1)
    assert [(batch.task, batch.step) for batch in seen] == [(1, 0), (1, 1)]
    assert all(torch.equal(task.train.labels[batch.index], batch.labels) for batch in seen)
