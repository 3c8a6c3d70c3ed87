"""Drift of protected models on real images: by base optimizer and projection, and by energy threshold.

    python -m reference.benchmarks.drift --data-root DIR --model DIR

First table: a CLIP of two blocks learns one task, the task is consolidated, then another is trained with each base
optimizer: without protection, with the gradient projected before the step (GPM, GNSP, PEFT's OSF), and with the anchor
correction after it. Its figure is the largest `||W U - A|| / ||A||` over the protected matrices `W` `[m, d]` with basis
`U` `[d, k]`. Second table: the given CLIP consolidates a task under several policies, then trains on another task; its
figures are what became of the first task's outputs on images that were not consolidated. A third table compares all
policies on scanned digits, offline: `--tables policies` (see `policies`).
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nullspace_optim import Fate, NullSpaceOptimizer, clip_forward
from nullspace_optim.policies import Energy, NumericalRank, Policy
from reference.benchmarks import outcome
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.benchmarks.policies import CPU, by_policy
from reference.benchmarks.workload import quiet
from reference.config import Config, load_config
from reference.data.folders import load_tasks
from reference.data.tasks import Task
from reference.evaluation.tables import reading
from reference.training.clip import Clip, assemble, class_logits, classification_loss, load_clip
from reference.training.steps import Batches, evaluate, train

HELD_OUT, PARTS = 1024, ("features", "logits")
PROJECTIONS = ("none", "gradient", "update")
POLICIES: tuple[Policy | None, ...] = (
    None, Energy(0.85), Energy(0.95), Energy(0.99), Energy(0.999), Energy(0.9999), NumericalRank(),
)  # fmt: skip

Base = Callable[[Sequence[nn.Parameter]], Optimizer]


BASES: dict[str, Base] = {
    "AdamW, decay 0.01": lambda p: AdamW(p, lr=1e-3, weight_decay=0.01),
    "SGD, momentum 0.9, decay 1e-3": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "SGD, momentum 0.9": lambda p: SGD(p, lr=0.05, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):  # it came with torch 2.9
    BASES["Muon"] = lambda p: cast(Any, torch.optim).Muon(p, lr=2e-3, weight_decay=0.01)


@dataclass(frozen=True)
class Scores:
    """Compared before and after: outputs on held-out images of the old task, its accuracy, the new task's loss."""

    features: Tensor
    logits: Tensor
    accuracy: float
    loss: float


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    options = parse(arguments)
    started = time.perf_counter()
    names, parts, where = options.tables.split(","), {"optimizers": by_optimizer, "thresholds": by_threshold}, CPU
    made = {"policies": by_policy(options)} if "policies" in names else {}
    if set(names) - {"policies"}:
        clip = load_clip(configuration(options, 1, 0.0))
        old, new = load_tasks(configuration(options, 1, 0.0), clip.size)[:2]
        made |= {name: parts[name](options, clip, old, new) for name in names if name != "policies"}
        where = clip.device
    tables = [made[name] for name in names]
    return finish("reference.benchmarks.drift", arguments, where, started, tables, options.output)


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = outcome.parser("drift", __doc__)
    parser.add_argument("--data-root", help="folder with one folder of images per task (not for policies)")
    parser.add_argument("--model", help="folder of an open_clip model, or <name>:<tag> (not for policies)")
    parser.add_argument("--old", default="eurosat", help="task that is consolidated")
    parser.add_argument("--new", default="dtd", help="task that is trained afterwards")
    parser.add_argument("--tables", default="optimizers,thresholds", help="which of optimizers,thresholds,policies")
    parser.add_argument("--optimizer-steps", type=int, default=500, help="steps on the new task in the first table")
    parser.add_argument("--steps", type=int, default=200, help="steps on the new task in the other tables")
    parser.add_argument("--rate", type=float, default=1e-4, help="largest learning rate in the second table")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--images", type=int, default=512, help="images of the old task that are consolidated")
    parser.add_argument("--seeds", default="0", help="numbers separated by commas")
    options = parser.parse_args(arguments)
    wrong = set(options.tables.split(",")) - {"optimizers", "thresholds", "policies"}
    if wrong:
        parser.error(f"--tables: {', '.join(sorted(wrong))} is not one of optimizers, thresholds, policies")
    if options.tables != "policies" and not (options.data_root and options.model):
        parser.error("the tables optimizers and thresholds need --data-root and --model")
    return options


