"""Run scenarios in two (or more) gloo processes, one after the other, and tell what became of each.

Starting a process costs seconds, so all scenarios of a test file share two processes. A scenario that fails on a rank
ends that process, which the other notices at once; what comes later is reported as not run.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

# FSDP2 on CPUs: its streams are events' homes from torch 2.7 on.
SHARDS_ON_CPU = hasattr(torch.cpu.current_stream(), "record_event")
SHARDS_NEEDED = "this torch cannot run FSDP2 on a CPU"
Scenario = Callable[[Path], None]
RANKS = 2


def run_scenarios(scenarios: list[Scenario], folder: Path, ranks: int = RANKS) -> dict[str, str]:
    """Return for each scenario by name "passed", or the traceback of the rank that failed first."""
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(rank, ranks, scenarios, folder)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    told = [json.loads((folder / f"outcome-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    return {name: _joined([outcomes.get(name, "not run") for outcomes in told]) for name in map(_name, scenarios)}


def _name(scenario: Scenario) -> str:
    return scenario.__name__


def _joined(outcomes: list[str]) -> str:
    if set(outcomes) == {"passed"}:
        return "passed"
    return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text != "passed")


def _work(rank: int, ranks: int, scenarios: list[Scenario], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    outcomes: dict[str, str] = {}
    store = dist.FileStore(str(folder / f"rendezvous-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for scenario in scenarios:
        torch.manual_seed(0)
        try:
            scenario(folder)
            dist.barrier()
            outcomes[_name(scenario)] = "passed"
        except BaseException:
            outcomes[_name(scenario)] = traceback.format_exc()
            break
    (folder / f"outcome-{ranks}-{rank}.json").write_text(json.dumps(outcomes))
    if set(outcomes.values()) == {"passed"} and len(outcomes) == len(scenarios):
        dist.destroy_process_group()
    os._exit(0)
