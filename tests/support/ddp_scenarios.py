"""What must hold under DistributedDataParallel; each function runs on both ranks (see `processes`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import (
    Everything,
    Plain,
    compare,
    load_by_torch,
    momentum,
    results,
    rows,
    save_by_torch,
    seeded,
    share,
    tokens,
    train,
    two_tasks,
    wrap,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from nullspace_optim import (
    OSF,
    SGP,
    ConsolidationError,
    Energy,
    FixedRank,
    NullSpaceOptimizer,
    SketchedCovariance,
    TailEnergy,
)
from nullspace_optim.errors import CaptureError, OptionError
from nullspace_optim.methods import consolidate_classes, declare_rows
from nullspace_optim.policies import CGP, CODECL, OWM, TRGP, VPTNSP, EigenvalueRatio, RankBudget

POLICIES = {
    "energy": Energy(0.9),
    "budget": RankBudget(0.3),
    "tail": TailEnergy(0.1),
    "ratio": EigenvalueRatio(30.0),
    "trgp": TRGP(0.9),
}
# kept by part, or on both sides
SOFT_OR_TWO_SIDED = {"sgp": SGP(0.9), "code-cl": CODECL(), "owm": OWM(), "vpt-nsp": VPTNSP(0.9), "osf": OSF(0.4)}


def everyone(value: Any) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found


def refusal(kind: type[BaseException], action: Callable[[], Any]) -> str:
    """Return the message with which `action` fails, the same on both ranks."""
    with pytest.raises(kind) as caught:
        action()
    messages = everyone(str(caught.value))
    assert messages[0] == messages[1], messages
    return messages[0]


def ddp_equals_one_process(folder: Path) -> None:
    model = DistributedDataParallel(seeded(Everything))
    optimizer = wrap(model)
    two_tasks(model, optimizer, tokens, dist.get_rank())
    found = results(optimizer, dict(model.module.named_parameters()))
    compare(found, torch.load(folder / "everything.pt"))
    both = everyone(found)
    assert all(torch.equal(both[0][name], both[1][name]) for name in found)
    assert optimizer.verify().ok
    assert optimizer.capacity() == everyone(optimizer.capacity())[0]


def every_policy_equals_one_process(folder: Path) -> None:
    for name, policy in POLICIES.items():
        model = seeded(Plain)
        optimizer = wrap(model, policy=policy, bias="joint")
        optimizer.consolidate(share(rows(1), dist.get_rank()), progress=False)
        optimizer.consolidate(share(rows(2), dist.get_rank()), progress=False)
        compare(results(optimizer, {}), torch.load(folder / f"policy-{name}.pt"), what=name)


def soft_and_two_sided_policies_equal_one_process(folder: Path) -> None:
    for name, policy in SOFT_OR_TWO_SIDED.items():
        model = DistributedDataParallel(seeded(Everything))
        optimizer = wrap(model, momentum(model), policy=policy)
        two_tasks(model, optimizer, tokens, dist.get_rank())
        found = results(optimizer, dict(model.module.named_parameters()))
        compare(found, torch.load(folder / f"soft-{name}.pt"), what=name)
        both = everyone(found)
        assert all(torch.equal(both[0][key], both[1][key]) for key in found), name
        assert optimizer.verify().ok


def classes_are_consolidated_by_one_process_only(folder: Path) -> None:
    optimizer = wrap(seeded(Plain), policy=CGP())
    message = refusal(OptionError, lambda: consolidate_classes(optimizer, rows(1), lambda batch: batch[:, 0], name="x"))
    assert "one process only" in message


def samples_are_found_on_whichever_rank_has_them(folder: Path) -> None:
    model = seeded(Plain)
    optimizer, rank = wrap(model, policy=FixedRank(12)), dist.get_rank()
    optimizer.consolidate(share(rows(1), rank), name="old", progress=False)
    swapped = optimizer.verify(share(rows(1), 1 - rank))
    assert swapped.ok and swapped.drift("old") == 0.0 and not swapped.missing
    with torch.no_grad():
        model.head.bias += 1
    optimizer.reanchor()
    moved = everyone(optimizer.verify(share(rows(1), 1 - rank)).drift("old"))
    assert moved[0] == moved[1] > 1e-3
    assert optimizer.verify(rows(7)).missing == ("old",)


def a_rank_without_batches_takes_part(folder: Path) -> None:
    optimizer = wrap(seeded(Plain))
    report = optimizer.consolidate(rows(1) if dist.get_rank() else [], name="one", progress=False)
    assert report.batches == 5
    compare(results(optimizer, {}), torch.load(folder / "one.pt"))
    message = refusal(ConsolidationError, lambda: optimizer.consolidate([], name="none", progress=False))
    assert "'none' gave no batches" in message


class _Broken(nn.Module):
    """Raises, or returns NaN inputs to its second layer, where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().max()) > 1e6:
            raise RuntimeError("the camera is on fire")
        return self.second(self.first(x) / x.detach().abs().min().clamp(max=1))


