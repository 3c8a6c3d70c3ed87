"""Cost of published packages beside ours, on the same model and batch: step, preparation, memory, by rank.

    python -m reference.benchmarks.peers       ViT-B/32, 2 blocks a tower

All methods train the same matrices, the two linear layers of every MLP (`c_fc` and `c_proj`): PEFT replaces modules and
cannot replace open_clip's attention. `k/d` is the share of directions that is kept: ours and dense `P` keep `k` of the
`d` inputs; PEFT's OSF keeps `k` of `min(m, d)` singular directions of each weight on both sides; GaLore, which protects
nothing, projects gradients to the other `min(m, d) - k`. Packages: `python -m pip install peft galore-torch`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import NullSpaceOptimizer, clip_forward
from reference.benchmarks import outcome, workload
from reference.benchmarks.outcome import Outcome, Table, finish, progress, saved_bytes
from reference.benchmarks.step import RATE, Trainer
from reference.benchmarks.workload import Share, build, fill, protected_at_random, quiet, random_batch, ratio, seconds
from reference.evaluation.tables import reading

GAP = 200  # steps between two decompositions of GaLore, its own default
TOKENS = 50  # rows that an image gives in ViT-B/32


@dataclass
class Contender:
    """A trainer, seconds of its preparation, the tensors that its method holds outside model and optimizer, and what
    tells the bytes of the files it writes.
    """

    trainer: Trainer
    preparation: float | None = None
    tensors: list[Tensor] = field(default_factory=list)
    file: Callable[[], int] | None = None

    @property
    def held(self) -> int:
        """Bytes of parameters, buffers, optimizer state and the method's own tensors, shared memory once."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        found = [*model.parameters(), *model.buffers(), *self.tensors]
        for state in optimizer.state.values():
            projector = getattr(state.get("projector"), "ortho_matrix", None)
            found += [value for value in (*state.values(), projector) if isinstance(value, Tensor)]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())


class Projected(AdamW):
    """AdamW after `G <- G P`: the step of Adam-NSCL, GPM and GNSP with their stored `P` `[d, d]`."""

    def __init__(self, parameters: Sequence[Tensor], projectors: Sequence[Tensor]) -> None:
        super().__init__(parameters, lr=RATE)
        self.pairs = list(zip(parameters, projectors, strict=True))

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Project every gradient, then step."""
        with torch.no_grad():
            for parameter, projector in self.pairs:
                parameter.grad = parameter.grad @ projector  # type: ignore[operator]
        return super().step(closure)


def main(arguments: Sequence[str]) -> Outcome:
    """Run what the command line asks for."""
    options = parse(arguments)
    started = time.perf_counter()
    table = by_rank(options, options.device)
    return finish("reference.benchmarks.peers", arguments, options.device, started, [table], options.output)


def parse(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = outcome.parser("peers", __doc__)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture, or tiny")
    parser.add_argument("--blocks", type=int, default=2, help="use only so many blocks of each tower")
    parser.add_argument("--batch", type=int, default=32, help="image-text pairs a step")
    parser.add_argument("--images", type=int, default=32, help="images that are consolidated")
    parser.add_argument("--repeats", type=int, default=3, help="turns a figure")
    parser.add_argument("--shares", default="1/16,1/4,1/2,3/4,15/16", help="k/d of every matrix, fractions")
    parser.add_argument("--methods", default="exact,fast,dense,osf,galore", help=f"which of {','.join(METHODS)}")
    return parser.parse_args(arguments)


def prepared(options: Namespace, device: torch.device) -> Namespace:
    """The model that all methods train, everything but its MLPs frozen, and the sizes of their data."""
    model = build(options.model, options.blocks, device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name and name.endswith("weight"))
    return Namespace(model=model, batch=options.batch, images=options.images, device=device)


def plain(task: Namespace, share: float) -> Contender:
    """AdamW without protection."""
    model = copy.deepcopy(task.model)
    return _contender(task, model, AdamW(_trained(model), lr=RATE))


def ours(task: Namespace, share: float) -> Contender:
    """One consolidation, then the correction of every step."""
    model = copy.deepcopy(task.model)
    base = AdamW(_trained(model), lr=RATE)
    optimizer = NullSpaceOptimizer(base, model, policy=Share(share), project="update")
    batch = random_batch(model, task.images, task.device, seed=1)
    forward = clip_forward(model, batch.tokens)
    with quiet():
        took = seconds(lambda: optimizer.consolidate([batch.images], forward=forward, progress=False), task.device)
    return _guarded(task, model, optimizer, took)


def ours_fast(task: Namespace, share: float) -> Contender:
    """The same step with fast products; its consolidation is that of `ours`, so random directions serve here."""
    model = copy.deepcopy(task.model)
    optimizer = protected_at_random(AdamW(_trained(model), lr=RATE), model, "fast")
    fill(optimizer, share)
    return _guarded(task, model, optimizer, None)


def _guarded(task: Namespace, model: nn.Module, optimizer: NullSpaceOptimizer, took: float | None) -> Contender:
    sides = [side for basis in optimizer.bases.values() for side in basis.subspaces.values()]
    held = [tensor for side in sides for tensor in (side.basis, side.anchor)]
    return _contender(task, model, optimizer, took, held, lambda: saved_bytes(optimizer.save))


def dense(task: Namespace, share: float) -> Contender:
    """The gradient times a dense `P` before AdamW; prepared by a full SVD of every Gram matrix, as GNSP does."""
    model = copy.deepcopy(task.model)
    projectors, took = [], 0.0
    for weight in _trained(model):
        vectors, once = gram_svd(weight.shape[1], TOKENS * task.images, task.device)
        free = vectors[:, round(share * len(vectors)) :]
        projectors.append(free @ free.T)
        took += once
    size = sum(projector.nbytes for projector in projectors)
    return _contender(task, model, Projected(_trained(model), projectors), took, projectors, lambda: size)


@cache
def gram_svd(size: int, rows: int, device: torch.device) -> tuple[Tensor, float]:
    """All singular vectors of a Gram matrix `[size, size]` of noise, and the seconds they take; each size once."""
    x = torch.randn(rows, size, device=device)
    found: list[Tensor] = []
    took = seconds(lambda: found.append(torch.linalg.svd(x.T @ x)[0]), device)
    return found[0], took


def osf(task: Namespace, share: float) -> Contender:
    """PEFT's orthogonal subspace fine-tuning of the same modules."""
    peft = importlib.import_module("peft")
    config = peft.OSFConfig(effective_rank=share, target_modules=["c_fc", "c_proj"])
    wrapped: list[Any] = []
    took = seconds(lambda: wrapped.append(peft.get_peft_model(copy.deepcopy(task.model), config)), task.device)
    base = AdamW(_trained(wrapped[0]), lr=RATE)
    return _contender(task, wrapped[0], base, took, (), lambda: saved_bytes(wrapped[0].save_pretrained))


