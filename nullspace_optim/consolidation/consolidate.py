"""One pass over a loader: capture -> second moments -> policy -> bases. All or nothing.

`consolidate` reads the model and returns a new `BasisStore` and a report; nothing is changed until the caller takes
the store over, and the model is left exactly as it was found (see `restored_model`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..covariance.second_moment import SecondMoment
from ..distributed.communicator import Communicator
from ..distributed.failures import raise_on_all_ranks
from ..errors import ConsolidationError
from ..model.find import unfinished
from ..model.loader import LoaderPass
from ..model.restore import restored_model
from ..model.storage import is_plain
from ..report import ConsolidationReport, ParameterReport
from ..settings import Settings
from ..subspace.basis import BasisStore, Fate
from ..subspace.projection import exact_products
from ..verification.verify import RecentSamples
from .describe import describe, remember_task
from .fates import settle_fates
from .observe import Observation, observe


def consolidate(
    work: LoaderPass, store: BasisStore, options: Settings, recent: RecentSamples, ranks: Communicator
) -> tuple[BasisStore, ConsolidationReport]:
    """Return the bases after one more task and a report; `store` and the model are unchanged.

    `recent` holds first samples of earlier tasks, whose drift is reported, and takes those of this one.

    Raises:
        ConsolidationError: no batches, a task name used twice, an endless loader, or no free dimension left with
            ``on_full="raise"``.
        CaptureError: non-finite rows or a weight that could not be observed.
    """
    started = time.perf_counter()
    with raise_on_all_ranks():
        if any(task["name"] == work.task for task in store.tasks):
            raise ConsolidationError(f"task '{work.task}' has been consolidated already; give this one another name=")
        check_ready(work)
    with restored_model(work.model, work.loader):
        seen = observe(work, options, ranks)
        grown, rows = settle(work, seen, store, options, ranks)
        remember_task(work, options, seen, grown)
        report = describe(work, options, seen, grown, rows, *recent.drift(work, store))
    if options.on_full == "raise":
        _refuse_full(report)
    recent.keep(work.task, seen.tally.first, work.forward)
    return grown, replace(report, seconds=time.perf_counter() - started)


def settle(
    work: LoaderPass, seen: Observation, store: BasisStore, options: Settings, ranks: Communicator
) -> tuple[BasisStore, list[ParameterReport]]:
    """Return the bases that protect what was seen as well, and a line for each parameter; `store` is unchanged."""
    with exact_products(seen.device):
        return settle_fates(work.parameters, seen.captured, store, work.task, options, ranks, progress=work.progress)


def measure(work: LoaderPass, options: Settings, ranks: Communicator) -> dict[str, SecondMoment]:
    """Return the second moment of every parameter that met rows, as `consolidate` would see it; nothing is kept.

    Of a parameter that met rows on both sides it is that of the right one. In one process only.

    Raises:
        ConsolidationError: no batches, several processes, or a model that cannot be consolidated.
    """
    check_ready(work)
    if options.sketch is not None:
        raise ConsolidationError('measure() returns whole second moments: use covariance="exact"')
    if ranks.size > 1:
        raise ConsolidationError("measure() sees the batches of one process only; measure before the processes start")
    with restored_model(work.model, work.loader):
        captured = observe(work, options, ranks).captured
    sides = {name: seen.sides for name, seen in captured.items() if seen.sides and not seen.reasons}
    chosen = {name: found.get("right") or next(iter(found.values())) for name, found in sides.items()}
    return {name: moment for name, moment in chosen.items() if isinstance(moment, SecondMoment)}


def check_ready(work: LoaderPass) -> None:
    """Refuse a model that cannot be consolidated, before anything runs.

    Raises:
        ConsolidationError: a weight that still turns, no trained parameter, or one without values of its own.
    """
    if (found := unfinished(work.model)) is not None:
        raise ConsolidationError(found.format("whose inputs could not be kept"))
    if not work.parameters:
        raise ConsolidationError(
            f"{type(work.model).__name__} holds no trainable parameter of the wrapped optimizer; "
            "pass the model that is trained"
        )
    _refuse_unready(work.parameters)


def _refuse_unready(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters without values, and parameters several elements of which are one place in memory."""
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ConsolidationError(
                f"'{name}' is on the meta device and has no values yet: materialise the model and build the optimizer "
                "from its parameters before consolidating"
            )
        if not is_plain(parameter):
            raise ConsolidationError(
                f"'{name}' is a {str(parameter.layout).removeprefix('torch.')} tensor, of which kept directions cannot "
                "be corrected: make it a dense parameter (to_dense()), or give it requires_grad=False"
            )
        if any(size > 1 and step == 0 for size, step in zip(parameter.shape, parameter.stride())):
            raise ConsolidationError(
                f"'{name}' {tuple(parameter.shape)} is an expanded tensor with strides {parameter.stride()}: several "
                "elements share one place in memory and cannot be corrected apart; make it a parameter of its clone()"
            )


def _refuse_full(report: ConsolidationReport) -> None:
    full = report.of(Fate.FULL)
    if full:
        raise ConsolidationError(
            f"no free direction is left in '{full[0].name}' after task '{report.task}'; nothing was changed. "
            'Lower the policy\'s threshold, release() the parameter, or use on_full="warn" to freeze it'
        )
