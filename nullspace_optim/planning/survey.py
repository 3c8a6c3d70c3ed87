"""Survey of a model that exists on the meta device only: the reads of one training step, and its operations.

The forward pass runs under the same `Capture` as a consolidation does, so the fates of the parameters, the sides of
the weights and the second moments they share are the real ones; tensors on the meta device have shapes but no bytes,
and a model of any size takes seconds. What depends on values is not known: all rows count (``rows="relevant"`` only
finds fewer), and which rows of an embedding are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..capture.capture import Capture
from ..covariance.accumulator import ParameterStatistics
from ..covariance.sketch import SketchedCovariance
from ..errors import OptionError
from ..model.names import named_buffers, named_parameters
from ..settings import Bias, Settings
from ..subspace.layout import Layout, MatrixSide
from .shapes import Frozen, Moment, Survey, Weight


def survey(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    batch: int,
    name: str = "",
    trainable: str = "*",
    bias: Bias = "freeze",
    sketch: SketchedCovariance | None = None,
) -> Survey:
    """Return the survey of `model`, whose parameters are on the meta device; `run()` is its forward pass on a batch.

    The inputs that `run` feeds must exist before (tensors made inside a forward pass count as constants, not data).
    Parameters whose name does not match the glob `trainable` are not trained. `bias` is that of the optimizer, `sketch`
    its ``covariance=SketchedCovariance(...)``.

    Raises:
        OptionError: no parameter matches `trainable`, or the forward pass needs values that the meta device has not.
    """
    parameters = {key: p for key, p in named_parameters(model).items() if fnmatch(key, trainable)}
    if not parameters:
        known = ", ".join(list(named_parameters(model))[:3])
        raise OptionError(f"trainable={trainable!r} matches no parameter; their names begin with: {known}")
    buffers = named_buffers(model)
    capture = Capture(parameters, Settings(rows="all", bias=bias), buffers=buffers)
    try:
        with capture:
            capture.batch(run)
        with _training(model, parameters):
            forward, step = count_step(run)
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError(
            f"{name or type(model).__name__} cannot be surveyed on the meta device, its forward pass needs values or "
            f"an operator that has no meta version ({reason}); survey a variant without it, or measure the real model"
        ) from error
    captured = capture.captured
    weights, moments = _weights(parameters, captured, sketch)
    found = {weight.name for weight in weights} | {seen.bias for seen in captured.values() if seen.bias}
    frozen = tuple(
        Frozen(key, tuple(parameters[key].shape), parameters[key].nbytes, "; ".join(seen.reasons))
        for key, seen in captured.items()
        if seen.met and key not in found
    )
    return Survey(
        model=name or type(model).__name__,
        batch=batch,
        parameters=sum(p.numel() for p in parameters.values()),
        weights=weights,
        moments=moments,
        frozen=frozen,
        free=tuple(key for key, seen in captured.items() if not seen.met),
        buffers=sum(buffers[key].nbytes for key in capture.buffers_read),
        forward_flops=forward,
        step_flops=step,
    )


def count_step(run: Callable[[], Any]) -> tuple[int, int]:
    """Return the FLOPs of `run()` and of it together with the backward pass from the sum of its outputs."""
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:
        outputs = [t for t in pytree.tree_leaves(run()) if isinstance(t, Tensor) and t.requires_grad]
        forward = counter.get_total_flops()
        if outputs:
            torch.stack([output.float().sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    return forward, counter.get_total_flops()


@contextmanager
def _training(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Require gradients of `parameters` only, so that the backward pass is that of their training."""
    ids, flags = {id(p) for p in parameters.values()}, [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in ids)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _weights(
    parameters: Mapping[str, Tensor], captured: Mapping[str, ParameterStatistics], sketch: SketchedCovariance | None
) -> tuple[tuple[Weight, ...], tuple[Moment, ...]]:
    """Return the weights that meet rows and the second moments they share."""
    numbers: dict[int, int] = {}
    moments: list[Moment] = []
    weights: list[Weight] = []
    for name, seen in captured.items():
        if not seen.met or seen.reasons or not (seen.sides or seen.row_index is not None):
            continue
        sides: dict[MatrixSide, int] = {}
        for side, moment in seen.sides.items():
            if id(moment) not in numbers:
                numbers[id(moment)] = len(moments)
                kept = sketch.size if sketch is not None and moment.size > sketch.above else 0
                moments.append(Moment(moment.groups, moment.size, int(moment.rows.sum()), kept))
            sides[side] = numbers[id(moment)]
        layout, parameter = seen.layout or Layout(), parameters[name]
        shape = tuple(parameter.shape)
        groups, outputs, inputs = layout.matrix_shape(shape)
        weights.append(
            Weight(
                name=name,
                shape=shape,
                matrix=(groups, outputs, inputs + (seen.bias is not None)),
                itemsize=parameter.element_size(),
                sides=sides,
                lookup=seen.row_index is not None,
                kind=layout.kind,
                joint=seen.bias is not None,
            )
        )
    return tuple(weights), tuple(moments)
