"""All experts of one model: a child module without state dict entries, and the forward hooks that run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..model.loader import LoaderPass
from ..model.names import named_parameters
from ..report import ParameterReport
from ..subspace.basis import Fate
from ..verification.probes import record_probe
from .moe.context import RoutingContext
from .moe.experts import Stateless
from .moe.layer import ExpertLayer
from .moe.recognition import TaskRecognition, tower_of
from .moe.sites import find_target_modules, refuse_narrow
from .options import IGSP
from .report import ExpertReport, LayerReport, TrainableCount

CHILD = "igsp"
ALIKE = 0.5  # share of a task's samples, as near to another task, from which on that is said


class ExpertBank(Stateless):
    """One `ExpertLayer` a layer, as children whose names are those of the layers with ``/`` for ``.``."""

    def __init__(self, layers: list[ExpertLayer], scope: RoutingContext) -> None:
        super().__init__()
        self.scope = scope
        self.handles: list[Any] = []
        for layer in layers:
            self.add_module(layer.name.replace(".", "/"), layer)

    @property
    def layers(self) -> list[ExpertLayer]:
        """The layers in the order of the model."""
        return [layer for layer in self._modules.values() if isinstance(layer, ExpertLayer)]

    def remove(self, model: nn.Module) -> None:
        """Take the hooks and this module away from `model`."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        model._modules.pop(CHILD, None)

    def count(self) -> tuple[int, int]:
        """Return how many parameters the frozen experts have, and how many routers and recognition."""
        experts = sum(value.numel() for layer in self.layers for value in layer.history.values())
        routers = sum(
            value.numel() for layer in self.layers for record in layer.routers() for value in record.buffers()
        )
        routers += sum(value.numel() for layer in self.layers for value in layer.known.values())
        return experts, routers


def install_experts(model: nn.Module, options: IGSP) -> ExpertBank:
    """Put experts beside the layers of `model` that the options name; return their bank.

    Raises:
        OptionError: no layer matches, an expert does not fit a layer, or the model carries experts already.
    """
    if hasattr(model, CHILD):
        raise OptionError(
            f"{type(model).__name__} already carries experts (its attribute '{CHILD}'): detach() the optimizer that "
            f"put them there; if that is gone, model.{CHILD}.remove(model)"
        )
    sites, scope = find_target_modules(model, options.target_modules), RoutingContext(options.plan(None))
    refuse_narrow(sites, options.width)
    layers = [ExpertLayer(site, options, scope, number, _device(site.module)) for number, site in enumerate(sites)]
    bank = ExpertBank(layers, scope)
    for site, layer in zip(sites, layers):
        bank.handles.append(site.module.register_forward_hook(layer.add_experts, with_kwargs=True))
    if options.router == "per-task":
        _recognise(bank, model)
    bank.train(model.training)
    model.add_module(CHILD, bank)
    return bank


def _recognise(bank: ExpertBank, model: nn.Module) -> None:
    """Let each tower find the tasks of samples by its last layer with experts."""
    last = {tower_of(layer.name, model): layer for layer in bank.layers}
    for number, (name, layer) in enumerate(last.items()):
        tower, device = model.get_submodule(name), layer.router.device
        layer.recognition = TaskRecognition(bank.scope, layer.widths[0], number, device)
        bank.handles.append(tower.register_forward_pre_hook(layer.recognition.enter, with_kwargs=True))
        bank.handles.append(tower.register_forward_hook(layer.recognition.leave, always_call=True))


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def measure_backbone(model: nn.Module) -> dict[str, list[float]]:
    """Return sum, norm and the sum with signs by place of every parameter of `model` but the experts', by name.

    A random change of a parameter moves its sum by about the norm of the change; rows or columns that change places
    move the last.
    """
    found = {}
    for name, parameter in named_parameters(model).items():
        if (parameter.is_floating_point() or parameter.is_complex()) and not name.startswith(f"{CHILD}."):
            value = parameter.detach()
            value = torch.view_as_real(value) if value.is_complex() else value
            value = value.float() if value.itemsize == 1 else value  # float8 has no sums
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            sums = [value.sum(dtype=dtype), torch.linalg.vector_norm(value, dtype=dtype)]
            sums += [_sums_along(value, axis, dtype) for axis in range(value.ndim)]
            whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in sums]
            placed = sum(float(part @ _signs(part)) for part in whole[2:])
            found[name] = [float(f"{number:.9g}") for number in (*map(float, whole[:2]), placed)]
    return found