def galore(task: Namespace, share: float) -> Contender:
    """GaLore's AdamW of the same matrices; its preparation is its first step, where it decomposes all gradients."""
    galore_torch = importlib.import_module("galore_torch")
    model = copy.deepcopy(task.model)
    groups: dict[int, list[Tensor]] = {}
    for weight in _trained(model):
        groups.setdefault(min(weight.shape) - round(share * min(weight.shape)), []).append(weight)
    settings = {"update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    chosen = [{"params": weights, "rank": rank, **settings} for rank, weights in groups.items()]
    contender = _contender(task, model, galore_torch.GaLoreAdamW(chosen, lr=RATE, no_deprecation_warning=True))
    contender.preparation = contender.trainer.timed_step()[1]
    return contender


METHODS: dict[str, tuple[str, Callable[[Namespace, float], Contender]]] = {
    "plain": ("AdamW, no protection", plain),
    "exact": ("ours, exact", ours),
    "fast": ("ours, fast", ours_fast),
    "dense": ("dense P before AdamW", dense),
    "osf": ("PEFT OSF", osf),
    "galore": ("galore-torch", galore),
}
PACKAGES = {"osf": "peft", "galore": "galore_torch"}


def by_rank(options: Namespace, device: torch.device) -> Table:
    """Steps of all methods in turn, at every share."""
    task = prepared(options, device)
    batch = random_batch(task.model, options.images, device, seed=1)
    with torch.no_grad():
        forward = median(seconds(lambda: task.model(batch.images, batch.tokens), device) for _ in range(3))
    rows: list[tuple[str, ...]] = []
    for share in map(Fraction, options.shares.split(",")):
        contenders = {}
        for name in ["plain", *installed(options.methods)]:
            progress(f"k/d {share}: preparing {name}")
            contenders[name] = METHODS[name][1](task, float(share))
        progress(f"k/d {share}: steps")
        rows += [(str(share), *row) for row in _rows(contenders, options.repeats, device)]
    return Table(
        f"Methods compared, {options.model}, {options.blocks} blocks a tower, MLPs only, batch {options.batch}",
        ("k/d", "method", "step with / without", "added (ms)", "preparation (s)", "held (MB)", "file (MB)"),
        tuple(rows),
        reading("peers", repeats=options.repeats, images=options.images, forward=forward),
    )


def _rows(contenders: Mapping[str, Contender], repeats: int, device: torch.device) -> Iterator[tuple[str, ...]]:
    steps = {name: contender.trainer.timed_step for name, contender in contenders.items()}
    found = workload.in_turn(steps, repeats, device)
    for name, contender in contenders.items():
        if name != "plain":
            added = 1e3 * (median(found[name]) - median(found["plain"]))
            held = (contender.held - contenders["plain"].held) / 1e6
            prepared = "as exact" if contender.preparation is None else f"{contender.preparation:.2f}"
            times = (f"{ratio(found[name], found['plain']):.3f}", f"{added:+.0f}", prepared)
            file = "" if contender.file is None else f"{contender.file() / 1e6:.1f}"
            yield METHODS[name][0], *times, f"{held:+.1f}", file


def installed(methods: str) -> list[str]:
    """Return the asked methods whose package is there; say how to install the others."""
    asked, there = methods.split(","), []
    for name in asked:
        package = PACKAGES.get(name)
        if package is None or importlib.util.find_spec(package) is not None:
            there.append(name)
        else:
            progress(f"{METHODS[name][0]} is left out: python -m pip install {package.replace('_', '-')}")
    return there


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _contender(
    task: Namespace,
    model: nn.Module,
    optimizer: Any,
    preparation: float | None = None,
    tensors: Sequence[Tensor] = (),
    file: Callable[[], int] | None = None,
) -> Contender:
    batch = random_batch(task.model, task.batch, task.device)
    return Contender(Trainer(model, optimizer, batch, torch.float32), preparation, list(tensors), file)


if __name__ == "__main__":
    main(sys.argv[1:])
