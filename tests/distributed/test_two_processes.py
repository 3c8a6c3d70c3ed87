"""Two processes give what one gives, fail together and never wait for each other for ever."""

from __future__ import annotations

from pathlib import Path

import ddp_scenarios
import fsdp_scenarios
import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import (
    Codebook,
    Everything,
    Plain,
    compare,
    load_by_torch,
    momentum,
    results,
    rows,
    save_by_torch,
    seeded,
    tokens,
    train,
    two_tasks,
    wrap,
)
from processes import SHARDS_NEEDED, SHARDS_ON_CPU, run_scenarios

from nullspace_optim import FixedRank
from nullspace_optim.policies import VPTNSP

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
SHARDED = fsdp_scenarios.SCENARIOS
SCENARIOS = [*ddp_scenarios.SCENARIOS, *(SHARDED if SHARDS_ON_CPU else ())]
needs_shards = pytest.mark.skipif(not SHARDS_ON_CPU, reason=SHARDS_NEEDED)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write down what one process finds, then run all scenarios in two."""
    folder = tmp_path_factory.mktemp("two")
    one_process(folder)
    one_process_saves(folder)
    return {**run_scenarios(SCENARIOS, folder), "folder": str(folder)}


def one_process(folder: Path) -> None:
    model = seeded(Everything)
    optimizer = wrap(model)
    two_tasks(model, optimizer, tokens)
    torch.save(results(optimizer, dict(model.named_parameters())), folder / "everything.pt")
    for name, policy in ddp_scenarios.POLICIES.items():
        model = seeded(Plain)
        optimizer = wrap(model, policy=policy, bias="joint")
        for task in (1, 2):
            optimizer.consolidate(rows(task), progress=False)
        torch.save(results(optimizer, {}), folder / f"policy-{name}.pt")
    for name, policy in ddp_scenarios.SOFT_OR_TWO_SIDED.items():
        model = seeded(Everything)
        optimizer = wrap(model, momentum(model), policy=policy)
        two_tasks(model, optimizer, tokens)
        torch.save(results(optimizer, dict(model.named_parameters())), folder / f"soft-{name}.pt")
    model = seeded(Codebook)
    optimizer = wrap(model, momentum(model))
    two_tasks(model, optimizer, tokens)
    torch.save(results(optimizer, dict(model.named_parameters())), folder / "codebook.pt")
    model = seeded(Plain)
    optimizer = wrap(model)
    optimizer.consolidate(rows(1), progress=False)
    torch.save(results(optimizer, {}), folder / "one.pt")
    optimizer = wrap(seeded(ddp_scenarios.Declared), policy=VPTNSP(eta=1.0))
    optimizer.consolidate(rows(1), progress=False)
    assert set(optimizer.bases["prompt"].subspaces) == {"right", "left"}
    torch.save(results(optimizer, {}), folder / "declared.pt")
    model = seeded(ddp_scenarios._Branches)
    optimizer = wrap(model, policy=FixedRank(2), rows="all")
    batches = [torch.cat([torch.full((4, 1), sign), batch[:, 1:]], 1) for sign, batch in zip((1.0, -1.0), rows(1))]
    optimizer.consolidate(batches, progress=False)
    torch.save(results(optimizer, {}), folder / "branches.pt")


def one_process_saves(folder: Path) -> None:
    model = seeded(Everything)
    optimizer = wrap(model)
    optimizer.consolidate(tokens(1), progress=False)
    train(model, optimizer, tokens(2))
    optimizer.save(folder / "everything.safetensors")
    dcp.save({"training": optimizer.checkpoint()}, checkpoint_id=folder / "by-one")
    save_by_torch(model, optimizer, folder / "by-one-torch")
    torch.save({name: weight.detach().clone() for name, weight in model.named_parameters()}, folder / "before.pt")
    train(model, optimizer, tokens(3))
    torch.save({name: weight.detach().clone() for name, weight in model.named_parameters()}, folder / "after.pt")
    for name, options in fsdp_scenarios.FORMS.items():
        model = seeded(Everything)
        optimizer = wrap(model, momentum(model), **options)
        two_tasks(model, optimizer, tokens, steps=18)
        optimizer.verify()
        torch.save(results(optimizer, dict(model.named_parameters())), folder / f"form-{name}.pt")


@pytest.mark.fault(103, 104, 105, 106, 107, 108, 109, 110)
@pytest.mark.parametrize(
    "name",
    [
        *(scenario.__name__ for scenario in ddp_scenarios.SCENARIOS),
        *(pytest.param(scenario.__name__, marks=needs_shards) for scenario in SHARDED),
    ],
)
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "passed", outcomes[name]


@pytest.mark.parametrize("name", [pytest.param("by-two", marks=needs_shards), "by-replicas"])
def test_one_process_goes_on_where_two_stopped(name: str, outcomes: dict[str, str]) -> None:
    folder = Path(outcomes["folder"])
    if not (folder / f"{name}.pt").exists():
        pytest.fail("the two processes wrote no checkpoint")
    torch.manual_seed(7)
    model = Everything()
    optimizer = wrap(model)
    dcp.load({"training": optimizer.checkpoint()}, checkpoint_id=folder / name)
    train(model, optimizer, tokens(4))
    compare(dict(model.named_parameters()), torch.load(folder / f"{name}.pt"))
    assert optimizer.verify(tokens(1)).ok


@needs_shards
def test_one_process_reads_what_shards_wrote_by_the_recipe_of_torch(outcomes: dict[str, str]) -> None:
    folder = Path(outcomes["folder"])
    torch.manual_seed(7)
    model = Everything()
    optimizer = wrap(model)
    load_by_torch(model, optimizer, folder / "by-two-torch")
    train(model, optimizer, tokens(3))
    compare(dict(model.named_parameters()), torch.load(folder / "after.pt"))
    assert optimizer.verify(tokens(1)).ok
