"""Methods that train a part of the weights: turns, a LoRA of keys and values, chosen heads; each with its control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import method, state, train, two_tasks
from torch import Tensor

from reference.config import Config
from reference.errors import ExperimentError
from reference.evaluation.scoring import Scorer, unpacked
from reference.experiment import Experiment
from reference.methods import METHODS, Setting
from reference.methods.gap import WEIGHT, visual_classes
from reference.training.clip import class_logits
from reference.training.features import image_features
from reference.training.steps import Batch, Learner, class_vectors, learn

ATTENTION = ".attn.parametrizations.in_proj_weight."


@pytest.fixture(scope="module")
def config() -> Config:
    return two_tasks()


def batch_of(made: Any, count: int = 6) -> Batch:
    task = made.setting.tasks[0]
    images = made.clip.normalised(task.train.images[:count])
    return Batch(images, task.train.labels[:count], made.clip.tokens(task.prompts()), 0, 0, torch.arange(count))


def test_orthsr_adds_the_cross_entropy_to_pretrained_posteriors(config: Config, experiment: Experiment) -> None:
    made = method("orthsr", experiment, replace(config, distillation_weight=1.5))
    train(made, 0)
    batch = batch_of(made)
    with torch.no_grad():
        found = float(made.loss(batch))
        models = made.clip.model.eval(), experiment.pretrained(0).copy().model.eval()
        ours, theirs = (class_logits(model, batch.images, batch.tokens).double() for model in models)
    smooth = 0.8 * F.one_hot(batch.labels, ours.shape[1]) + 0.2 / ours.shape[1]
    terms = [(target * ours.log_softmax(1)).sum(1).mean() for target in (smooth, theirs.softmax(1))]
    assert found == pytest.approx(float(-terms[0] - 1.5 * terms[1]), rel=1e-4)


@pytest.mark.parametrize("name", ["orthsr", "orthsr-free"])
def test_only_the_control_changes_singular_values(name: str, config: Config, experiment: Experiment) -> None:
    made = method(name, experiment, config)
    assert made.trained_parameters() == 4.25 * (
        4 * 96**2 + 2 * 64**2
    )  # as the paper counts: whole squares, both layers
    before = {name: value for name, value in experiment.pretrained(0).model.state_dict().items()}
    for number in (0, 1):
        train(made, number)
        made.after_task(number)
    assert all(torch.equal(value, before[key.replace("parametrizations.", "").removesuffix(".original")])
               for key, value in state(made).items() if not key.endswith("rotation"))  # fmt: skip
    for layer in (made.clip.model.visual.transformer.resblocks[0].mlp, made.clip.model.transformer.resblocks[1].mlp):
        for part in (layer.c_fc, layer.c_proj):
            old, new = part.parametrizations.weight.original, part.weight
            assert (new - old).norm() > 1e-2 * old.norm()
            same = torch.allclose(torch.linalg.svdvals(new), torch.linalg.svdvals(old), rtol=1e-4)
            assert same is (name == "orthsr")


def test_turns_inside_free_directions_need_no_corrected_step(config: Config, experiment: Experiment) -> None:
    made = method("turn", experiment, config)
    made.before_sequence()
    for number in (0, 1):
        before, bases = state(made), {name: basis.main for name, basis in made.guard.bases.items()}
        train(made, number)
        assert type(made.optimizer) is torch.optim.AdamW and not made.guard.state
        made.after_task(number)
        after = state(made)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and moved <= {name for name in before if ".mlp.c_" in name and name.endswith("weight")}
        for name in moved:
            kept, old, new = bases[name].basis[0], before[name].double(), after[name].double()
            assert (new - old).norm() > 1e-3 * old.norm()
            assert ((new - old) @ kept.double()).norm() < 1e-5 * old.norm()
            assert (new @ new.T - old @ old.T).norm() < 1e-5 * (old @ old.T).norm()
    assert made.guard.verify().ok


def test_lora_kv_moves_keys_and_values_of_both_towers_alone(config: Config, experiment: Experiment) -> None:
    made = method("lora-kv", experiment, config)
    assert made.trained_parameters() == 8 * (4 * 3 * 96 + 2 * 3 * 64)
    for number in (0, 1):
        train(made, number)
        made.after_task(number)
    pretrained = experiment.pretrained(0).model
    for tower, plain in ((made.clip.model.visual, pretrained.visual), (made.clip.model, pretrained)):
        for block, before in zip(tower.transformer.resblocks, plain.transformer.resblocks):  # type: ignore[union-attr, arg-type]
            width, old, new = len(before.ln_1.weight), before.attn.in_proj_weight, block.attn.in_proj_weight
            changed = (old != new).any(dim=1)
            assert not changed[:width].any() and changed[width:].float().mean() > 0.9
            addition = block.attn.parametrizations.in_proj_weight[0]
            torch.testing.assert_close(new[width:] - old[width:], addition.up @ addition.down / 8, atol=1e-6, rtol=1e-4)


def test_without_a_bound_mg_clip_is_its_lora_step_for_step(config: Config, experiment: Experiment) -> None:
    plain, free = (method(name, experiment, replace(config, gap_bound=float("inf"))) for name in ("lora-kv", "mg-clip"))
    before = state(free)
    assert free.before_sequence()["steps"] == 10 == len(free.before_sequence()["drifts"])
    assert all(torch.equal(value, before[name]) for name, value in state(free).items())
    for number in (0, 1):
        for made in (plain, free):
            train(made, number)
            made.after_task(number)
    assert all(torch.equal(value, state(plain)[name]) for name, value in state(free).items())


def test_the_bound_stops_before_the_drift_that_exceeds_it(config: Config, experiment: Experiment) -> None:
    drifts = method("mg-clip", experiment, replace(config, gap_bound=float("inf"))).before_sequence()["drifts"]
    twin = method("lora-kv", experiment, config)
    task = twin.setting.tasks[0]

    def negative() -> float:
        drawn = task.train.drawn(32, seed=0)
        features, texts = image_features(twin.clip, drawn.images, config), class_vectors(twin.clip, task, 1)
        cosines = [
            float((feature * text).sum())
            for feature, label in zip(features, drawn.labels.tolist())
            for number, text in enumerate(texts)
            if number != label
        ]
        return sum(cosines) / len(cosines)

    first, plan = negative(), twin.schedule(0)
    learn(Learner(twin.clip, twin.optimizer, lambda *given: METHODS["finetune"].loss(twin, Batch(*given, *[None] * 3))),
          task, config, replace(plan, iterations=3, total=10), seed=0)  # type: ignore[arg-type]  # fmt: skip
    assert drifts[2] == pytest.approx(abs(negative() - first), rel=1e-3)
    over = next(n for n, drift in enumerate(drifts) if drift > 0.5 * max(drifts))
    made = method("mg-clip", experiment, replace(config, gap_bound=0.5 * max(drifts)))
    assert made.before_sequence() == {"steps": max(1, over), "drifts": drifts[: over + 1]}
    assert method("mg-clip", experiment, replace(config, gap_bound=0.0)).before_sequence()["steps"] == 1
    shorter, common = made.schedule(1), METHODS["finetune"].schedule(made, 1)
    assert shorter.iterations == max(1, over)
    assert [shorter.at(step) for step in range(shorter.iterations)] == [common.at(s) for s in range(shorter.iterations)]


def test_visual_classes_begin_as_class_means_and_learn_to_tell_apart() -> None:
    torch.manual_seed(0)
    labels = torch.arange(120) % 4
    features = F.normalize(torch.randn(4, 6)[labels] + torch.randn(120, 6), dim=1)
    draw = torch.Generator().manual_seed(0)
    means = torch.stack([features[labels == n].mean(0) for n in range(4)])
    start = visual_classes(features, labels, 4, draw, passes=0)
    torch.testing.assert_close(start, F.normalize(means, dim=1))
    assert not visual_classes(features, labels, 5, draw, passes=0)[4].any()  # a class without an image
    losses = [
        float(F.cross_entropy(features @ c.T, labels)) for c in (start, visual_classes(features, labels, 4, draw, 200))
    ]
    assert losses[1] < losses[0] - 1e-3


def test_finished_tasks_are_scored_by_text_and_image_as_well(config: Config, experiment: Experiment) -> None:
    made = method("mg-clip", experiment, config)
    train(made, 0)
    made.after_task(0)
    first = made.visual["colours"].clone()
    scorer, boards = Scorer(made, list(experiment.tasks), config), dict[str, Any]()
    scorer.add_row(boards, 0)
    plain, both = (boards[name].right[-1] for name in scorer.names)
    assert plain[1] == both[1] and plain[0] != both[0]
    task = made.setting.tasks[0]
    drawn = task.test.drawn(40, seed=0)
    features, texts = image_features(made.clip, drawn.images, config), class_vectors(made.clip, task, 1)
    logits = made.clip.model.logit_scale.exp() * features @ texts.T + WEIGHT * features @ first.T
    assert torch.equal(unpacked(both[0]), logits.argmax(1) == drawn.labels)
    train(made, 1)
    made.after_task(1)
    assert torch.equal(made.visual["colours"], first) and len(made.visual) == 2


@pytest.mark.parametrize("name", ["lorsu", "lorsu-random"])
def test_what_was_not_chosen_stays_bitwise_under_decay(name: str, config: Config, experiment: Experiment) -> None:
    made, biases = method(name, experiment, config), {".mlp.c_fc.bias", ".attn.in_proj_bias"}
    for number in (0, 1):
        made.before_task(number)
        before = {**state(made), **{key: w.detach().clone() for key, w in effective(made).items()}}
        learn(made, made.setting.tasks[number], config, made.schedule(number), seed=0, number=number)
        made.after_task(number)
        after = {**state(made), **effective(made)}
        for key, mask in made.masks.items():
            assert int(mask.sum()) == round(0.1 * mask.numel())
            changed = before[key] != after[key]
            assert not changed[~mask].any() and changed[mask].float().mean() > 0.9
        for key in effective(made):
            rows = (before[key] != after[key]).any(dim=1).nonzero().flatten()
            assert set(rows.tolist()) <= set(
                after[f"{key.rpartition('.')[0]}.parametrizations.in_proj_weight.0.rows"].tolist()
            )
            assert len(rows) > 0.9 * 3 * 32  # one head of three
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert all(key.startswith("visual.") for key in moved)
        small = {key for key in moved if not key.endswith(("up", "down"))} - made.masks.keys() - effective(made).keys()
        assert small and all(any(key.endswith(bias) for bias in biases) for key in small)
    low_rank = 4 * 8 * (96 + 96) + 8 * (96 + 64)
    assert made.trained_parameters() == 4 * (384 + 288 + round(0.1 * 384 * 96)) + low_rank


def effective(made: Any) -> dict[str, Tensor]:
    blocks = enumerate(made.clip.model.visual.transformer.resblocks)
    return {f"visual.transformer.resblocks.{n}.attn.in_proj_weight": b.attn.in_proj_weight.detach() for n, b in blocks}


def test_lorsu_chooses_by_the_gradient_of_the_task_and_its_control_does_not(
    config: Config, experiment: Experiment
) -> None:
    made, other = (method(name, experiment, config) for name in ("lorsu", "lorsu-random"))
    for each in (made, other):
        each.before_task(1)
    model, task = made.clip.copy().model.double().eval(), made.setting.tasks[1]
    drawn, tokens = task.train.drawn(32, seed=0), made.clip.tokens(task.prompts())
    name = "visual.transformer.resblocks.2.mlp.c_fc.weight"
    total = torch.zeros(384, 96, dtype=torch.float64)
    for image, label in zip(drawn.images, drawn.labels):
        logits = class_logits(model, made.clip.normalised(image[None]).double(), tokens)
        loss = F.cross_entropy(logits, label[None], label_smoothing=config.label_smoothing)
        total += torch.autograd.grad(loss, model.get_parameter(name))[0]
    torch.testing.assert_close(made.gradients(1)[name], total, rtol=1e-3, atol=1e-6)
    best = total.abs().flatten().sort(descending=True).indices[:3686]
    agree = made.masks[name].flatten()[best].float().mean()
    assert agree > 0.999 and other.masks[name].flatten()[best].float().mean() < 0.2


def test_lorsu_names_a_model_without_a_vision_transformer(config: Config, experiment: Experiment) -> None:
    setting = Setting(experiment.pretrained(0).copy(), config, experiment.tasks, experiment.pool, 0)
    setting.clip.model.visual = torch.nn.Linear(2, 2)
    with pytest.raises(ExperimentError, match="lorsu: the model has no vision transformer"):
        METHODS["lorsu"](setting)