def configuration(options: Namespace, steps: int, rate: float) -> Config:
    """The experiment's settings: both tasks, `steps` steps with warm-up and cosine, float32, no label smoothing."""
    settings = {
        "data_root": options.data_root, "model": options.model, "device": str(options.device), "output": "",
        "tasks": (options.old, options.new), "iterations": steps, "batch_size": options.batch, "learning_rate": rate,
        "warmup": min(10, steps // 10), "label_smoothing": 0.0, "precision": "float32",
    }  # fmt: skip
    return load_config("mini", settings)


def by_optimizer(options: Namespace, clip: Clip, old: Task, new: Task) -> Table:
    """Largest relative drift of a kept direction, per base optimizer and projection."""
    small = two_blocks(clip)
    learn = configuration(options, options.optimizer_steps // 5, 1e-3)
    train(small, AdamW(matrices(small.model), lr=1e-3), old, learn, plain_loss(small), seed=0)
    rows, losses = [], []
    for name, base in BASES.items():
        found = [kept_drift(small.copy(), base, mode, options, old, new) for mode in PROJECTIONS]
        rows.append((name, *(f"{drift:.1e}" for drift, _ in found)))
        losses.append(f"{name}: " + " / ".join(f"{after:.2f}" for _, after in found))
    chance = math.log(len(new.class_names))
    return Table(
        f"Relative drift of kept directions after {options.optimizer_steps} steps, by base optimizer",
        ("base optimizer", "no protection", "gradient projected before the step", "anchor correction"),
        tuple(rows),
        reading("optimizers", old=old.name, new=new.name, batch=options.batch, chance=chance, losses="; ".join(losses)),
    )


def two_blocks(clip: Clip) -> Clip:
    """A CLIP with two blocks of width 128 a tower and random weights, for the same images and tokens as `clip`."""
    torch.manual_seed(0)
    vision = {"image_size": clip.size, "layers": 2, "width": 128, "head_width": 32, "patch_size": clip.size // 4}
    given = cast(Any, clip.model)
    text = {"context_length": given.context_length, "vocab_size": given.vocab_size, "width": 128, "heads": 4}
    return assemble(
        open_clip.CLIP(embed_dim=128, vision_cfg=vision, text_cfg={**text, "layers": 2}),
        clip.tokenizer,
        str(clip.device),
    )


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The 2-D weights of all blocks and the two projections; every other parameter no longer trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 2 and ("resblocks" in name or "proj" in name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def kept_drift(clip: Clip, base: Base, mode: str, options: Namespace, old: Task, new: Task) -> tuple[float, float]:
    """Consolidate `old`, train `new`; the largest drift of a kept direction and the loss on the new task's images."""
    progress(f"drift by base optimizer: {mode}")
    optimizer: Optimizer = base(matrices(clip.model))
    guarded = NullSpaceOptimizer(optimizer, clip.model, project="gradient" if mode == "gradient" else "update")
    consolidate(guarded, clip, old, options.images)
    if mode == "none":
        guarded.detach()  # the anchors stay, to measure with
    else:
        optimizer = guarded
    config = configuration(options, options.optimizer_steps, optimizer.param_groups[0]["lr"])
    train(clip, optimizer, new, config, plain_loss(clip), seed=1)
    kept = guarded.verify().kept
    protected = [drift for name, drift in kept.items() if guarded.bases[name].fate is Fate.PROTECTED]
    return max(protected), training_loss(clip, new)


def by_threshold(options: Namespace, clip: Clip, old: Task, new: Task) -> Table:
    """Output drift, accuracy and plasticity, per policy; means over the seeds."""
    config = configuration(options, options.steps, options.rate)
    before = score(clip, old, new, config)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = []
    for policy in POLICIES:
        found = [after_new_task(clip.copy(), policy, seed, config, options.images, old, new) for seed in seeds]
        shares = mean(share for share, _ in found)
        scores = [after for _, after in found]
        drifts = [[relative(getattr(after, part), getattr(before, part)) for after in scores] for part in PARTS]
        accuracy = f"{before.accuracy:.1f} → {mean(after.accuracy for after in scores):.1f}"
        loss = f"{before.loss:.2f} → {mean(after.loss for after in scores):.3f}"
        name = repr(policy).replace("threshold=", "").replace("tolerance=None", "") if policy else "unprotected"
        rows.append((name, f"{shares:.0%}", *map(percent, drifts), accuracy, loss))
    held_out = min(HELD_OUT, len(old.test))
    return Table(
        f"Drift of the old task's outputs after {options.steps} AdamW steps on another task, by policy",
        (
            "policy", "protected directions", "drift of image features", "drift of logits",
            "accuracy on the old task (%)", "training loss of the new task",
        ),
        tuple(rows),
        reading("thresholds", old=old.name, images=min(options.images, len(old.train)), held_out=held_out,
                new=new.name, batch=options.batch, rate=options.rate, seeds=len(seeds)),
    )  # fmt: skip


def after_new_task(
    clip: Clip, policy: Policy | None, seed: int, config: Config, images: int, old: Task, new: Task
) -> tuple[float, Scores]:
    """Consolidate `old` under `policy`, if any, then train `new`: share of protected directions, and scores."""
    progress(f"drift by threshold: {policy}, seed {seed}")
    trained = [parameter for parameter in clip.model.parameters() if parameter.requires_grad]
    optimizer: Optimizer = AdamW(trained, lr=config.learning_rate, weight_decay=0.01)
    share = 0.0
    if policy is not None:
        optimizer = NullSpaceOptimizer(optimizer, clip.model, policy=policy, project="update")
        consolidate(optimizer, clip, old, images)
        found = [basis.main for basis in optimizer.bases.values() if basis.main is not None]
        share = mean(subspace.rank / subspace.dimension for subspace in found if subspace.side != "rows")
    train(clip, optimizer, new, config, plain_loss(clip), seed=seed)
    return share, score(clip, old, new, config)


@torch.no_grad()
def score(clip: Clip, old: Task, new: Task, config: Config) -> Scores:
    """Outputs and accuracy on the old task's test images, loss on the new task's training images."""
    clip.model.eval()
    images = clip.normalised(old.test.drawn(HELD_OUT, seed=0).images)
    model = cast(Any, clip.model)
    tokens = clip.tokens(old.prompts())
    parts = [images[start : start + 64] for start in range(0, len(images), 64)]
    features = torch.cat([model.encode_image(part, normalize=True) for part in parts])
    logits = torch.cat([class_logits(clip.model, part, tokens) for part in parts])
    right = evaluate(clip, old, replace(config, evaluation_images=None))
    return Scores(features, logits, right, training_loss(clip, new))


def relative(now: Tensor, then: Tensor) -> float:
    """`||now - then|| / ||then||`."""
    return float((now - then).norm() / then.norm())


def percent(values: Sequence[float]) -> str:
    """The mean in percent, two digits; of several values also smallest and largest."""
    texts = [f"{100 * value:.2g} %" for value in (mean(values), min(values), max(values))]
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def consolidate(optimizer: NullSpaceOptimizer, clip: Clip, task: Task, images: int) -> None:
    """Protect `task`: its images and its prompts."""
    clip.model.eval()
    loader = Batches(clip, task.train.drawn(images, seed=0))
    forward = clip_forward(clip.model, clip.tokens(task.prompts()))
    with quiet():
        optimizer.consolidate(loader, name=task.name, forward=forward, progress=False)


def plain_loss(clip: Clip) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Cross entropy over the task's classes."""
    return lambda images, labels, tokens: classification_loss(clip.model, images, labels, tokens, 0.0)


@torch.no_grad()
def training_loss(clip: Clip, task: Task) -> float:
    """Mean loss over all training images of `task`."""
    clip.model.eval()
    tokens = clip.tokens(task.prompts())
    loss = plain_loss(clip)
    total = sum(float(loss(images, labels, tokens)) * len(labels) for images, labels in Batches(clip, task.train))
    return total / len(task.train)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