def one_failing_rank_fails_all(folder: Path) -> None:
    model, rank = seeded(_Broken), dist.get_rank()
    optimizer = wrap(model)
    optimizer.consolidate(rows(1), name="good", progress=False)
    before = copy.deepcopy((model.state_dict(), {n: b.U for n, b in optimizer.bases.items() if b.subspaces}))

    def broken_loader() -> Iterator[Tensor]:
        yield rows(1)[0]
        if rank == 1:
            raise OSError("disk full")

    def interrupted() -> Iterator[Tensor]:
        yield rows(1)[0]
        if rank == 0:
            raise KeyboardInterrupt

    bad = {"fire": torch.full((4, 12), 1e9), "zero": torch.zeros(4, 12)}
    cases: list[tuple[type[BaseException], str, Any]] = [
        (OSError, r"rank 1: OSError: disk full", broken_loader()),
        (ConsolidationError, "rank 1: RuntimeError: the camera is on fire", [rows(1)[0], *[bad["fire"]] * rank]),
        (
            CaptureError,
            "rank 0: batch 1: non-finite input rows of 'second.weight'",
            [rows(1)[0], *[bad["zero"]] * (1 - rank)],
        ),
    ]
    for kind, text, loader in cases:
        assert text in refusal(kind, lambda loader=loader: optimizer.consolidate(loader, progress=False))
    with pytest.raises(KeyboardInterrupt if rank == 0 else ConsolidationError):
        optimizer.consolidate(interrupted(), progress=False)
    after = (model.state_dict(), {n: b.U for n, b in optimizer.bases.items() if b.subspaces})
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert not model._forward_hooks and all(not module._forward_pre_hooks for module in model.children())
    assert optimizer.consolidate(rows(2), progress=False).batches == 10


def ranks_that_differ_are_refused(folder: Path) -> None:
    rank = dist.get_rank()

    def attempt(model: nn.Module, name: str = "task", **options: Any) -> str:
        optimizer = wrap(model, **options)
        return refusal(ConsolidationError, lambda: optimizer.consolidate(rows(1), name=name, progress=False))

    wide = nn.Sequential(nn.Linear(12, 6 + rank), nn.Linear(6 + rank, 1))
    assert "differs from rank 0 in parameter '0.weight': rank 0 has [6, 12]" in attempt(wide)
    longer = nn.Sequential(*[nn.Linear(12, 12) for _ in range(1 + rank)])
    assert "rank 1 has parameter '1.weight'" in attempt(longer)
    assert "in option policy: rank 0 has FixedRank(k=3), rank 1 has FixedRank(k=4)" in attempt(
        seeded(Plain), policy=FixedRank(3 + rank)
    )
    assert "in the name of this task: rank 0 has 'task0'" in attempt(seeded(Plain), f"task{rank}")
    apart = seeded(Plain)
    with torch.no_grad():
        apart.block[2].weight *= 1 + rank
    assert "in the weights of 'block.2.weight'" in attempt(apart)
    same = wrap(seeded(Plain))
    same.consolidate(rows(1), name="birds", progress=False)
    same._core.store.tasks[0]["name"] = f"birds{rank}"
    message = refusal(ConsolidationError, lambda: same.consolidate(rows(1), name="x", progress=False))
    assert "in the consolidated tasks: rank 0 has ['birds0']" in message


