"""Few images a class, the attention pooling alone (SAFE) with blended scores, and LoRSU's choice under protection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from small_runs import method, state, train, two_tasks
from torch import Tensor

from reference.config import Config
from reference.data.tasks import Split, Task
from reference.errors import ExperimentError
from reference.evaluation.scoring import Scorer, unpacked
from reference.experiment import Experiment
from reference.methods import METHODS, Setting
from reference.sequence import Sequence
from reference.studies.expert_report import read_rows, report
from reference.training.clip import Clip, assemble
from reference.training.features import image_features
from reference.training.steps import class_vectors, learn

SIZE = 64
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def config() -> Config:
    return two_tasks()


def weights(made: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.clip.model.named_parameters()}


@pytest.fixture(scope="module")
def resnet() -> Experiment:
    """A small ResNet of CLIP with random weights, and two tasks of noise."""
    torch.manual_seed(0)
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": SIZE, "patch_size": None}
    return around(open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=TEXT))


@pytest.fixture(scope="module")
def coca() -> Experiment:
    """The same of a small CoCa: a transformer with an attention pooling, whose image tower returns tokens as well."""
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 16, "image_size": SIZE, "patch_size": 16, "output_tokens": True}
    pooling = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = open_clip.CoCa(32, {**TEXT, "mlp_ratio": 4}, text, {**vision, **pooling})
    torch.nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves it as memory was, perhaps not a number
    return around(model)


def around(model: Any) -> Experiment:
    tokens = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(1))
    clip = assemble(model, lambda prompts: tokens[: len(prompts)], "cpu")

    def task(name: str) -> Task:
        images = torch.randint(0, 256, (24, 3, SIZE, SIZE), dtype=torch.uint8)
        split = Split(images, torch.arange(24) % 3)
        return Task(name, ("a", "b", "c"), ("{}",), split, split)

    return Experiment([task("old"), task("new")], None, lambda seed: clip)


def test_few_takes_so_many_of_each_class_and_others_by_seed() -> None:
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 1, 1, 0, 0, 1])
    split = Split(torch.arange(11).view(11, 1, 1, 1).to(torch.uint8), labels)
    drawn = [split.few(2, seed) for seed in range(40)]
    for few in drawn:
        assert few.labels.bincount().tolist() == [2, 2, 1]
        index = few.images.flatten().tolist()
        assert index == sorted(set(index)) and torch.equal(few.labels, labels[index])
    assert {i for few in drawn for i in few.images.flatten().tolist()} == set(range(11))
    assert torch.equal(split.few(2, 3).images, drawn[3].images) and split.few(None, 0) is split
    assert len(split.few(100, 0)) == 11


def test_shots_leave_the_test_images_as_they_are(config: Config, experiment: Experiment, tmp_path: Path) -> None:
    few = replace(config, shots=3)
    runs = [Sequence(experiment, METHODS["finetune"], few, seed, tmp_path / str(seed)) for seed in (0, 1)]
    for run in runs:
        for task, whole in zip(run.method.setting.tasks, experiment.tasks):
            assert task.train.labels.bincount().tolist() == [3] * len(task.class_names)
            assert torch.equal(task.test.images[:], whole.test.images[:])  # type: ignore[arg-type]
    one, other = (run.method.setting.tasks[0].train.images[:] for run in runs)
    assert not torch.equal(one, other)
    assert torch.equal(one, experiment.tasks[0].train.few(3, 0).images[:])  # type: ignore[arg-type]


def test_safe_moves_the_attention_pooling_alone(
    config: Config, experiment: Experiment, resnet: Experiment, coca: Experiment
) -> None:
    last, others = "visual.transformer.resblocks.%d.attn.", replace(config, layers="gnsp")  # which safe does not heed
    wanted = {"vit": (last % 3, "visual.proj"), "resnet": ("visual.attnpool.",)}
    wanted["coca"] = (last % 1, "visual.proj", "visual.attn_pool.")
    for given, parts in zip((experiment, resnet, coca), wanted.values()):
        made = method("safe", given, others)
        before = state(made)
        for number in (0, 1):
            train(made, number)
        moved = {name for name, value in state(made).items() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if name.startswith(parts)} and len(moved) > 4
        assert made.trained_parameters() == sum(before[name].numel() for name in moved)


def test_statistics_of_norms_move_where_their_weights_train(config: Config, resnet: Experiment) -> None:
    for name, moving in (("safe", False), ("finetune", True)):
        made = method(name, resnet, config)
        before = state(made)
        train(made, 0)
        statistics = [part for part in before if part.endswith(("running_mean", "running_var"))]
        assert len(statistics) > 20 and len(made.clip.model.state_dict()) == len(before)
        assert {not torch.equal(state(made)[part], before[part]) for part in statistics} == {moving}


def test_safe_names_itself_where_there_is_nothing_to_pool(config: Config, resnet: Experiment) -> None:
    clip = resnet.pretrained(0).copy()
    del clip.model.visual.attnpool  # type: ignore[union-attr]
    with pytest.raises(ExperimentError, match=r"^safe: layers=pooling .* another method or another --model"):
        METHODS["safe"](Setting(clip, config, resnet.tasks, None, 0))


@pytest.mark.parametrize("kind", ["vit", "resnet", "coca"])
def test_blended_features_are_those_of_two_whole_models(
    kind: str, config: Config, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = request.getfixturevalue("experiment" if kind == "vit" else kind)
    made, untouched = method("safe", given, config), given.pretrained(0).copy()
    train(made, 0)
    task = made.setting.tasks[0]
    images = made.clip.normalised(task.test.images[:6])
    monkeypatch.setattr(METHODS["safe"], "shares", (0.0, 0.25, 1.0))
    for clip in (made.clip, untouched):
        clip.model.eval()
    with torch.no_grad():
        old, new = (clip.model.encode_image(images, normalize=False) for clip in (untouched, made.clip))
        assert (new - old).norm() > 1e-2 * old.norm()
        for way, wanted in zip(made.evaluations, (new, old, 0.75 * old + 0.25 * new, new)):
            with made.evaluating(way, task):
                found = [made.clip.model.encode_image(images, normalize=unit) for unit in (False, True)]
            bitwise = wanted is old or wanted is new
            torch.testing.assert_close(found[0], wanted, **(dict(rtol=0, atol=0) if bitwise else {}))
            torch.testing.assert_close(found[1], torch.nn.functional.normalize(wanted, dim=-1))
        assert torch.equal(made.clip.model.encode_image(images, normalize=False), new)


def test_every_share_has_its_own_scores(config: Config, experiment: Experiment) -> None:
    made = method("safe", experiment, config)
    train(made, 0)
    scorer, boards = Scorer(made, list(experiment.tasks), config), dict[str, Any]()
    scorer.add_row(boards, 0)
    assert len(boards) == 4 and "share 0.5 of what was tuned" in scorer.names[2]
    task, models = experiment.tasks[0], (experiment.pretrained(0).copy(), made.clip)
    drawn = task.test.drawn(40, seed=0)
    old, new = (raw(clip, drawn, config) for clip in models)
    classes = class_vectors(made.clip, task, 1)
    for name, share in zip(scorer.names, (1.0, 0.25, 0.5, 0.75)):
        right = ((1 - share) * old + share * new) @ classes.T
        assert torch.equal(unpacked(boards[name].right[-1][0]), right.argmax(1) == drawn.labels)


def raw(clip: Clip, split: Split, config: Config) -> Tensor:
    """Pooled features `[n, e]` before they become unit."""
    unit = image_features(clip, split.images, config)
    with torch.no_grad():
        return unit * clip.model.encode_image(clip.normalised(split.images[:])).norm(dim=1, keepdim=True)  # type: ignore[operator]


def test_chosen_rows_move_and_old_directions_stay_at_once(config: Config, experiment: Experiment) -> None:
    made = method("lorsu-nullspace", experiment, config)
    made.before_sequence()
    for number in (0, 1):
        made.before_task(number)
        before = weights(made)
        learn(made, made.setting.tasks[number], config, made.schedule(number), seed=0, number=number)
        after = weights(made)
        for name, mask in made.masks.items():
            rows, moved = mask.any(dim=1), (before[name] != after[name]).any(dim=1)
            assert torch.equal(mask, rows[:, None].expand_as(mask))
            assert int(rows.sum()) == (96 if "attn" in name else 38)  # one head of three; a tenth of 384 neurons
            assert not moved[~rows].any() and moved[rows].float().mean() > 0.9
            kept = made.optimizer.bases[name].main.basis[0].double()
            step = (after[name] - before[name]).double()
            assert (step @ kept).norm() < 1e-5 * before[name].norm() and step.norm() > 1e-4 * before[name].norm()
        stay = {name for name in before if torch.equal(before[name], after[name])}
        assert all(name.startswith("visual.") for name in before.keys() - stay)
        made.after_task(number)
    assert made.optimizer.verify().ok
    assert made.trained_parameters() < sum(value.numel() for value in weights(made).values()) / 8


def test_rows_are_those_of_the_largest_gradient(config: Config, experiment: Experiment) -> None:
    made = method("lorsu-nullspace", experiment, config)
    gradients = made.gradients(1)
    made.before_task(1)
    for name, gradient in gradients.items():
        if "attn" not in name:
            norms = [float(row.norm()) for row in gradient]
            best = sorted(range(len(norms)), key=lambda row: -norms[row])[:38]
            assert set(best) == set(made.masks[name].any(dim=1).nonzero().flatten().tolist())


def test_the_table_of_rows_has_one_for_each_share(config: Config, experiment: Experiment, tmp_path: Path) -> None:
    run = Sequence(experiment, METHODS["safe"], replace(config, shots=2), 0, tmp_path / "safe-seed0").run()
    lines = [line.split(" | ") for line in report(read_rows([str(tmp_path)])).splitlines() if line.startswith("| safe")]
    assert [line[0].partition(", ")[2].partition(", f")[0] for line in lines[:4]] == [
        "",
        *METHODS["safe"].evaluations[1:],
    ]
    for line, board in zip(lines, [run, *run["scored_otherwise"].values()]):
        last, own = sum(board["accuracy"][-1]) / 2, [board["accuracy"][i][i] - run["pretrained"][i] for i in (0, 1)]
        assert (line[4], line[8]) == (f"{last:.1f}", f"{sum(own) / 2:.1f}")
