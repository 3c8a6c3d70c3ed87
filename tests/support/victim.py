"""Jobs that are killed: `python victim.py [--reference]` imports once, then forks one child for each line it reads.

A line is a job and a folder. The answer is the child's process number, then its exit status (negative: the signal).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import AdamW  # noqa: E402

from nullspace_optim import Energy, NullSpaceOptimizer  # noqa: E402

TASKS, STEPS = 2, 5


def save(folder: Path) -> None:
    """Save two stores in turn, for ever."""
    from stores import full_store

    from nullspace_optim.files.basis_file import save as write
    from nullspace_optim.subspace.basis import BasisStore

    torch.manual_seed(0)
    large = full_store()
    large.buffers["large"] = torch.arange(200_000)
    (folder / "started").touch()
    while True:
        write(large, folder / "bases")
        write(BasisStore(), folder / "bases")


def train(folder: Path) -> None:
    """Train and consolidate three tasks, with a checkpoint after everything; go on where the last one stands."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, policy=Energy(0.9), precision="fast")
    first = (0, 0)
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = tuple(state["place"])
    for task in range(TASKS):
        for step in range(STEPS + 1):
            if (task, step) < first:
                continue
            if step < STEPS:
                _step(model, optimizer, *_batch(task, step))
            else:
                optimizer.consolidate([_batch(task, n)[0] for n in range(STEPS)], progress=False)
                optimizer.save(folder / "bases")
            _checkpoint(folder, model, optimizer, (task, step + 1))
    os.replace(folder / "state.pt", folder / "final.pt")


def _batch(task: int, step: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(1000 * task + step)
    return torch.randn(16, 24, generator=dice), torch.randn(16, 8, generator=dice)


def _step(model: nn.Module, optimizer: NullSpaceOptimizer, inputs: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()


def _checkpoint(folder: Path, model: nn.Module, optimizer: NullSpaceOptimizer, place: tuple[int, int]) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "place": place}
    torch.save(state, folder / "draft.pt")
    os.replace(folder / "draft.pt", folder / "state.pt")


def experiment(folder: Path, method: str, death: str = "") -> None:
    """Run (or resume) a small `reference.run` sequence on what `prepare` made; die of SIGKILL at the moment `death`."""
    from reference.methods import METHODS
    from reference.sequence import Sequence

    config, ready = PREPARED
    sequence = Sequence(ready, METHODS[method], config, 0, folder)
    if death:
        doom(sequence, death)
    finished = (folder / "results.json").exists()
    sequence.run(resume=True)
    if not finished:
        torch.save(sequence.clip.model.state_dict(), folder / "weights.draft")
        os.replace(folder / "weights.draft", folder / "weights.pt")


def doom(sequence: Any, death: str) -> None:
    """Let `sequence` die: `beginning`, `training-<task>`, `consolidation-<task>`, `saving-<task>`, `ending`."""
    moment, _, number = death.partition("-")
    task, method = int(number or 0), sequence.method
    if moment == "beginning":
        method.before_sequence = die
    elif moment == "training":
        after = method.after_step
        method.after_step = lambda batch: die() if (batch.task, batch.step) == (task, 3) else after(batch)
    elif moment == "consolidation":  # what it changed in memory is lost with the process
        finish = method.after_task
        method.after_task = lambda number: (finish(number), die() if number == task else None)[0]
    elif moment == "saving":
        write = torch.save

        def tear(state: Any, draft: Path) -> None:
            write(state, draft)
            if state["progress"]["task"] == task + 1:
                os.truncate(draft, draft.stat().st_size // 2)
                die()

        torch.save = tear
    else:
        move = os.replace

        def fall(draft: Path, path: Path) -> None:
            move(draft, path)
            if path.name == "results.json":
                die()

        os.replace = fall


def die(*ignored: object) -> None:
    """As a machine that is switched off: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def prepare() -> tuple[Any, Any]:
    """Render few images and train the tiny CLIP a little, once, before anything is killed."""
    from reference.config import load_config
    from reference.data import demo
    from reference.experiment import Experiment, prepare

    demo.TRAIN = demo.TEST = demo.PRETRAIN = 48
    config = load_config(
        "demo",
        {
            "tasks": ["colours", "photographs"], "iterations": 6, "pretrain_iterations": 2, "warmup": 2,
            "batch_size": 8, "evaluation_images": 40, "consolidation_images": 32, "reference_images": 32,
            "methods": "all", "output": "unused", "learning_rate": 3e-3, "ensemble_share": 0.3, "lora_rank": 4,
            "moe_experts": 6, "igsp": {"rank": 4, "window": 1, "cap": 3, "on_cap": "prune"},
        },
    )  # fmt: skip
    found = prepare(config)
    clip = found.pretrained(0)
    return config, Experiment(found.tasks, found.pool, lambda seed: clip)


def serve() -> None:
    """Fork a child for every line, tell its number, wait for it and tell its status."""
    jobs = {"save": save, "train": train, "experiment": experiment}
    print("ready", flush=True)
    for line in sys.stdin:
        name, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                job, *options = name.split(":")
                jobs[job](Path(folder), *options)
                status = 0
            except BaseException:
                (Path(folder) / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PREPARED = prepare() if "--reference" in sys.argv else ()
    serve()
