"""Pretrain a small CLIP (about 8 M parameters without unused tokens) for experiments on images of one's own.

python -m reference.studies.pretrain --tasks-root DIR --captions DIR --size 96 --steps 8000 --output DIR
python -m reference.studies.pretrain ... --leave-out flowers102,food101    never sees the classes of these tasks

It learns from the *training* images of folders `<task>/train/<class>/`, in the words of the task's prompt templates,
and from folders with a `captions.csv`. An image that also lies in a `test` folder is left out, pixel for pixel. With
`--leave-out` no image or caption of those tasks' classes is seen, wherever it comes from, so that accuracy on them
before fine-tuning is zero-shot. `--output` becomes a model folder for `--model`, with `pretraining.json`: losses,
accuracy on every task before fine-tuning and by a linear probe. A killed or interrupted run goes on with the same
command.

Meant for a GPU, where it has not been run yet; the tests train a tiny one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from nullspace_optim.clip import alignment_loss
from reference.command import StopRequest, carried_out
from reference.config import Config
from reference.data.folders import load_reference_pool, load_tasks
from reference.data.tasks import Split, Task
from reference.errors import ExperimentError
from reference.sequence import StoppedError
from reference.training.clip import Clip, assemble
from reference.training.compact import CONFIG, TABLE, WEIGHTS
from reference.training.features import image_features
from reference.training.steps import Batch, Learner, Schedule, Step, evaluate, learn, seeded
from reference.training.tracking import machine, provenance, write_json, writing

CONTEXT, VOCABULARY = 24, 49408
SMALLEST, HOTTEST = 0.5, math.log(100)  # share of the image in a crop; bound of logit_scale
SAVE_EVERY = 500

Captioned = tuple[Tensor, tuple[str, ...]]  # images `[n, 3, s, s]` and a caption each


@dataclass(frozen=True)
class Gathered:
    """Images `[n, 3, s, s]`, uint8, each of a `kind` `[n]` that any of its `sentences` describes; what was left out."""

    images: Tensor
    kind: Tensor
    sentences: tuple[tuple[str, ...], ...]
    left_out: dict[str, int]


def gather(tasks: Sequence[Task], pools: Sequence[Captioned], leave_out: Sequence[str]) -> Gathered:
    """Training images of `tasks` and captioned images, without test images and without the classes of `leave_out`.

    Raises:
        ExperimentError: `leave_out` names an unknown task, or nothing is left.
    """
    known = {task.name: task for task in tasks}
    unknown = sorted(set(leave_out) - known.keys())
    if unknown:
        raise ExperimentError(f"--leave-out {unknown[0]}: no such task below --tasks-root ({', '.join(known)})")
    unseen = [_whole_words(name) for task in leave_out for name in known[task].class_names]
    tests = {_digest(image) for task in tasks for image in task.test.images[:]}
    kinds: dict[tuple[str, ...], int] = {}
    images, labels, counts = [], [], {"test images": 0, "unseen classes": 0}
    for name, pictures, sentences in _described(tasks, pools):
        for picture, sentence in zip(pictures, sentences):
            hidden = name in leave_out or any(word.search(sentence[0].lower()) for word in unseen)
            if hidden or _digest(picture) in tests:
                counts["unseen classes" if hidden else "test images"] += 1
                continue
            labels.append(kinds.setdefault(sentence, len(kinds)))
            images.append(picture)
    if not images:
        raise ExperimentError("no image is left to train on; give --captions, or leave fewer tasks out")
    return Gathered(torch.stack(images), torch.tensor(labels), tuple(kinds), counts)


def _described(tasks: Sequence[Task], pools: Sequence[Captioned]) -> list[tuple[str, Tensor, list[tuple[str, ...]]]]:
    """Name, images and the sentences of each image, of every task and pool."""
    parts = []
    for task in tasks:
        of_class = [tuple(text.format(name) for text in task.templates) for name in task.class_names]
        parts.append((task.name, task.train.images[:], [of_class[label] for label in task.train.labels.tolist()]))
    return parts + [("", images, [(caption,) for caption in captions]) for images, captions in pools]


def _whole_words(name: str) -> re.Pattern[str]:
    """Finds a class name, or its plural, as whole words of a sentence in small letters."""
    return re.compile(rf"(?<!\w){re.escape(name.lower())}(s|es)?(?!\w)")


def _digest(image: Tensor) -> bytes:
    return hashlib.sha256(image.numpy().tobytes()).digest()


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """The architecture as open_clip takes it: 8 x 8 patches whatever the size.

    Raises:
        ExperimentError: a size or width that cannot be divided.
    """
    for name, part, least in (("size", 8, 16), ("width", 32, 32), ("text_width", 32, 32)):
        if getattr(options, name) % part or getattr(options, name) < least:
            raise ExperimentError(f"--{name.replace('_', '-')} {getattr(options, name)} must be a multiple of {part}")
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": options.text_width}
    return {
        "embed_dim": options.width,
        "vision_cfg": {
            "image_size": options.size, "layers": options.layers, "width": options.width, "head_width": 32,
            "patch_size": options.size // 8,
        },
        "text_cfg": {**text, "heads": options.text_width // 32, "layers": options.text_layers},
    }  # fmt: skip


class Pretraining(Learner):
    """One training: contrastive, with targets that share their mass among images of one kind; saved now and then."""

    def __init__(self, gathered: Gathered, options: argparse.Namespace, stop: Callable[[], bool]) -> None:
        self.gathered, self.options, self.stop = gathered, options, stop
        given = {"batch_size": options.batch_size, "precision": options.precision, "device": options.device}
        self.config = Config("demo", options.output, **given)
        self.shape = shape(options)
        torch.manual_seed(options.seed)
        model = open_clip.CLIP(**self.shape)
        self.clip = assemble(model, open_clip.SimpleTokenizer(context_length=CONTEXT), options.device)
        model.logit_scale.requires_grad_(True)
        self.tokens = [self.clip.tokens(sentences) for sentences in gathered.sentences]
        self.rows = torch.cat(self.tokens).unique().cpu()
        self.optimizer = AdamW(model.parameters(), lr=options.rate, weight_decay=0.1, betas=(0.9, 0.98))
        self.optimizer.register_step_pre_hook(lambda *_: clip_grad_norm_(model.parameters(), 1.0) and None)
        self.schedule = Schedule(options.steps, options.rate, min(options.steps // 10, 500))
        self.step, self.losses = 0, list[float]()
        self.path = Path(options.output) / "pretraining.pt"

    def train(self) -> None:
        """Train to the end.

        Raises:
            StoppedError: after `stop()` became true; everything is saved.
        """
        self._load()
        split = Split(self.gathered.images, self.gathered.kind)
        task = Task("pretraining", tuple(first for first, *_ in self.gathered.sentences), ("{}",), split, split)
        learn(
            self, task, self.config, self.schedule, self.options.seed, first_step=self.step, after_step=self._took,
            smallest_crop=SMALLEST,
        )  # fmt: skip

    def _took(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.step = step.number + 1
        asked = self.stop() and self.step < self.options.steps
        if asked or self.step % SAVE_EVERY == 0:
            self._save()
        if asked:
            raise StoppedError

    def loss(self, batch: Batch) -> Tensor:
        """The alignment loss of the images and a random sentence of each."""
        draw, model = seeded(self.options.seed, batch.step), self.clip.model
        of_kind = [self.tokens[kind] for kind in batch.labels.tolist()]
        tokens = torch.stack([some[int(torch.randint(len(some), (1,), generator=draw))] for some in of_kind])
        return alignment_loss(model(batch.images, tokens), batch.labels, smoothing=0.0)

    def after_step(self, batch: Batch) -> None:
        """Bound the temperature, as CLIP does."""
        self.clip.model.logit_scale.data.clamp_(0, HOTTEST)  # type: ignore[operator,union-attr]

    def _identity(self) -> str:
        ignored = ("output", "device", "tasks_root", "captions")
        given = {name: value for name, value in vars(self.options).items() if name not in ignored}
        return json.dumps({**given, "images": len(self.gathered.images), "kinds": len(self.tokens)})

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = {"model": self.clip.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with writing(self.path) as draft:
            torch.save({**parts, "step": self.step, "losses": self.losses, "identity": self._identity()}, draft)

    def _load(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.clip.device, weights_only=True)
        if state["identity"] != self._identity():
            raise ExperimentError(
                f"{self.path} was made with other options or images ({state['identity']}); choose another --output"
            )
        self.clip.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]


def save_compact(model: nn.Module, shape: dict[str, Any], rows: Tensor, folder: Path) -> int:
    """Write `model`, made from `open_clip.CLIP(**shape)`, whose trained tokens are `rows` `[r]`; returns the bytes.

    Raises:
        ExperimentError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
    state[TABLE] = state[TABLE][rows].contiguous()
    write_json(folder / CONFIG, {"model_cfg": shape, "preprocess_cfg": {}})
    with writing(folder / WEIGHTS) as draft:
        save_file({**state, "token_rows": rows.to(torch.int32)}, draft)
    return (folder / WEIGHTS).stat().st_size


