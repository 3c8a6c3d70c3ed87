"""Gradient checkpointing: less is kept for the backward pass, and nothing else changes, in any method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reference.config import Config, load_config
from reference.errors import ExperimentError
from reference.experiment import Experiment, prepare
from reference.methods import METHODS
from reference.sequence import Sequence
from reference.training.clip import Clip, class_logits
from reference.training.steps import Batch, attention, precision

SMALL = {
    "tasks": ["colours", "photographs"], "methods": "all", "iterations": 4, "pretrain_iterations": 4, "warmup": 2,
    "batch_size": 8, "evaluation_images": 40, "consolidation_images": 16, "reference_images": 16, "output": "unused",
    "igsp": {"rank": 4, "window": 1, "cap": 2, "on_cap": "prune"}, "lora_rank": 4, "moe_experts": 6,
}  # fmt: skip
QUICK = {"moe-adapters", "ewc", "gnsp", "nullspace-reference"}


def config(**settings: Any) -> Config:
    return load_config("demo", {**SMALL, **settings})


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    prepared = prepare(config())
    clip = prepared.pretrained(0)
    return Experiment(prepared.tasks, prepared.pool, lambda seed: clip)


def gradients(clip: Clip, experiment: Experiment, settings: Config) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of one step, and how many bytes were kept for its backward pass."""
    task, kept = experiment.tasks[0], dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with attention(clip), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with precision(clip, settings):
            logits = class_logits(clip.model, clip.normalised(task.train.images[:8]), clip.tokens(task.prompts()))
            loss = nn.functional.cross_entropy(logits.float(), task.train.labels[:8])
        held = sum(kept.values())
        loss.backward()
    return {name: p.grad for name, p in clip.model.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize("half", ["float32", "bfloat16"])
def test_gradients_are_the_same_and_less_is_kept(half: str, experiment: Experiment) -> None:
    plain, saving = experiment.pretrained(0).copy(), experiment.pretrained(0).copy()
    saving.recompute()
    settings = config(precision=half)
    expected, much = gradients(plain, experiment, settings)
    found, little = gradients(saving, experiment, settings)
    assert expected.keys() == found.keys() and len(found) > 50
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert little < 0.6 * much


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.nightly) for n in METHODS if METHODS[n].trains]
)
def test_every_method_comes_to_the_same_numbers(name: str, experiment: Experiment, tmp_path: Path) -> None:
    runs = {}
    for saving in (False, True):
        run = Sequence(experiment, METHODS[name], config(gradient_checkpointing=saving), 0, tmp_path / str(saving))
        runs[saving] = (run.run(), run.clip.model.state_dict(), run)
    for (key, one), two in zip(runs[False][1].items(), runs[True][1].values()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=key)
    losses = [[task["loss"] for task in result["training"]] for result, _, _ in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    facts = [result["facts"] for result, _, _ in runs.values()]
    for key in ("free_share", "bytes", "frozen_experts"):
        assert facts[0].get(key) == facts[1].get(key)


def test_experts_are_counted_once_a_step(experiment: Experiment) -> None:
    from reference.methods import Setting

    counts = []
    for saving in (False, True):
        clip = experiment.pretrained(0).copy()
        if saving:
            clip.recompute()
        made: Any = METHODS["moe-adapters"](Setting(clip, config(), experiment.tasks, None, 0))
        made.before_task(0)
        clip.model.train()
        task = experiment.tasks[0]
        batch = Batch(
            clip.normalised(task.train.images[:8]),
            task.train.labels[:8],
            clip.tokens(task.prompts()),
            0,
            0,
            torch.arange(8),
        )
        with attention(clip):
            made.loss(batch).backward()
        counts.append([block.counts.tolist() for block in made.blocks])
    assert counts[0] == counts[1] and sum(counts[0][0]) == 2 * 8


def test_a_model_that_cannot_is_named(experiment: Experiment) -> None:
    clip = experiment.pretrained(0)
    with pytest.raises(ExperimentError, match="gradient_checkpointing=true: Linear cannot"):
        Clip(nn.Linear(2, 2), clip.tokenizer, 8, clip.mean, clip.std, clip.device).recompute()
    with pytest.raises(ExperimentError, match="gradient_checkpointing=1 must be of type bool"):
        config(gradient_checkpointing=1)