def bases_are_saved_once_and_loaded_by_all(folder: Path) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(seeded(Plain))
    optimizer = wrap(model)
    optimizer.consolidate(share(rows(1), rank), progress=False)
    optimizer.save(folder / "ddp.safetensors")
    assert (folder / "ddp.safetensors").exists()
    missing = folder / "no such folder" / "ddp.safetensors"
    assert "rank 0: FileNotFoundError" in refusal(OSError, lambda: optimizer.save(missing))
    fresh = wrap(DistributedDataParallel(seeded(Plain)))
    fresh.load(folder / "ddp.safetensors")
    compare(results(fresh, {}), results(optimizer, {}), 0.0)
    other = wrap(seeded(Plain), policy=FixedRank(2))
    other.consolidate(rows(3), progress=False)
    if rank == 1:
        other._core.store.tasks[0]["name"] = "task 1"
    paths = [folder / "ddp.safetensors", folder / "other.safetensors"]
    other.save(paths[1])
    message = refusal(ConsolidationError, lambda: fresh.load(paths[rank]))
    assert "rank 1 differs from rank 0 in the basis of 'block.0.weight'" in message
    compare(results(fresh, {}), results(optimizer, {}), 0.0)
    train(model, optimizer, rows(5), rank)
    resumed = wrap(DistributedDataParallel(copy.deepcopy(model.module)))
    resumed.load_state_dict(optimizer.state_dict())
    assert optimizer.verify().ok and resumed.verify().ok
    compare(results(resumed, {}), results(optimizer, {}), 0.0)


