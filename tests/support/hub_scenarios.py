"""Model folders in two processes: replicas are written once, sharded models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import SHARDS_ON_CPU
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from nullspace_optim import NullSpaceOptimizer
from nullspace_optim.errors import OptionError
from nullspace_optim.integrations.hub import load_bases, save_pretrained


class Saved(nn.Module):
    """A model that counts how often it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows)

    def save_pretrained(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder / f"weights-{dist.get_rank()}.pt")


def consolidated(model: nn.Module, parameters: Any) -> NullSpaceOptimizer:
    optimizer = NullSpaceOptimizer(AdamW(parameters, lr=1e-3))
    optimizer.consolidate([torch.randn(5, 12)], progress=False)
    return optimizer


def replicas_are_written_once(folder: Path) -> None:
    model = DistributedDataParallel(Saved())
    optimizer = consolidated(model, model.parameters())
    save_pretrained(model, optimizer, folder / "replicas")
    dist.barrier()
    names = sorted(path.name for path in (folder / "replicas").iterdir())
    assert names == ["README.md", "nullspace_bases.safetensors", "weights-0.pt"]
    load_bases(optimizer, folder / "replicas")
    assert optimizer.verify().ok
    if dist.get_rank() == 1:  # an error there is an error everywhere
        model.module.save_pretrained = None
    try:
        save_pretrained(model, optimizer, folder / "failed")
    except OptionError as error:
        assert "has no save_pretrained" in str(error)
    else:
        raise AssertionError("nothing was raised")


def shards_are_refused(folder: Path) -> None:
    model = Saved()
    fully_shard(model)
    optimizer = consolidated(model, model.parameters())
    try:
        save_pretrained(model, optimizer, folder / "shards")
    except OptionError as error:
        assert "is sharded (FSDP2): gather its weights" in str(error)
    else:
        raise AssertionError("nothing was raised")


SCENARIOS = [replicas_are_written_once, *([shards_are_refused] if SHARDS_ON_CPU else [])]