def probe(clip: Clip, task: Task, config: Config) -> float:
    """Test accuracy in percent of logistic regression on the image features of the training images."""
    train, test = (image_features(clip, part.images, config).cpu().numpy() for part in (task.train, task.test))
    fitted = LogisticRegression(max_iter=1000, C=10.0).fit(train, task.train.labels.numpy())
    return 100 * float(fitted.score(test, task.test.labels.numpy()))


def report(run: Pretraining, tasks: Sequence[Task], size: int, seconds: float) -> dict[str, Any]:
    """Content of `pretraining.json`."""
    options, losses = run.options, run.losses
    run.clip.model.logit_scale.requires_grad_(False)
    table = VOCABULARY - len(run.rows)
    return {
        "options": {
            name: value for name, value in vars(options).items() if name not in ("output", "tasks_root", "captions")
        },
        "images": len(run.gathered.images),
        "kinds": len(run.tokens),
        "left_out": run.gathered.left_out,
        "parameters": sum(p.numel() for p in run.clip.model.parameters()) - table * options.text_width,
        "bytes": size,
        "loss": [float(np.mean(part)) for part in np.array_split(losses, min(20, len(losses)))],
        "accuracy": {task.name: evaluate(run.clip, task, run.config) for task in tasks},
        "linear_probe": {task.name: probe(run.clip, task, run.config) for task in tasks},
        "chance": {task.name: 100 / len(task.class_names) for task in tasks},
        "seconds": seconds,
        "machine": machine(),
        "torch": torch.__version__,
        **provenance(),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.studies.pretrain", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tasks-root", required=True, help="folder of tasks, <task>/{train,test}/<class>/<image>")
    parser.add_argument("--captions", action="append", default=[], help="folder with captions.csv; may be repeated")
    parser.add_argument("--leave-out", default="", help="tasks whose classes are never seen, separated by commas")
    parser.add_argument("--output", required=True, help="folder of the model")
    for name, value, what in (
        ("size", 64, "pixels, 64 to 112"), ("width", 256, "of the image tower"), ("layers", 7, "of the image tower"),
        ("text-width", 192, "of the text tower"), ("text-layers", 4, "of the text tower"), ("steps", 8000, "in all"),
        ("batch-size", 512, "images a step"), ("seed", 0, "of weights and batches"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default {value})")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate (default 1e-3)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="of forward passes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Gather, train, save and measure; returns the exit status (0, 2 for an error, 130 when interrupted)."""
    options = parse(arguments)
    return carried_out(lambda: pretrain(options), lambda: "the same command goes on")


def pretrain(options: argparse.Namespace) -> None:
    """Gather, train, save and measure, or go on with what was begun.

    Raises:
        StoppedError: on Ctrl-C; everything is saved.
    """
    started = time.perf_counter()
    shape(options)
    places = {"data_root": options.tasks_root, "model": "none"}
    tasks = load_tasks(Config("mini", options.output, **places), options.size)
    pools = [
        load_reference_pool(
            Config("mini", options.output, reference_root=root, reference_images=10**9, **places), options.size
        )
        for root in options.captions
    ]
    leave_out = [name for name in options.leave_out.split(",") if name]
    gathered = gather(tasks, [(pool.images, pool.captions) for pool in pools], leave_out)
    run = Pretraining(gathered, options, StopRequest())
    run.train()
    folder = Path(options.output)
    size = save_compact(run.clip.model, run.shape, run.rows, folder)
    write_json(folder / "pretraining.json", report(run, tasks, size, time.perf_counter() - started))
    run.path.unlink(missing_ok=True)
    print((folder / "pretraining.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
