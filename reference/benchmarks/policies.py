"""Promise and cost of every policy, on scanned digits: drift, plasticity, memory, time.

    python -m reference.benchmarks.drift --tables policies

A network `[64] -> [256] -> [256]` with a head `[5]` a task learns the digits 0 to 4, they are consolidated under each
policy, then it learns 5 to 9 with AdamW. The images are scikit-learn's; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import yaml
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import nullspace_optim
from nullspace_optim import NullSpaceOptimizer, Policy
from nullspace_optim.methods import consolidate_classes
from nullspace_optim.policies import CGP
from reference.benchmarks.outcome import Table, progress
from reference.benchmarks.workload import in_turn, quiet, ratio
from reference.evaluation.tables import reading

Point = tuple[float, float]
CPU = torch.device("cpu")
WARM_UP = 300
BATCH = 64
TIMED = 20
POLICIES: dict[str, Policy | None] = {
    name: getattr(nullspace_optim.policies, rule)(*arguments) if rule else None
    for name, (rule, *arguments) in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
}


class Network(nn.Module):
    """Two hidden layers that both tasks share, and a head a task."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.heads = nn.ModuleDict({"old": nn.Linear(256, 5), "new": nn.Linear(256, 5)})

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Logits `[n, 5]` of one task."""
        return self.heads[task](self.shared(images))


@dataclass(frozen=True)
class Digits:
    """Images `[n, 64]` in 0..1 and labels 0 to 4 of one half of the digits."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def by_policy(options: argparse.Namespace) -> Table:
    """One row a policy, means over the seeds; with ``--output`` also the figure `policies.png`."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found: dict[str, list[Mapping[str, float]]] = {}
    for name, policy in POLICIES.items():
        progress(f"drift by policy: {name}")
        found[name] = [run(policy, seed, options.steps) for seed in seeds]
    rows = [(name, *_cells({key: mean(one[key] for one in runs) for key in runs[0]})) for name, runs in found.items()]
    table = Table(
        f"What each policy keeps and costs, after {options.steps} AdamW steps on another task",
        (
            "policy", "kept", "allowed moves only", "drift of consolidated outputs", "drift of held-out outputs",
            "accuracy on the old task (%)", "accuracy on the new task (%)", "bytes per weight byte", "step",
            "consolidation (s)",
        ),
        tuple(rows),
        reading("policies", timed=TIMED, seeds=len(seeds)),
    )  # fmt: skip
    if options.output:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        save_figure(table, Path(options.output) / "policies.png")
    return table


def save_figure(table: Table, path: Path) -> None:
    """Draw stability against plasticity: drift of held-out outputs over the new task's error, a number a policy."""
    columns = [table.header.index(name) for name in ("accuracy on the new task (%)", "drift of held-out outputs")]
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    numbers: dict[Point, list[int]] = {}
    for number, row in enumerate(table.rows):
        accuracy, drift = (float(row[column].split()[0]) for column in columns)
        color = "#c9432f" if row[0] == "unprotected" else "#1f6a96"
        point = max(100 - accuracy, 0.1), max(drift, 1e-4)
        axes.scatter(*point, color=color, zorder=3, label=f"{number}  {row[0]}")
        numbers.setdefault(point, []).append(number)
    axes.set(xscale="log", yscale="log", xlabel="error on the new task (%)", ylabel="drift of old held-out outputs (%)")
    axes.margins(0.09)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=0)
    for point, found in numbers.items():
        axes.annotate(", ".join(map(str, found)), point, (5, 4), textcoords="offset points", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def run(policy: Policy | None, seed: int, steps: int) -> dict[str, float]:
    """Train, consolidate, train; return every figure of one row."""
    torch.manual_seed(seed)
    old, new = digits("old", 0, seed), digits("new", 5, seed)
    model = Network()
    base = AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    train(model, base, old, WARM_UP, seed)
    before = [outputs(model, part[0], "old") for part in (old.train, old.test)]
    accuracy = right(model, old)
    base = AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    costs = {"kept": 0.0, "allowed": float("nan"), "bytes": 0.0, "seconds": 0.0}
    optimizer: Optimizer = base
    if policy is not None:
        optimizer, costs = protected(base, model, policy, old)
    train(model, optimizer, new, steps, seed)
    if isinstance(optimizer, NullSpaceOptimizer):
        costs["allowed"] = optimizer.verify().worst
    after = [outputs(model, part[0], "old") for part in (old.train, old.test)]
    drifts = [float((now - then).norm() / then.norm()) for now, then in zip(after, before, strict=True)]
    return {
        **costs, "drift": drifts[0], "held out": drifts[1], "before": accuracy, "after": right(model, old),
        "new": right(model, new), "step": step_cost(model, optimizer, new),
    }  # fmt: skip


def protected(
    base: Optimizer, model: nn.Module, policy: Policy, old: Digits
) -> tuple[NullSpaceOptimizer, dict[str, float]]:
    """Consolidate the old task; the optimizer, and what it cost."""
    optimizer = NullSpaceOptimizer(base, model, policy=policy, project="update")
    images, labels = old.train
    with quiet():
        if isinstance(policy, CGP):
            by_class = consolidate_classes(
                optimizer, [(images, labels)], lambda b: b[1], name="old", forward=lambda b: model(b[0], "old"),
                progress=False,
            )  # fmt: skip
            reports = list(by_class.values())
        else:
            batches = images.split(128)
            reports = [optimizer.consolidate(batches, name="old", forward=lambda b: model(b, "old"), progress=False)]
    weights = sum(p.nbytes for p in model.parameters())
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2 and "new" not in name]
    shares = [1 - optimizer.capacity()[name] for name in matrices]
    seconds = sum(report.seconds for report in reports)
    return optimizer, {
        "kept": mean(shares), "allowed": float("nan"), "bytes": reports[-1].bytes / weights, "seconds": seconds,
    }  # fmt: skip


