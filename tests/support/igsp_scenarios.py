"""What must hold in mode "igsp" on several ranks; each scenario runs on all of them (see `processes`)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ddp_scenarios import everyone, refusal
from fsdp_scenarios import sharded
from models import Tensors, compare, seeded, share
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from nullspace_optim import IGSP, ConsolidationError, NullSpaceOptimizer

WIDTH = 16
OPTIONS: dict[str, Any] = {
    "target_modules": ("first", "block"), "rank": 2, "candidates": 2, "cap": 12, "window": 3, "warmup": 3,
    "on_cap": "prune", "lr": 0.05, "strength": 0.5,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "shared": {"router": "shared", "router_after": "train"},
    "bottleneck": {"kind": "bottleneck", "orthogonal": "both", "price": "flat"},
    "structural": {
        "orthogonal": "structural",
        "regularization": "both",
        "gate_scale": "width",
        "on_cap": "keep",
        "strength": 0.01,
    },
    "by hand": {"strength": 2.0},
    "accumulated": {"top_k": 1},
}
STEPS = 20
BASES = ("/inputs", "/outputs", "/gates")


class Tower(nn.Module):
    """Three layers, of which two get experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.first(x).tanh()))


class Branches(nn.Module):
    """Positive batches take one branch, others the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if bool(x[0, 0] > 0) else self.block(x)


def inputs(task: int, seed: int, count: int = 16) -> Tensor:
    """Return inputs `[n, 16]` near a place of their own for each task."""
    generator = torch.Generator().manual_seed(1000 * task + seed)
    place = torch.randn(WIDTH, generator=torch.Generator().manual_seed(task))
    return torch.randn(count, WIDTH, generator=generator) + place


def loader(task: int) -> list[Tensor]:
    return [inputs(task, 500 + number) for number in range(5)]


def wrap(model: nn.Module, base: type = SGD, **options: Any) -> Any:
    momentum = {"momentum": 0.9} if base is SGD else {}
    optimizer: Any = NullSpaceOptimizer(
        base(model.parameters(), lr=0.01, **momentum), model, mode=IGSP(**{**OPTIONS, **options})
    )
    optimizer.held = model
    return optimizer


def train(model: Any, opt: Any, task: int, form: str, steps: int = STEPS, rank: int | None = None) -> None:
    """Take steps with clipped gradients; a rank takes its half of every batch."""
    for step in range(steps):
        batch = inputs(task, step)
        parts = batch.chunk(2) if form == "accumulated" else [batch]
        opt.zero_grad()
        for number, part in enumerate(parts):
            mine = part if rank is None else part.chunk(2)[rank]
            last = number + 1 == len(parts)
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                loss = (model(mine).cumsum(1) - task).square().mean() / len(parts)
                (loss + opt.regularization() if form == "by hand" else loss).backward()
        nn.utils.clip_grad_norm_(opt.model.igsp.parameters(), 0.5)
        opt.step()


def run_tasks(model: Any, opt: Any, form: str, rank: int | None = None) -> Tensors:
    """Train and finish two tasks, begin a third; return what must not depend on the number of ranks."""
    found: Tensors = {}
    for task in (1, 2):
        train(model, opt, task, form, rank=rank)
        batches = loader(task)
        report = opt.consolidate(batches if rank is None else share(batches, rank), name=f"t{task}", progress=False)
        found[f"report {task}"] = facts(report)
    train(model, opt, 3, form, 7, rank)
    return {**found, **results(opt)}


def facts(report: Any) -> Tensor:
    """Return the figures of a report: batches, fates and times of convergence, routing."""
    rows = [(r.kept, r.pruned, r.reused, r.converged or 0, len(r.curve), *r.flow) for r in report.layers]
    return torch.tensor([report.batches, report.trainable.mean, *(float(n) for row in rows for n in row)])


def results(opt: Any) -> Tensors:
    """Return experts, routers, what recognises tasks, running means and optimizer state; of bases the projectors."""
    tensors, found = opt._core.snapshot().extension.tensors, {}
    for key, value in tensors.items():
        found[key] = value @ value.mT if key.endswith(BASES) else value.detach().clone().float()
    for number, parameter in enumerate(opt._core.mode.param_group.parameters):
        for key, value in opt._core.bases[0].state.get(parameter, {}).items():
            found[f"state {number} {key}"] = value.detach().clone()
    return found


def check(found: Tensors, expected: Tensors, what: str = "") -> None:
    """Compare within 1e-5; bases within 1e-4, since the least direction of an expert is a hundredth of the largest."""
    bases = {key for key in expected if key.endswith(BASES)}
    compare({k: v for k, v in found.items() if k not in bases}, {k: v for k, v in expected.items() if k not in bases},
            what=what)  # fmt: skip
    compare({k: found[k] for k in bases}, {k: expected[k] for k in bases}, 1e-4, what)


def replicas_equal_one_process(folder: Path) -> None:
    for form, options in FORMS.items():
        expected = torch.load(folder / f"igsp-{form}.pt")
        for first in ("attach", "wrap"):
            model = seeded(Tower)
            around = DistributedDataParallel(model) if first == "wrap" else None
            opt = wrap(model, **options)
            around = DistributedDataParallel(model) if around is None else around
            found = run_tasks(around, opt, form, dist.get_rank())
            check(found, expected, what=f"{form}, {first} first")
            both = everyone(found)
            assert all(torch.equal(both[0][name], both[1][name]) for name in found), form
            assert opt.verify().ok and everyone(str(opt.status()))[0] == str(opt.status())


def shards_equal_one_process(folder: Path) -> None:
    for form, options in FORMS.items():
        model = sharded(seeded(Tower))
        opt = wrap(model, **options)
        found = run_tasks(model, opt, form, dist.get_rank())
        check(found, torch.load(folder / f"igsp-{form}.pt"), what=form)
        assert opt.verify(share(loader(1), dist.get_rank())).ok


def a_model_without_wrapper_trains_its_experts(folder: Path) -> None:
    model = seeded(Tower).requires_grad_(False)
    found = run_tasks(model, wrap(model), "default", dist.get_rank())
    check(found, torch.load(folder / "igsp-default.pt"))


def a_wrapped_model_around_the_model_follows_new_experts(folder: Path) -> None:
    model = seeded(Tower)
    opt = wrap(model)
    around = DistributedDataParallel(nn.Sequential(model, nn.Identity()))
    check(run_tasks(around, opt, "default", dist.get_rank()), torch.load(folder / "igsp-default.pt"))


def layers_that_one_rank_reaches_train_on_all(folder: Path) -> None:
    model = seeded(Branches)
    opt = wrap(model, noise=0.0, warmup=0)
    rank = dist.get_rank()
    for step in range(20):
        opt.zero_grad()
        branch(model, step, rank).backward()
        opt.step()
    opt.consolidate([branch_inputs(99, rank)], name="one", progress=False)
    check(results(opt), torch.load(folder / "igsp-branches.pt"))


def branch_inputs(step: int, side: int) -> Tensor:
    x = inputs(1, step, 8)
    return torch.cat([torch.full((8, 1), 1.0 - 2 * side), x[:, 1:]], dim=1)


def branch(model: nn.Module, step: int, side: int) -> Tensor:
    return (model(branch_inputs(step, side)) - 1).square().mean()


def ranks_that_differ_are_refused(folder: Path) -> None:
    rank = dist.get_rank()
    model = seeded(Tower)
    opt = wrap(model, threshold=0.01 * (1 + rank))
    train(model, opt, 1, "default", 3, rank)
    message = refusal(ConsolidationError, lambda: opt.consolidate(loader(1), progress=False))
    assert "rank 1 differs from rank 0 in the mode's options" in message


def one_failing_rank_fails_all(folder: Path) -> None:
    rank, model = dist.get_rank(), seeded(Tower)
    opt = wrap(model)
    train(model, opt, 1, "default", 5, rank)
    before = {key: value.clone() for key, value in results(opt).items()}
    broken = [inputs(1, 0), *[torch.zeros(2, 3)] * rank]
    message = refusal(ConsolidationError, lambda: opt.consolidate(broken, name="t1", progress=False))
    assert message.startswith("rank 1: RuntimeError")
    empty = refusal(ConsolidationError, lambda: opt.consolidate([], name="t1", progress=False))
    assert "'t1' gave no batches" in empty
    check(results(opt), before)
    assert opt.status().phase == 1
    report = opt.consolidate(loader(1) if rank else [], name="t1", progress=False)
    assert report.batches == 5
    train(model, opt, 2, "default", 15, rank)
    assert opt.status().phase == 2


def files_move_between_numbers_of_processes(folder: Path) -> None:
    """What one process saved in the middle of a task goes on here; what is saved here goes on elsewhere."""
    rank = dist.get_rank()
    for kind in ("one", "one-dcp"):
        opt = wrap(model := seeded(Tower))
        resume(opt, folder, kind)
        train(DistributedDataParallel(model), opt, 2, "default", 10, rank)
        check(results(opt), torch.load(folder / "igsp-resumed.pt"), kind)
    opt = wrap(model := seeded(Tower))
    begin(DistributedDataParallel(model), opt, rank)
    save(opt, folder, "two")
    with pytest.raises(ConsolidationError, match="consolidated already"):
        opt.consolidate(loader(1), name="t1", progress=False)


def shards_write_and_read_files(folder: Path) -> None:
    rank = dist.get_rank()
    for kind in ("one", "one-dcp"):
        model = sharded(seeded(Tower))
        opt = wrap(model)
        resume(opt, folder, kind)
        train(model, opt, 2, "default", 10, rank)
        check(results(opt), torch.load(folder / "igsp-resumed.pt"), kind)
    model = sharded(seeded(Tower))
    opt = wrap(model)
    begin(model, opt, rank)
    save(opt, folder, "shards")


def four_go_on(folder: Path) -> None:
    """Four ranks, each with a quarter of every batch, go on where one, two and two shards stopped."""
    for count in [kind for kind in ("one", "two", "two-dcp", "shards", "shards-dcp") if has(folder, kind)]:
        model = seeded(Tower)
        opt = wrap(model)
        resume(opt, folder, count)
        around = DistributedDataParallel(model)
        for step in range(10):
            opt.zero_grad()
            (around(inputs(2, step).chunk(4)[dist.get_rank()]).cumsum(1) - 2).square().mean().backward()
            nn.utils.clip_grad_norm_(opt.model.igsp.parameters(), 0.5)
            opt.step()
        check(results(opt), torch.load(folder / "igsp-resumed.pt"), what=count)


def begin(model: nn.Module, opt: Any, rank: int | None = None) -> None:
    """Finish one task and stop in the middle of phase 1 of the next, within a window."""
    train(model, opt, 1, "default", rank=rank)
    opt.consolidate(loader(1) if rank is None else share(loader(1), rank), name="t1", progress=False)
    train(model, opt, 2, "default", 7, rank)


def save(opt: Any, folder: Path, count: str) -> None:
    """Save as a state dict, as a file and as a checkpoint of `torch.distributed.checkpoint`."""
    state = opt.state_dict()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(state, folder / f"{count}.pt")
    opt.save(folder / f"{count}.safetensors")
    dcp.save({"training": opt.checkpoint()}, checkpoint_id=folder / f"{count}-dcp")


def has(folder: Path, kind: str) -> bool:
    return any((folder / name).exists() for name in (kind, f"{kind}.pt"))


def resume(opt: Any, folder: Path, kind: str) -> None:
    if kind.endswith("dcp"):
        dcp.load({"training": opt.checkpoint()}, checkpoint_id=folder / kind)
    else:
        opt.load_state_dict(torch.load(folder / f"{kind}.pt", weights_only=True))
    assert opt.status().finished == ("t1",) and opt.status().step == 7


def one_process(folder: Path) -> None:
    """Write down what one process finds, for all scenarios."""
    for form, options in FORMS.items():
        model = seeded(Tower)
        torch.save(run_tasks(model, wrap(model, **options), form), folder / f"igsp-{form}.pt")
    model = seeded(Branches)
    opt = wrap(model, noise=0.0, warmup=0)
    for step in range(20):
        opt.zero_grad()
        ((branch(model, step, 0) + branch(model, step, 1)) / 2).backward()
        opt.step()
    opt.consolidate([branch_inputs(99, side) for side in (0, 1)], name="one", progress=False)
    torch.save(results(opt), folder / "igsp-branches.pt")
    model = seeded(Tower)
    opt = wrap(model)
    begin(model, opt)
    save(opt, folder, "one")
    train(model, opt, 2, "default", 10)
    torch.save(results(opt), folder / "igsp-resumed.pt")


def adam_in_many_steps(folder: Path) -> None:
    model = seeded(Tower)
    opt = wrap(model, AdamW, lr=0.01)
    run_tasks(DistributedDataParallel(model), opt, "default", dist.get_rank())
    both = everyone(results(opt))
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


REPLICAS = [
    replicas_equal_one_process,
    a_model_without_wrapper_trains_its_experts,
    a_wrapped_model_around_the_model_follows_new_experts,
    layers_that_one_rank_reaches_train_on_all,
    ranks_that_differ_are_refused,
    one_failing_rank_fails_all,
    adam_in_many_steps,
    files_move_between_numbers_of_processes,
]
SHARDS = [shards_equal_one_process, shards_write_and_read_files]