def _sums_along(value: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Return the sums of `value` over all other axes, a vector."""
    others = [n for n in range(value.ndim) if n != axis]
    return value.sum(others, dtype=dtype) if others else value.to(dtype)


def _signs(like: Tensor) -> Tensor:
    """Return numbers in -1..1, no two alike, in the shape of the vector `like`."""
    return torch.cos(torch.arange(1, len(like) + 1, dtype=like.dtype, device=like.device))


def backbone_drifts(model: nn.Module, before: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Return the relative change of parameters that are not those `before` (`measure_backbone`), and its limit.

    Rounding to half precision is no change, nor are numbers that were not finite before.
    """
    now, held, found = measure_backbone(model), named_parameters(model), {}
    for name in filter(before.__contains__, now) if before else ():
        least, limit = _size_and_limit(held[name], before[name][1])
        coarse = limit > 1e-4
        shares = []
        for a, b in zip(now[name], before[name]):
            moved = 0.0 if a == b or (a != a and b != b) else abs(a - b)
            size = max(least, abs(b)) if coarse else least  # equal numbers all round to the same side
            shares.append(moved / size if moved and size else float("inf") if moved else 0.0)
        if not all(share <= limit for share in shares):
            found[name] = max(shares, key=lambda share: (not isfinite(share), share)), limit
    return found


def _size_and_limit(parameter: Tensor, norm: float) -> tuple[float, float]:
    """Return the least size of a parameter, and the share of it by which measures may move."""
    rounds = torch.finfo(parameter.dtype)
    if rounds.eps < 1e-4:
        return norm, 1e-4
    tiny = norm < parameter.numel() ** 0.5 * rounds.tiny  # numbers round to multiples of eps * tiny
    return parameter.numel() * rounds.tiny if tiny else norm, 4 * rounds.eps


def changed_backbone(model: nn.Module, before: Mapping[str, Sequence[float]]) -> str:
    """Return which parameters of `model` are not those `before` (`measure_backbone`), or ""."""
    moved = list(backbone_drifts(model, before))
    if not moved:
        return ""
    listed = ", ".join(moved[:3]) + (", ..." if len(moved) > 3 else "")
    return (
        f"the backbone is not that of the first task: {len(moved)} of {len(before)} parameters differ ({listed}), so "
        "finished tasks compute something else now; load the weights of that run"
    )


def record_task(
    work: LoaderPass, first: Any, batches: int, options: str
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return probe tensors and record of the task with the samples `first`, for `BasisStore.probes` and `.tasks`."""
    probe = record_probe(work, first)
    record: dict[str, object] = {
        "name": work.task,
        "policy": options,
        "batches": batches,
        **probe.record,
        "untrained": [],
    }
    return probe.tensors, record


def report_task(
    bank: ExpertBank,
    work: LoaderPass,
    batches: int,
    layers: list[LayerReport],
    trained: TrainableCount,
    reason: str,
    options: IGSP,
    changed: str,
) -> ExpertReport:
    """Return the report of a task whose experts have been frozen."""
    experts, routers = bank.count()
    frozen = "backbone of mode 'igsp'"
    rows = [ParameterReport(name, Fate.FROZEN, frozen) for name in work.parameters if not name.startswith(f"{CHILD}.")]
    bases = [(layer.inputs, layer.outputs, layer.emitted, layer.gates) for layer in bank.layers]
    stored = sum(tensor.nbytes for tensors in bases for tensor in tensors)
    stored += sum(part.nbytes for layer in bank.layers for part in layer.history.values())
    return ExpertReport(
        task=work.task,
        model=type(work.model).__name__,
        policy="iGSP",
        batches=batches,
        parameters=tuple(rows),
        seconds=0.0,
        bytes=stored,
        transient_bytes=0,
        warnings=tuple(
            [
                *([changed] if changed else []),
                *_warnings(layers),
                *_quiet(bank, layers, options),
                *_unseen(bank),
                *_phase_warnings(bank, layers, trained, options),
            ]
        ),
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


def _quiet(bank: ExpertBank, layers: list[LayerReport], options: IGSP) -> list[str]:
    if not options.noise or not any(one.watch.quiet and len(told.flow) > 1 for one, told in zip(bank.layers, layers)):
        return []
    return [
        "phase 1 ran in evaluation mode, where no noise lets samples try other experts: call model.train() before "
        "training, or say so with IGSP(noise=0.0)"
    ]


def _unseen(bank: ExpertBank) -> list[str]:
    found, towers = [], [(one.name, one.recognition) for one in bank.layers if one.recognition is not None]
    blind = [name for name, recognition in towers if float(recognition.limits[-1]) < 0]
    if blind:
        found.append(
            f"no sample of the task passed through the chain of blocks around '{blind[0]}' as a whole: without a name "
            "the task is not found there"
        )
    alike = [(name, *recognition.alike) for name, recognition in towers if recognition.alike[1] > ALIKE]
    if alike:
        places = " and ".join(f"'{name}'" for name, _, _ in alike)
        _, number, share = alike[0]
        found.append(
            f"{share:.0%} of the task's samples look like those of '{bank.scope.tasks[number]}' in the chain of blocks "
            f"around {places}: without a name either may be chosen for them"
        )
    return found


def _phase_warnings(bank: ExpertBank, layers: list[LayerReport], trained: TrainableCount, options: IGSP) -> list[str]:
    if trained.second_steps:
        return []
    steps, cap = trained.first_steps, max(1, trained.first_steps // 3)
    pruned, candidates = (sum(getattr(layer, name) for layer in layers) for name in ("pruned", "candidates"))
    if steps < 2:
        return [
            f"the task took a single step: phase 2 never ran, {pruned} of {candidates} candidates were pruned; a task "
            "needs one step in each phase, with IGSP(cap=1) two in all"
        ]
    keep = "; on_cap='prune' then prunes where routers have not converged as well" if options.on_cap == "keep" else ""
    return [
        f"phase 1 took all {steps} steps of the task (cap={bank.scope.plan.cap}): phase 2 never ran, {pruned} of "
        f"{candidates} candidates were pruned; set IGSP(cap=...) to at most a third of a task's steps, here {cap}{keep}"
    ]