def digits(name: str, first: int, seed: int) -> Digits:
    """The scanned digits from `first` to `first + 4`, 70 % of them to train on."""
    images, targets = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    chosen = (targets >= first) & (targets < first + 5)
    images, targets = images[chosen].float() / 16, targets[chosen].long() - first
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, targets, cut = images[order], targets[order], int(0.7 * len(order))
    return Digits(name, (images[:cut], targets[:cut]), (images[cut:], targets[cut:]))


def train(model: nn.Module, optimizer: Optimizer, task: Digits, steps: int, seed: int) -> None:
    """Train on random batches."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = task.train
    for _ in range(steps):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        one_step(model, optimizer, task.name, images[index], labels[index])


def one_step(model: nn.Module, optimizer: Optimizer, task: str, images: Tensor, labels: Tensor) -> None:
    """One training step."""
    optimizer.zero_grad()
    F.cross_entropy(model(images, task), labels).backward()
    optimizer.step()


def step_cost(model: nn.Module, optimizer: Optimizer, task: Digits) -> float:
    """Time of a training step over that of the bare base optimizer."""
    if not isinstance(optimizer, NullSpaceOptimizer):
        return 1.0
    twin = Network()
    bare = AdamW(twin.parameters(), lr=1e-3, weight_decay=0.01)
    images, labels = task.train
    runs = {
        "with": lambda: one_step(model, optimizer, task.name, images, labels),
        "without": lambda: one_step(twin, bare, task.name, images, labels),
    }
    found = in_turn(runs, TIMED, CPU)
    return ratio(found["with"], found["without"])


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, task: str) -> Tensor:
    """Logits `[n, 5]`."""
    return model(images, task)


def right(model: nn.Module, task: Digits) -> float:
    """Accuracy on the test images, in percent."""
    images, labels = task.test
    return 100 * float((outputs(model, images, task.name).argmax(1) == labels).float().mean())


def _cells(row: Mapping[str, float]) -> tuple[str, ...]:
    return (
        f"{row['kept']:.0%}",
        "" if row["allowed"] != row["allowed"] else f"{row['allowed']:.0e}",
        f"{100 * row['drift']:.2g} %",
        f"{100 * row['held out']:.2g} %",
        f"{row['before']:.1f} → {row['after']:.1f}",
        f"{row['new']:.1f}",
        f"{row['bytes']:.2f}",
        f"{row['step']:.2f}",
        f"{row['seconds']:.2f}",
    )
