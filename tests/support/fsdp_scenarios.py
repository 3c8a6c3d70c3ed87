"""What must hold under FSDP2 (`fully_shard`); each function runs on both ranks (see `processes`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ddp_scenarios import SOFT_OR_TWO_SIDED, Declared, _Broken, everyone, refusal
from models import (
    Breaking,
    Codebook,
    Everything,
    Plain,
    Tensors,
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
)  # fmt: skip
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from nullspace_optim import ConsolidationError, Fate, FixedRank, NullSpaceOptimizer, StaleAnchorError
from nullspace_optim.consolidation.describe import stored_bytes
from nullspace_optim.errors import CaptureError, OptionError
from nullspace_optim.planning.predict import Conditions, by_rank, predict
from nullspace_optim.planning.survey import survey
from nullspace_optim.policies import VPTNSP


def sharded(model: nn.Module, **options: Any) -> Any:
    """Shard the block of a model on its own, then the rest."""
    options.setdefault("mesh", init_device_mesh("cpu", (2,)))
    if hasattr(model, "block"):
        fully_shard(model.block, **options)
    return fully_shard(model, **options)


def whole(model: nn.Module) -> Tensors:
    """Return all weights, gathered."""
    return {name: parameter.full_tensor() for name, parameter in model.named_parameters()}


def fsdp_equals_one_process(folder: Path) -> None:
    model = sharded(seeded(Everything))
    optimizer = wrap(model)
    two_tasks(model, optimizer, tokens, dist.get_rank())
    compare(results(optimizer, whole(model)), torch.load(folder / "everything.pt"))
    report = optimizer.verify(share(tokens(1), dist.get_rank()))
    assert report.ok and report.missing == ("task 2",)
    assert everyone(report.kept)[0] == everyone(report.kept)[1]
    sides = {name: set(basis.subspaces) for name, basis in optimizer.bases.items() if basis.subspaces}
    assert sides["projection"] == {"left"} and sides["embedding.weight"] == {"rows"} and len(sides) == 7
    assert optimizer.bases["norm.weight"].fate is Fate.FROZEN
    assert optimizer.capacity() == everyone(optimizer.capacity())[0]


def every_form_of_correction_equals_one_process(folder: Path) -> None:
    for name, options in FORMS.items():
        model = sharded(seeded(Everything))
        optimizer = wrap(model, momentum(model), **options)
        two_tasks(model, optimizer, tokens, dist.get_rank(), steps=18)
        optimizer.verify()
        expected = torch.load(folder / f"form-{name}.pt")
        compare(results(optimizer, whole(model)), expected, TOLERANCES.get(name, 1e-5), name)


FORMS: dict[str, dict[str, Any]] = {
    "difference": {"policy": FixedRank(9)},
    "both": {"project": "both"},
    "gradient": {"project": "gradient"},
    "joint": {"bias": "joint"},
    "fast": {"precision": "fast"},
}
TOLERANCES = {"fast": 2**-8}  # bfloat16 products; a side that crosses ranks is corrected in float32


def soft_and_two_sided_policies_equal_one_process_in_shards(folder: Path) -> None:
    for name, policy in SOFT_OR_TWO_SIDED.items():
        model = sharded(seeded(Everything))
        optimizer = wrap(model, momentum(model), policy=policy)
        two_tasks(model, optimizer, tokens, dist.get_rank())
        compare(results(optimizer, whole(model)), torch.load(folder / f"soft-{name}.pt"), what=name)
        assert optimizer.verify().ok


def tables_read_in_two_ways_equal_one_process(folder: Path) -> None:
    for axis in (0, 1):
        model = sharded(seeded(Codebook), shard_placement_fn=lambda p, axis=axis: Shard(axis % p.ndim))
        optimizer = wrap(model, momentum(model))
        two_tasks(model, optimizer, tokens, dist.get_rank())
        compare(results(optimizer, whole(model)), torch.load(folder / "codebook.pt"), what=f"Shard({axis})")
        kept, before = optimizer.bases["codes.weight"].subspaces["rows"].basis, whole(model)["codes.weight"].clone()
        train(model, optimizer, tokens(3), dist.get_rank())
        assert torch.equal(whole(model)["codes.weight"][kept], before[kept])


def two_declared_sides_hold_in_shards_unless_both_are_soft(folder: Path) -> None:
    model = sharded(seeded(Declared))
    optimizer = wrap(model, policy=VPTNSP(eta=1.0))
    optimizer.consolidate(share(rows(1), dist.get_rank()), progress=False)
    compare(results(optimizer, {}), torch.load(folder / "declared.pt"))
    train(model, optimizer, rows(2), dist.get_rank())
    assert optimizer.verify().ok
    soft = wrap(sharded(seeded(Declared)), policy=VPTNSP(eta=0.9))
    message = refusal(ConsolidationError, lambda: soft.consolidate(rows(1), progress=False))
    assert "'prompt' is kept softly on the sides right and left" in message


def _collectives(model: nn.Module, optimizer: NullSpaceOptimizer, data: Callable[[int], list[Tensor]]) -> int:
    optimizer.consolidate(share(data(1), dist.get_rank()), progress=False)
    optimizer.zero_grad()
    (model(data(2)[0]) - 1).square().mean().backward()
    with CommDebugMode() as counted:
        optimizer.step()
    assert optimizer.verify().ok
    return int(counted.get_total_counts())


def a_step_communicates_nothing(folder: Path) -> None:
    for policy in (FixedRank(3), FixedRank(10)):
        model = sharded(seeded(Plain))
        assert _collectives(model, wrap(model, policy=policy), rows) == 0
    model = sharded(seeded(Everything))  # `x @ projection` and the transposed convolution are cut along their inputs
    assert _collectives(model, wrap(model), tokens) == 1
    model = seeded(Everything)
    inputs_first = {id(model.projection), id(model.transposed.weight)}
    model = sharded(model, shard_placement_fn=lambda p: Shard(1) if id(p) in inputs_first else Shard(0))
    assert _collectives(model, wrap(model), tokens) == 0
    model = sharded(seeded(Plain))
    optimizer = wrap(model)
    optimizer.consolidate(rows(1), progress=False)
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 0


def weights_sharded_along_their_inputs_hold(folder: Path) -> None:
    model = seeded(Everything)
    ones = {id(p) for p in (model.projection, model.block[0].weight, model.embedding.weight, model.transposed.weight)}
    model = sharded(model, shard_placement_fn=lambda p: Shard(1) if id(p) in ones else Shard(0))
    optimizer = wrap(model)
    two_tasks(model, optimizer, tokens, dist.get_rank())
    compare(results(optimizer, whole(model)), torch.load(folder / "everything.pt"))
    assert optimizer.verify().ok


def half_precision_forward_is_captured(folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(seeded(Plain), mp_policy=policy)
    optimizer = wrap(model)
    optimizer.consolidate(share(rows(1), dist.get_rank()), progress=False)
    compare(results(optimizer, {}), torch.load(folder / "one.pt"), 0.1)
    assert {basis.fate for basis in optimizer.bases.values() if "weight" in basis.name} == {Fate.PROTECTED}
    train(model, optimizer, rows(2), dist.get_rank())
    assert optimizer.verify().ok


def uneven_loaders_do_not_wait(folder: Path) -> None:
    rank = dist.get_rank()
    optimizer = wrap(sharded(seeded(Plain)))
    assert optimizer.consolidate(iter(rows(1) if rank == 1 else []), progress=False).batches == 5
    compare(results(optimizer, {}), torch.load(folder / "one.pt"))
    refusal(ConsolidationError, lambda: optimizer.consolidate([], progress=False))


def one_failing_rank_fails_all_shards(folder: Path) -> None:
    rank = dist.get_rank()
    model = sharded(seeded(_Broken))
    optimizer = wrap(model)
    before = whole(model)

    def broken() -> Any:
        yield rows(1)[0]
        if rank == 1:
            raise ValueError("corrupt image")
        yield rows(1)[1]

    message = refusal(ConsolidationError, lambda: optimizer.consolidate(broken(), name="x", progress=False))
    assert message == "rank 1: ValueError: corrupt image"
    zero = [torch.zeros(4, 12)] if rank == 0 else rows(1)
    message = refusal(CaptureError, lambda: optimizer.consolidate(zero, progress=False))
    assert "rank 0: batch 0: non-finite input rows of 'second.weight'" in message
    compare(whole(model), before, 0.0)
    assert not optimizer.bases
    assert optimizer.consolidate(share(rows(1), rank), progress=False).batches == 5


class _Breaks(Plain):
    """Raises between two gathers of parameters, where a batch says so; handles errors of its own."""

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows).tanh()
        try:
            if bool((rows.detach() == 7).all()):
                raise RuntimeError("the lens is dirty")
            return self.head(self.block(hidden))
        except ValueError:
            return hidden.sum(1)


def an_error_inside_a_forward_on_one_rank_stops_all_at_once(folder: Path) -> None:
    rank = dist.get_rank()
    dirty = [rows(1)[0], torch.full((4, 12), 7.0)]
    for failing in (0, 1):
        model = sharded(seeded(_Breaks))
        optimizer = wrap(model)
        before = whole(model)
        loader = dirty if rank == failing else rows(1)
        message = refusal(ConsolidationError, partial(optimizer.consolidate, loader, progress=False))
        assert message.startswith(f"rank {failing}: RuntimeError: the lens is dirty"), message
        assert not optimizer.bases
        compare(whole(model), before, 0.0)
        report = optimizer.consolidate(share(rows(1), rank), progress=False)
        assert report.batches == 5
        compare(results(optimizer, {}), torch.load(folder / "one.pt"))
        train(model, optimizer, rows(2), rank)
        assert optimizer.verify().ok


def an_interrupt_inside_a_forward_stops_all_at_once(folder: Path) -> None:
    rank = dist.get_rank()
    model = sharded(seeded(_Breaks))
    optimizer = wrap(model)

    def forward(batch: Tensor) -> Tensor:
        if rank == 1:
            model.block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), prepend=True)
        return model(batch)

    with pytest.raises(KeyboardInterrupt if rank == 1 else ConsolidationError, match=None if rank else "rank 1: Key"):
        optimizer.consolidate(rows(1), forward=forward, progress=False)
    assert not optimizer.bases


def an_edit_is_found_and_accepted(folder: Path) -> None:
    rank = dist.get_rank()
    model = sharded(seeded(Everything))
    optimizer = wrap(model)
    optimizer.consolidate(share(tokens(1), rank), progress=False)
    for name in ("block.0.weight", "projection"):
        with torch.no_grad():
            dict(model.named_parameters())[name].mul_(1.5)
        with pytest.raises(StaleAnchorError, match=name):
            optimizer.step()
        assert not optimizer.verify().ok
        optimizer.reanchor()
        assert optimizer.verify().ok
    train(model, optimizer, tokens(2), rank)
    assert optimizer.verify().ok


def a_step_that_breaks_off_goes_back_to_the_anchors(folder: Path) -> None:
    rank = dist.get_rank()
    for kind, data in ((Plain, rows), (Everything, tokens)):
        for then in ("step", "verify", "consolidate", "restore"):
            model = sharded(seeded(kind))
            optimizer = wrap(model, base := Breaking(model.parameters(), lr=0.05))
            optimizer.consolidate(share(data(1), rank), progress=False)
            assert (kind is Everything) == any(g.across for g in optimizer._core.protection.guards.values())
            train(model, optimizer, data(2, 2), rank)
            base.broken = True
            with pytest.raises(MemoryError):
                train(model, optimizer, data(3, 1), rank)
            if then == "step":
                train(model, optimizer, data(3, 1), rank)
            elif then == "consolidate":
                optimizer.consolidate(share(data(3, 1), rank), progress=False)
            elif then == "restore":
                optimizer.restore()
            assert optimizer.verify().ok, (kind, then)
            train(model, optimizer, data(4, 2), rank)
            assert optimizer.verify().ok, (kind, then)


def restore_undoes_an_edit(folder: Path) -> None:
    rank = dist.get_rank()
    model = sharded(seeded(Everything))
    optimizer = wrap(model)
    optimizer.consolidate(share(tokens(1), rank), progress=False)
    train(model, optimizer, tokens(2, 2), rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(StaleAnchorError, match=r"opt\.restore\(\)"):
        optimizer.step()
    optimizer.restore()
    assert optimizer.verify().ok
    train(model, optimizer, tokens(2), rank)
    assert optimizer.verify().ok


def _tower(kind: str) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 4))


class _TwoTowers(nn.Module):
    """Used through its methods, like a CLIP; one weight has fewer outputs than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = _tower("visual"), _tower("text")
        self.visual_projection = nn.Parameter(torch.randn(4, 3))
        self.gate = nn.Linear(12, 1, bias=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.visual(images) @ self.visual_projection * self.gate(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images)


def fates_do_not_depend_on_where_a_parameter_lies(folder: Path) -> None:
    """FSDP2 frees and fills the same parameters in every pass; they may get their former addresses back."""
    for _ in range(12):
        model = sharded(seeded(Everything))
        optimizer = wrap(model, momentum(model), policy=FixedRank(2), rows="all")
        report = optimizer.consolidate(share(tokens(1), dist.get_rank()), progress=False)
        assert {row.name for row in report.of(Fate.PROTECTED)} == {
            *("embedding.weight", "grouped.weight", "block.0.weight", "block.2.weight", "projection"),
            *("transposed.weight", "head.weight"),
        }, [row for row in report.of(Fate.FROZEN) if "weight" in row.name]


def methods_besides_forward_are_captured(folder: Path) -> None:
    model = seeded(_TwoTowers)
    fully_shard(model.visual)
    fully_shard(model.text)
    fully_shard(model)
    register_fsdp_forward_method(model, "encode")
    optimizer = wrap(model)
    report = optimizer.consolidate(rows(1), forward=model.encode, progress=False)
    free = {row.name for row in report.of(Fate.FREE)}
    assert free == {f"text.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert {"visual.0.weight", "visual_projection", "gate.weight"} <= {row.name for row in report.of(Fate.PROTECTED)}
    held = [p.to_local().shape[0] for name, p in model.named_parameters() if name == "gate.weight"]
    assert sorted(everyone(held[0])) == [0, 1]
    for batch in rows(2):
        optimizer.zero_grad()
        model.encode(batch).square().mean().backward()
        optimizer.step()
    assert optimizer.verify(rows(1), forward=model.encode).ok


def bases_move_between_one_process_and_shards(folder: Path) -> None:
    rank = dist.get_rank()
    model = seeded(Everything)
    model.load_state_dict(torch.load(folder / "before.pt"))
    optimizer = wrap(sharded(model))
    optimizer.load(folder / "everything.safetensors")
    assert optimizer.verify(share(tokens(1), rank)).ok
    optimizer.save(folder / "sharded.safetensors")
    assert (folder / "sharded.safetensors").read_bytes() == (folder / "everything.safetensors").read_bytes()
    train(model, optimizer, tokens(3), rank)
    assert optimizer.verify(share(tokens(1), rank)).ok
    twin = wrap(sharded(seeded(Everything)))
    twin.load_state_dict(optimizer.state_dict())
    assert (
        everyone(twin.state_dict()["param_groups"][0]["nullspace"])[0]
        == (optimizer.state_dict()["param_groups"][0]["nullspace"])
    )


def checkpoints_move_between_one_process_and_shards(folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(5)
    model = sharded(Everything())
    optimizer = wrap(model)
    dcp.load({"training": optimizer.checkpoint()}, checkpoint_id=folder / "by-one")
    train(model, optimizer, tokens(3), rank)
    compare(whole(model), torch.load(folder / "after.pt"))
    assert optimizer.verify(share(tokens(1), rank)).ok
    dcp.save({"training": optimizer.checkpoint()}, checkpoint_id=folder / "by-two")
    train(model, optimizer, tokens(4), rank)
    weights = whole(model)
    if rank == 0:
        torch.save(weights, folder / "by-two.pt")


def checkpoints_move_between_replicas_and_shards(folder: Path) -> None:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(Everything())
    optimizer = wrap(model.module)
    dcp.load({"training": optimizer.checkpoint()}, checkpoint_id=folder / "by-two")
    train(model, optimizer, tokens(4), rank)
    compare(dict(model.module.named_parameters()), torch.load(folder / "by-two.pt"))
    assert optimizer.verify(share(tokens(1), rank)).ok


def checkpoints_move_from_replicas_to_shards(folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(6)
    model = sharded(Everything())
    optimizer = wrap(model)
    dcp.load({"training": optimizer.checkpoint()}, checkpoint_id=folder / "by-replicas")
    train(model, optimizer, tokens(4), rank)
    compare(whole(model), torch.load(folder / "by-replicas.pt"))
    assert optimizer.verify(share(tokens(1), rank)).ok


def the_recipe_of_torch_carries_bases_into_shards_and_back(folder: Path) -> None:
    rank = dist.get_rank()
    for start, task, end in (("by-one-torch", 3, "after"), ("by-replicas-torch", 4, "by-replicas")):
        torch.manual_seed(5)
        model = sharded(Everything())
        optimizer = wrap(model)
        load_by_torch(model, optimizer, folder / start)
        if start == "by-one-torch":
            save_by_torch(model, optimizer, folder / "by-two-torch")
        train(model, optimizer, tokens(task), rank)
        compare(whole(model), torch.load(folder / f"{end}.pt"), what=start)
        assert optimizer.verify(share(tokens(1), rank)).ok


def a_plan_agrees_with_what_each_rank_holds(folder: Path) -> None:
    rank = dist.get_rank()
    for kind, data, k in ((Everything, tokens, 3), (Everything, tokens, 9), (Plain, rows, 3), (Plain, rows, 10)):
        model = sharded(seeded(kind))
        optimizer = wrap(model, momentum(model), policy=FixedRank(k), rows="all")
        optimizer.consolidate(share(data(1), rank), progress=False)
        train(model, optimizer, data(2, 17), rank)  # every 16th step of the difference form is exact
        with torch.device("meta"):
            meta, batch = kind(), torch.zeros_like(data(1)[0], device="meta")
        found = survey(meta, lambda meta=meta, batch=batch: meta(batch), batch=len(batch))
        used = {name: b.subspaces["rows"].rank for name, b in optimizer.bases.items() if "rows" in b.subspaces}
        planned = predict(found, by_rank(k), Conditions(devices=2, rows_used=used)).per_device
        protection = optimizer._core.protection
        guards = protection.guards.values()
        complements = [t for guard in guards for t in guard.complements.values()]
        held = {
            "stored": stored_bytes(optimizer._core.store),
            "copies": sum(t.nbytes for guard in guards for t in guard.previous),
            "workspaces": protection.workspace.nbytes + sum(t.nbytes for t in complements),
        }
        largest = {key: max(other[key] for other in everyone(held)) for key in held}
        expected = {
            "stored": planned.bases + planned.anchors + planned.kept,
            "copies": planned.copies,
            "workspaces": planned.workspaces,
        }
        for key, value in expected.items():
            assert abs(largest[key] - value) <= 0.15 * max(value, 1), (kind.__name__, k, key, largest, expected)


def other_ways_to_shard(folder: Path) -> None:
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = sharded(seeded(Everything), mesh=hybrid)
    optimizer = wrap(model)
    two_tasks(model, optimizer, tokens, dist.get_rank())
    compare(results(optimizer, whole(model)), torch.load(folder / "everything.pt"))
    parallel = nn.Linear(12, 6, bias=False)
    mesh = init_device_mesh("cpu", (2,))
    parallel.weight = nn.Parameter(distribute_tensor(parallel.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(OptionError, match=r"'weight' is a DTensor outside fully_shard"):
        wrap(parallel).consolidate(rows(1), progress=False)


SCENARIOS = [
    fsdp_equals_one_process,
    every_form_of_correction_equals_one_process,
    soft_and_two_sided_policies_equal_one_process_in_shards,
    tables_read_in_two_ways_equal_one_process,
    two_declared_sides_hold_in_shards_unless_both_are_soft,
    a_step_communicates_nothing,
    weights_sharded_along_their_inputs_hold,
    half_precision_forward_is_captured,
    uneven_loaders_do_not_wait,
    one_failing_rank_fails_all_shards,
    an_error_inside_a_forward_on_one_rank_stops_all_at_once,
    an_interrupt_inside_a_forward_stops_all_at_once,
    an_edit_is_found_and_accepted,
    a_step_that_breaks_off_goes_back_to_the_anchors,
    restore_undoes_an_edit,
    fates_do_not_depend_on_where_a_parameter_lies,
    methods_besides_forward_are_captured,
    bases_move_between_one_process_and_shards,
    checkpoints_move_between_one_process_and_shards,
    checkpoints_move_between_replicas_and_shards,
    checkpoints_move_from_replicas_to_shards,
    the_recipe_of_torch_carries_bases_into_shards_and_back,
    a_plan_agrees_with_what_each_rank_holds,
    other_ways_to_shard,
]
