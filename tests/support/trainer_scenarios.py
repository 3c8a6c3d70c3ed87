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


def run(folder: Path, callback: Any, kind: Any = OnCPU, given: Any = None, **options: Any) -> Any:
    running = make(folder, callback, kind, given, **options)
    with keeping_and_learning(running.model, running):
        running.train()
    assert names(running) == ["pool", "task 2"]
    return running


def goes_on(folder: Path, **options: Any) -> None:
    """A run that is resumed in its middle ends with the weights of the one that was not interrupted."""
    whole = run(folder, keep(Sentences(0)), save_strategy="steps", save_steps=5, **options)
    callback = keep(Sentences(0))
    again = make(folder, callback, **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert [report.task for report in callback.reports] == ["task 2"] and names(again) == ["pool", "task 2"]
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(_local(one), _local(two))


def _local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def replicas(folder: Path) -> None:
    goes_on(folder / "ddp")


def shards(folder: Path) -> None:
    goes_on(folder / "fsdp", **SHARDED)


def sharded_checkpoints(folder: Path) -> None:
    sharded = {**SHARDED["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}  # type: ignore[dict-item]
    goes_on(folder / "sharded", fsdp=True, fsdp_config=sharded)


def a_basis_file_of_one_engine_begins_the_run_of_another(folder: Path) -> None:
    path = folder / "bases.safetensors"
    first = make(folder / "first", keep(Sentences(0), False, path=path))
    first.train()
    later = make(folder / "later", keep(bases=path), **SHARDED)
    later.model.load_state_dict(first.model.state_dict())
    with keeping_and_learning(later.model, later, better=-1.0):
        later.train()
    assert names(later) == ["pool", "task 2"]


def an_optimizer_class_of_ones_own(folder: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (NullSpaceAdamW, {"lr": 3e-3})}
    running = run(folder / "class", call(Sentences(0)), OnCPU, given, **SHARDED)
    assert isinstance(unwrap(running.optimizer), NullSpaceAdamW)


def a_trainer_class_of_ones_own(folder: Path) -> None:
    run(folder / "trainer", call(Sentences(0)), Explicit, **SHARDED)


SCENARIOS: list[Callable[[Path], None]] = [
    replicas,
    shards,
    sharded_checkpoints,
    a_basis_file_of_one_engine_begins_the_run_of_another,
    an_optimizer_class_of_ones_own,
    a_trainer_class_of_ones_own,
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
