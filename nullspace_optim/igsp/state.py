"""The mode as plain JSON values and tensors, and back: its part of basis files and checkpoints.

Tensor keys, `i` being the number of the layer: ``i/inputs``, ``i/outputs``, ``i/emitted``, ``i/gates`` (bases),
``i/history/<part>`` `[H, ...]`, ``i/fresh/<e>/<part>``, ``i/router`` `[E, d + 1]`, ``i/watch/<sum>``,
``i/finished/<task>/<field>``. Nothing is trusted: everything is checked against the layers of the model before anything
of it changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BasisFileError, NullSpaceWarning
from ..optimizer.mode import Host
from ..subspace.basis import Extension
from .bank import ExpertBank
from .moe.convergence import Convergence, ConvergenceMonitor
from .moe.experts import PARTS, Expert, TaskRouter, shapes
from .moe.layer import ExpertLayer
from .moe.recognition import KNOWN, TaskRecognition
from .options import IGSP, Plan
from .report import TrainableCount

SUMS = ("flow", "origin", "centre", "window", "previous")
SOURCE = "the experts in this file or checkpoint"
ROUTING = 2  # version of what routers read: 2 since projections (`router.projection`) lengthen with the layer's width


@dataclass
class Progress:
    """Trainable parameters and steps of the task at work, the reason why its phase began, and the backbone beside
    which the first task was finished (`bank.measure_backbone`).
    """

    trained: TrainableCount
    reason: str
    backbone: dict[str, list[float]] = field(default_factory=dict)

    def count_step(self, first_phase: bool) -> None:
        """Count a step of one phase."""
        name = "first_steps" if first_phase else "second_steps"
        self.trained = replace(self.trained, **{name: getattr(self.trained, name) + 1})


def pack_state(bank: ExpertBank, options: IGSP, progress: Progress) -> Extension:
    """Return record and tensors of all experts; the tensors share memory with them."""
    scope, trained, tensors = bank.scope, progress.trained, {}
    layers = []
    for number, layer in enumerate(bank.layers):
        layers.append(_describe(layer))
        tensors.update({f"{number}/{key}": value.detach() for key, value in _tensors(layer).items()})
    record: dict[str, object] = {
        "mode": "igsp",
        "options": repr(options),
        "structure": options.structure,
        "routing": ROUTING,
        "tasks": list(scope.tasks),
        "steps": scope.steps,
        "first_phase": scope.first_phase,
        "plan": list(scope.plan),
        "counts": [trained.first, trained.second],
        "phase_steps": [trained.first_steps, trained.second_steps],
        "reason": progress.reason,
        "backbone": progress.backbone,
        "layers": layers,
    }
    return Extension(record, tensors)


def _describe(layer: ExpertLayer) -> dict[str, object]:
    return {
        "name": layer.name,
        "widths": list(layer.widths),
        "members": list(layer.members),
        "fresh": len(layer.fresh),
        "candidates": layer.candidates,
        "router_trains": layer.router.requires_grad,
        "finished": len(layer.finished),
        "convergence": layer.watch.convergence.plain,
    }


def _tensors(layer: ExpertLayer) -> dict[str, Tensor]:
    found = {"inputs": layer.inputs, "outputs": layer.outputs, "emitted": layer.emitted, "gates": layer.gates}
    found.update(floor=layer.floor, router=layer.router)
    found.update({f"history/{part}": value for part, value in layer.history.items()})
    for number, expert in enumerate(layer.fresh):
        found.update({f"fresh/{number}/{name}": value for name, value in expert.named_parameters()})
    found.update({f"watch/{name}": value for name, value in layer.watch.named_buffers()})
    found.update({f"known/{name}": value for name, value in layer.known.items()})
    for number, record in enumerate(layer.finished):
        found.update({f"finished/{number}/{name}": value for name, value in record.named_buffers()})
    return found


def restore_state(bank: ExpertBank, options: IGSP, progress: Progress, extension: Extension) -> None:
    """Make experts and progress what `pack_state` described.

    Raises:
        BasisFileError: the experts belong to another architecture or to other options; nothing was changed.
    """
    record: Any = extension.record
    try:
        _compare(record, bank, options)
        prepared = [_read_layer(layer, record, number, extension) for number, layer in enumerate(bank.layers)]
        tasks, steps, first_phase = [str(name) for name in record["tasks"]], int(record["steps"]), record["first_phase"]
        counts, taken = ([int(n) for n in record[key]] for key in ("counts", "phase_steps"))
        plan = Plan(*(int(n) for n in record.get("plan", options.plan(None))))
        trained, reason = TrainableCount(counts[0], counts[1], taken[0], taken[1]), str(record["reason"])
        backbone = {str(name): [float(one) for one in sums] for name, sums in record.get("backbone", {}).items()}
        if any(len(sums) < 2 for sums in backbone.values()):
            raise ValueError("the backbone's parameters lack their sum or norm")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise BasisFileError(f"{SOURCE} are damaged or foreign ({error!r})") from error
    for layer, contents in zip(bank.layers, prepared):
        layer.replace(contents)
        if options.orthogonal == "structural" and not first_phase:
            for expert in layer.fresh:
                expert.down.requires_grad_(False)
    bank.scope.tasks, bank.scope.plan = tasks, plan
    bank.scope.move_to(steps, bool(first_phase))
    progress.trained, progress.reason, progress.backbone = trained, reason, backbone


def _compare(record: Any, bank: ExpertBank, options: IGSP) -> None:
    """Refuse experts of other layers or other options, with what was found and what is here."""
    here = [(layer.name, *layer.widths) for layer in bank.layers]
    there = [(entry["name"], *entry["widths"]) for entry in record["layers"]]
    if here != there:
        pair = next((pair for pair in zip(there, here) if pair[0] != pair[1]), None)
        found, wanted = ("'{}' ({} -> {})".format(*entry) for entry in pair) if pair else (len(there), len(here))
        detail = f"{found} there, {wanted} here" if pair else f"{found} layers there, {wanted} here"
        raise BasisFileError(
            f"{SOURCE} were made for another architecture: {detail}; use the model and the target_modules of that run"
        )
    structure = options.structure
    wrong = [f"{key}={record['structure'][key]!r} there, {value!r} here" for key, value in structure.items()
             if record["structure"][key] != value]  # fmt: skip
    if wrong:
        raise BasisFileError(
            f"{SOURCE} were made with other options: {'; '.join(wrong)}; construct IGSP(...) with those"
        )


def _read_layer(layer: ExpertLayer, record: Any, number: int, extension: Extension) -> dict[str, Any]:
    """Return the contents that `layer` is to take over, each checked."""
    entry, device, options = record["layers"][number], layer.router.device, layer.options
    gate, (inputs, outputs) = layer.gate_width, layer.widths
    if layer.draw is not None and record.get("routing") not in (None, ROUTING):
        raise BasisFileError(f"{SOURCE} were written by a later version (routing {record['routing']}, here {ROUTING})")
    routers = extension.tensors.get(f"{number}/router")
    if routers is not None and routers.shape[-1] == inputs + 1 != gate:
        raise BasisFileError(
            f"{SOURCE} were written when routers read all {inputs} inputs of '{layer.name}', now they read {gate - 1}: "
            "use the version that wrote them, or train these tasks again"
        )
    if layer.draw is not None and record.get("routing") is None:
        raise BasisFileError(
            f"{SOURCE} were written when routers of wide layers such as '{layer.name}' read another projection of its "
            "inputs, and would route otherwise now: use the version that wrote them, or train these tasks again"
        )
    sizes = shapes(options.kind, options.width, inputs, outputs)

    def take(key: str, *shape: int | None) -> Tensor:
        tensor = extension.tensors[f"{number}/{key}"]
        if len(tensor.shape) != len(shape) or any(w not in (None, s) for s, w in zip(tensor.shape, shape)):
            raise ValueError(f"'{layer.name}': {key} is {list(tensor.shape)}, expected {list(shape)}")
        return tensor.detach().to(device, copy=True)

    history = {part: take(f"history/{part}", None, *sizes[part]) for part in PARTS[options.kind]}
    stored, members = len(history["down"]), [int(m) for m in entry["members"]]
    if any(len(value) != stored for value in history.values()) or any(not 0 <= m < stored for m in members):
        raise ValueError(f"'{layer.name}': parts of the history differ in length, or members are not in it")
    fresh = []
    for place in range(int(entry["fresh"])):
        expert = Expert(take(f"fresh/{place}/down", *sizes["down"]), outputs, options.kind)
        for part in PARTS[options.kind][1:]:
            getattr(expert, part).data = take(f"fresh/{place}/{part}", *sizes[part])
        fresh.append(expert)
    weight = nn.Parameter(take("router", len(members) + len(fresh), gate), bool(entry["router_trains"]))
    watch = ConvergenceMonitor(options, weight)
    for name in SUMS:
        present = f"{number}/watch/{name}" in extension.tensors
        rows = len(extension.tensors[f"{number}/watch/flow"])
        shape = {"flow": (rows,), "origin": (rows, gate), "centre": (gate,)}.get(name, (rows,))
        shape = (rows + 1,) if name == "window" else shape
        setattr(watch, name, take(f"watch/{name}", *shape) if present else None)
    watch.convergence = Convergence.of(entry["convergence"])
    finished = []
    for task in range(int(entry["finished"])):
        numbers = take(f"finished/{task}/experts", None)
        if numbers.dtype != torch.int64 or (
            len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < stored
        ):
            raise ValueError(f"'{layer.name}': the router of task {task + 1} names experts that are not there")
        routed = take(f"finished/{task}/weight", len(numbers), gate)
        finished.append(TaskRouter(routed, numbers))
    known = [name for name in KNOWN if f"{number}/known/{name}" in extension.tensors]
    return {
        **{f"history_{part}": value for part, value in history.items()},
        "inputs": take("inputs", inputs, None),
        "outputs": take("outputs", outputs, None),
        "emitted": take("emitted" if f"{number}/emitted" in extension.tensors else "outputs", outputs, None),
        "gates": take("gates", gate, None),
        "floor": take("floor"),
        "fresh": nn.ModuleList(fresh),
        "finished": nn.ModuleList(finished),
        "members": members,
        "candidates": int(entry["candidates"]),
        "router": weight,
        "watch": watch,
        "known": _read_known(layer.recognition, known, len(finished), take),
    }


def _read_known(
    recognition: TaskRecognition | None, present: list[str], tasks: int, take: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Return what the tower is to know, of which `present` is there; without it, `tasks` that are never recognised.

    Earlier files have one centre a task.
    """
    if recognition is None:
        return {}
    size, each = len(recognition.scatter), recognition.owners.new_tensor(range(tasks))
    shapes = {"centres": (None, size), "owners": (None,), "spreads": (tasks, 2), "limits": (tasks,)}
    shapes |= {"scatter": (size, size), "count": ()}
    if not present:
        if tasks:
            text = f"{SOURCE} lack what tells tasks apart: without a name their {tasks} tasks run the plain backbone"
            warnings.warn(text, NullSpaceWarning, stacklevel=2)
        sizes = {name: [tasks if width is None else width for width in shape] for name, shape in shapes.items()}
        new = {name: recognition.scatter.new_full(shape, -float(name == "limits")) for name, shape in sizes.items()}
        return {**new, "owners": each}
    found = {
        name: take(f"known/{name}", *shape) for name, shape in shapes.items() if name != "owners" or name in present
    }
    owners = found.setdefault("owners", each)
    if (
        owners.dtype != torch.int64
        or len(owners) != len(found["centres"])
        or set(owners.tolist()) != set(each.tolist())
    ):
        raise ValueError("centres of recognition and the tasks that they belong to differ")
    return found


@contextmanager
def all_or_nothing(host: Host, bank: ExpertBank, progress: Progress) -> Iterator[None]:
    """Run the block; on any error put experts, progress and the host's bases back as they were, and raise it again."""
    layers = [(layer, layer.contents()) for layer in bank.layers]
    flags = [(parameter, parameter.requires_grad) for parameter in bank.parameters()]
    tasks, plan = list(bank.scope.tasks), bank.scope.plan
    steps, first_phase = bank.scope.steps, bank.scope.first_phase
    progressed = dict(vars(progress))
    store, parameters = host.store.copy(), dict(host.parameters)
    try:
        yield
    except BaseException:
        for layer, contents in layers:
            layer.replace(contents)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        bank.scope.tasks, bank.scope.plan = tasks, plan
        bank.scope.move_to(steps, first_phase)
        vars(progress).update(progressed)
        host.take(store, parameters)
        raise
