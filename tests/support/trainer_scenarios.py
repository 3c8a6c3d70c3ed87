"""What must hold of a Trainer in two processes; a script for `accelerate launch`: each scenario runs on both ranks."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.optim import AdamW
from trainers import Sentences, bert, call, keep, keeping_and_learning, names, trainer
from transformers import Trainer

from nullspace_optim import NullSpaceOptimizer, NumericalRank, unwrap

SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}


class OnCPU(Trainer):
    """A trainer that shards on CPUs too: Accelerate takes FSDP for a matter of accelerators."""

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp:
            self.args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class Explicit(OnCPU):
    """The way of those who make their optimizer themselves."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = NullSpaceOptimizer(super().create_optimizer(), self.model, policy=NumericalRank())
        return self.optimizer


class NullSpaceAdamW(NullSpaceOptimizer):
    """A class for `optimizer_cls_and_kwargs=`."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(AdamW(params, **options), policy=NumericalRank())


def make(folder: Path, callback: Any, kind: Any = OnCPU, given: Any = None, **options: Any) -> Any:
    AcceleratorState._reset_state(True)
    return trainer(bert(), 1, folder, callback, kind, given, **options)


def goes_on(folder: Path, wrap: Callable[[Any], Any] = keep, kind: Any = OnCPU, **options: Any) -> None:
    """The pool is kept; a run that is resumed in its middle ends with the weights of one that was not interrupted."""
    whole = make(folder, wrap(Sentences(0)), kind, save_strategy="steps", save_steps=3, **options)
    with keeping_and_learning(whole.model, whole):
        whole.train()
    callback = wrap(Sentences(0))
    again = make(folder, callback, kind, **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert names(whole) == names(again) == ["pool", "task 2"]
    assert [report.task for report in callback.reports] == ["task 2"]
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(_local(one), _local(two))


def _local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def replicas(folder: Path) -> None:
    goes_on(folder / "ddp")


def shards(folder: Path) -> None:
    goes_on(folder / "fsdp", **SHARDED)


def sharded_checkpoints_and_a_trainer_class_of_ones_own(folder: Path) -> None:
    sharded = {**SHARDED["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}  # type: ignore[dict-item]
    goes_on(folder / "sharded", call, Explicit, fsdp=True, fsdp_config=sharded)


def a_basis_file_of_replicas_in_shards_and_an_optimizer_class(folder: Path) -> None:
    path = folder / "bases.safetensors"
    first = make(folder / "first", keep(Sentences(0), False, path=path))
    first.train()
    given = {"optimizer_cls_and_kwargs": (NullSpaceAdamW, {"lr": 3e-3})}
    later = make(folder / "later", call(bases=path), OnCPU, given, **SHARDED)
    later.model.load_state_dict(first.model.state_dict())
    later.train_dataset = Sentences(2)
    with keeping_and_learning(later.model, later, better=-1.0):
        later.train()
    assert names(later) == ["pool", "task 2"] and isinstance(unwrap(later.optimizer), NullSpaceAdamW)


SCENARIOS: list[Callable[[Path], None]] = [
    replicas,
    shards,
    sharded_checkpoints_and_a_trainer_class_of_ones_own,
    a_basis_file_of_replicas_in_shards_and_an_optimizer_class,
]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    outcomes = {}
    for scenario in SCENARIOS:
        try:
            scenario(folder)
            dist.barrier()
            outcomes[scenario.__name__] = "passed"
        except BaseException:
            outcomes[scenario.__name__] = traceback.format_exc()
            break
    (folder / f"outcome-{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
