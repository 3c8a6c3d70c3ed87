"""What remains of a finished task: its report, and the record and probe with which it is verified."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..basis import Fate
from ..consolidation import Pass, record_probe
from ..report import ParameterReport
from .bank import CHILD, Bank
from .report import ExpertReport, LayerReport, Trainable


def recorded_task(work: Pass, samples: Any, batches: int, options: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return probe tensors and record of the task, for `BasisStore.probes` and `.tasks`."""
    probe = record_probe(work, samples)
    record: dict[str, object] = {
        "name": work.task,
        "policy": options,
        "batches": batches,
        "layers": list(probe.layers),
        "untrained": [],
    }
    return {"digests": probe.digests, "sketches": probe.sketches, "norms": probe.norms}, record


def finished_report(
    bank: Bank, work: Pass, batches: int, layers: list[LayerReport], trained: Trainable, reason: str
) -> ExpertReport:
    """Return the report of a task whose experts have been frozen."""
    experts, routers = bank.count()
    frozen = "backbone of mode 'igsp'"
    rows = [ParameterReport(name, Fate.FROZEN, frozen) for name in work.parameters if not name.startswith(f"{CHILD}.")]
    bases = [(layer.inputs, layer.outputs, layer.gates) for layer in bank.layers]
    stored = sum(tensor.nbytes for tensors in bases for tensor in tensors)
    stored += sum(part.nbytes for layer in bank.layers for part in layer.history.values())
    return ExpertReport(
        task=work.task,
        model=type(work.model).__name__,
        policy="iGSP",
        batches=batches,
        parameters=tuple(rows),
        drift_allowed=0.0,
        assumed_update=False,
        seconds=0.0,
        bytes=stored,
        transient_bytes=0,
        warnings=tuple(_warnings(layers)),
        layers=tuple(layers),
        trainable=trained,
        reason=reason,
        experts=experts,
        routers=routers,
    )


def _warnings(layers: list[LayerReport]) -> list[str]:
    silent = [layer.name for layer in layers if not layer.flow or sum(layer.flow) == 0.0]
    full = [layer.name for layer in layers if layer.used + layer.rank > layer.size]
    found = []
    if silent:
        found.append(
            f"no training forward reached {len(silent)} layers with experts ('{silent[0]}', ...): they learned nothing "
            "in this task"
        )
    if full:
        found.append(
            f"{len(full)} layers have no room for another expert ('{full[0]}', ...): later tasks reuse what is there; "
            "choose a smaller rank"
        )
    return found