def checkpoints_move_between_one_process_and_replicas(folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(5)
    model = DistributedDataParallel(Everything())
    optimizer = wrap(model)
    dcp.load({"training": optimizer.checkpoint()}, checkpoint_id=folder / "by-one")
    train(model, optimizer, tokens(3), rank)
    compare(dict(model.module.named_parameters()), torch.load(folder / "after.pt"))
    assert optimizer.verify(share(tokens(1), rank)).ok
    dcp.save({"training": optimizer.checkpoint()}, checkpoint_id=folder / "by-replicas")
    train(model, optimizer, tokens(4), rank)
    if rank == 0:
        torch.save(dict(model.module.named_parameters()), folder / "by-replicas.pt")


def the_recipe_of_torch_carries_bases_to_replicas(folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(5)
    model = DistributedDataParallel(Everything())
    optimizer = wrap(model)
    load_by_torch(model, optimizer, folder / "by-one-torch")
    train(model, optimizer, tokens(3), rank)
    compare(dict(model.module.named_parameters()), torch.load(folder / "after.pt"))
    assert optimizer.verify(share(tokens(1), rank)).ok
    save_by_torch(model, optimizer, folder / "by-replicas-torch")


class _Branches(nn.Module):
    """Experts that only some batches visit; query and key share their rows, until a mask tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 3), nn.Linear(12, 3)
        self.query, self.key = nn.Linear(12, 3, bias=False), nn.Linear(12, 3, bias=False)
        self.never = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.left if float(x[0, 0]) > 0 else self.right
        key = self.key(x if float(x[0, 0]) > 0 else 2 * x)
        return expert(x) + self.query(x) * key


def what_only_one_rank_has_seen_counts(folder: Path) -> None:
    rank = dist.get_rank()
    batches = [torch.cat([torch.full((4, 1), sign), batch[:, 1:]], 1) for sign, batch in zip((1.0, -1.0), rows(1))]
    optimizer = wrap(seeded(_Branches), policy=FixedRank(2), rows="all")
    report = optimizer.consolidate([batches[rank]], progress=False)
    compare(results(optimizer, {}), torch.load(folder / "branches.pt"))
    assert not torch.equal(optimizer.bases["query.weight"].U, optimizer.bases["key.weight"].U)
    assert {row.name for row in report.parameters if not row.rank and "bias" not in row.name} == {"never.weight"}


class Declared(nn.Module):
    """A matrix whose rows are declared on both sides, as those of a prompt are; it is read by no product."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        declare_rows(self.prompt, x, "right")
        declare_rows(self.prompt, x[:, :4], "left")
        return torch.cat([x, self.prompt]).tanh().sum(1)


def declared_rows_of_one_rank_count_on_all(folder: Path) -> None:
    optimizer = wrap(DistributedDataParallel(seeded(Declared)), policy=VPTNSP(eta=1.0))
    optimizer.consolidate(rows(1) if dist.get_rank() else [], progress=False)
    compare(results(optimizer, {}), torch.load(folder / "declared.pt"))


def sketches_of_all_ranks_make_one(folder: Path) -> None:
    model, rank = seeded(Plain), dist.get_rank()
    optimizer = wrap(model, policy=Energy(0.5), covariance=SketchedCovariance(size=8, above=8))
    report = optimizer.consolidate(share(rows(1, 20), rank) if rank else [], progress=False)
    assert any("sketches of 8 rows" in note for note in report.notes)
    assert everyone(report.notes)[0] == everyone(report.notes)[1]
    seen = torch.cat(rows(1, 20)[2:]).double()
    u = optimizer.bases["first.weight"].U.double()
    line = next(row for row in report.parameters if row.name == "first.weight")
    assert line.energy <= float((seen @ u).square().sum() / seen.square().sum()) + 1e-6
    assert torch.equal(everyone(u)[0], everyone(u)[1])


def batch_norm_statistics_are_those_of_rank_0(folder: Path) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    optimizer, rank = wrap(model), dist.get_rank()
    train(model, optimizer, rows(3), rank)
    optimizer.consolidate(share(rows(1), rank), progress=False)
    kept = everyone(optimizer._core.store.buffers["1.running_mean"])
    assert torch.equal(kept[0], kept[1])
    train(model, optimizer, rows(4), rank)
    assert optimizer.verify().ok and not optimizer.verify().buffers


def engines_that_flatten_are_refused(folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    zero = ZeroRedundancyOptimizer(seeded(Plain).parameters(), SGD, lr=0.1)
    with pytest.raises(OptionError, match=r"ZeroRedundancyOptimizer.*fully_shard"):
        NullSpaceOptimizer(zero)
    for original in (True, False):
        flat = FullyShardedDataParallel(seeded(Plain), device_id=torch.device("cpu"), use_orig_params=original)
        with pytest.raises(OptionError, match=r"FSDP1.*fully_shard"):
            NullSpaceOptimizer(SGD(flat.parameters(), lr=0.1))


SCENARIOS = [
    ddp_equals_one_process,
    every_policy_equals_one_process,
    soft_and_two_sided_policies_equal_one_process,
    classes_are_consolidated_by_one_process_only,
    samples_are_found_on_whichever_rank_has_them,
    a_rank_without_batches_takes_part,
    one_failing_rank_fails_all,
    ranks_that_differ_are_refused,
    bases_are_saved_once_and_loaded_by_all,
    checkpoints_move_between_one_process_and_replicas,
    the_recipe_of_torch_carries_bases_to_replicas,
    what_only_one_rank_has_seen_counts,
    declared_rows_of_one_rank_count_on_all,
    sketches_of_all_ranks_make_one,
    batch_norm_statistics_are_those_of_rank_0,
    engines_that_flatten_are_refused,
]
