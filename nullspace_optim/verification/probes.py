"""Probes of a model on a few samples, without keeping the samples.

A probe holds a digest of each sample and, for every product with a protected weight and for the final output, a
random-sign sketch `[64]` and a norm. The same samples met again give the movement of each layer's output: for
signs `s`, `E (s . e)^2 = ||e||^2` (Johnson-Lindenstrauss), so `||sketch' - sketch|| / norm` estimates the relative
drift.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..capture.capture import Capture
from ..distributed import failures
from ..model.batches import PLAIN, samples_in, tensors_in
from ..model.loader import LoaderPass, current_parameters, make_runner, refuse_single_batch
from ..model.restore import fixed_seed
from ..model.storage import is_plain, plain_parts
from ..settings import Settings
from ..subspace.linalg import random_signs
from ..subspace.projection import exact_products

WIDTH = 64
OUTPUT = "(output)"


Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Probe:
    """Digests `[n, 16]` (uint8) of the samples, then per layer a sketch `[layers, 64]` and a norm `[layers]`.

    `shapes` holds, per layer, those of the tensors that were sketched (of the output there may be several).
    """

    digests: Tensor
    layers: tuple[str, ...]
    sketches: Tensor
    norms: Tensor
    shapes: tuple[Shapes, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The part that is stored as tensors."""
        return {"digests": self.digests, "sketches": self.sketches, "norms": self.norms}

    @property
    def record(self) -> dict[str, object]:
        """The part that is stored as plain values."""
        return {"layers": list(self.layers), "shapes": [[list(s) for s in shapes] for shapes in self.shapes]}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Probe:
        """Return the probe that was stored as `tensors` and `record`."""
        shapes = tuple(tuple(tuple(s) for s in shapes) for shapes in record.get("shapes", ()))
        return cls(tensors["digests"], tuple(record["layers"]), tensors["sketches"], tensors["norms"], shapes)


class Recorder:
    """Collects sketches of layer outputs in execution order; pass `observe` to the capture.

    Of an output that has grown since the probe `like` (a head with more classes) only the old part is sketched.
    """

    def __init__(self, like: Probe | None = None) -> None:
        self._like = dict(zip(like.layers, like.shapes)) if like is not None else {}
        self.layers: list[str] = []
        self.shapes: list[Shapes] = []
        self.sketches: list[Tensor] = []
        self.norms: list[Tensor] = []

    def observe(self, name: str, output: Tensor) -> None:
        """Record the output of one product with the weight `name`."""
        uses = sum(layer.split("#")[0] == name for layer in self.layers)
        self._record(name if not uses else f"{name}#{uses + 1}", [output])

    def _record(self, layer: str, outputs: Sequence[Tensor]) -> None:
        outputs = narrow_outputs(outputs, self._like.get(layer, ()))
        self.layers.append(layer)
        self.shapes.append(tuple(tuple(output.shape) if is_plain(output) else () for output in outputs))
        values, norm = sketch(outputs[0] if len(outputs) == 1 and layer != OUTPUT else flat_outputs(outputs))
        self.sketches.append(values)
        self.norms.append(norm)

    def finish(self, outputs: Any, digests: Tensor) -> Probe:
        """Record the model's final `outputs` and return the probe."""
        self._record(OUTPUT, [t for t in tensors_in(outputs) if t.is_floating_point() or t.is_complex()])
        sketches, norms = torch.stack(self.sketches).cpu(), torch.stack(self.norms).cpu()
        return Probe(digests, tuple(self.layers), sketches, norms, tuple(self.shapes))


def sketch(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sketch `[64]` and the norm `[]` of a tensor of any shape."""
    flat = _reals(output) if is_plain(output) else flat_outputs(output)
    flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
    columns = -(-flat.numel() // WIDTH)
    flat = torch.nn.functional.pad(flat, (0, columns * WIDTH - flat.numel()))
    signs = random_signs(columns).to(device=flat.device, dtype=flat.dtype)
    with exact_products(flat.device):
        return (flat.reshape(WIDTH, columns) @ signs).float(), flat.double().norm().float()


def narrow_outputs(outputs: Sequence[Tensor], shapes: Shapes) -> list[Tensor]:
    """Return the leading part of each output that has grown along an axis since it had one of `shapes`."""
    if len(outputs) != len(shapes):
        return list(outputs)
    parts = []
    for output, shape in zip(outputs, shapes):
        if is_plain(output) and output.ndim == len(shape) and all(n >= old for n, old in zip(output.shape, shape)):
            output = output[tuple(slice(old) for old in shape)]
        parts.append(output)
    return parts


def flat_outputs(outputs: Any) -> Tensor:
    """Return all floating tensors of an output tree as one vector."""
    parts = [part for tensor in tensors_in(outputs) for part in plain_parts(tensor)]
    leaves = [_reals(part).float() for part in parts if part.is_floating_point() or part.is_complex()]
    return torch.cat(leaves) if leaves else torch.zeros(0)


def _reals(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor in one row; a complex one counts as two."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def digests_of(batch: Any) -> Tensor:
    """Return a digest `[n, 16]` of every sample of `batch`, or `[1, 16]` of the whole batch if it has no common first
    axis.
    """
    count = samples_in(batch)
    if count is None:
        parts = [part for tensor in tensors_in(batch) for part in plain_parts(tensor)]
        return torch.stack([_digest(parts, pytree.tree_leaves(batch))])
    if count == 0:
        return torch.zeros(0, 16, dtype=torch.uint8)
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return torch.stack([_digest(leaf[index] for leaf in leaves) for index in range(count)])


def _digest(tensors: Iterable[Tensor], others: Iterable[Any] = ()) -> Tensor:
    """Return the digest `[16]` of tensors, and of the arrays and plain values among `others`."""
    state = hashlib.blake2b(digest_size=16)
    for value in others:
        if isinstance(value, np.ndarray):
            state.update(value.tobytes() if value.dtype.kind != "O" else repr(value.tolist()).encode())
        elif isinstance(value, PLAIN):
            state.update(repr(value).encode())
    for tensor in tensors:
        state.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)


def find_samples(loader: Iterable[Any], digests: Tensor, limit: int | None) -> dict[bytes, Any]:
    """Return the samples in `loader`, in any order, that have one of the `digests`, by digest."""
    refuse_single_batch(loader)
    wanted = {bytes(row.tolist()) for row in digests}
    found: dict[bytes, Any] = {}
    for number, batch in enumerate(loader):
        if limit is not None and number >= limit:
            break
        for index, row in enumerate(digests_of(batch)):
            key = bytes(row.tolist())
            if key in wanted and key not in found:
                found[key] = batch if samples_in(batch) is None else _sample(batch, index)
        if len(found) == len(wanted):
            break
    return found


def assemble(found: Mapping[bytes, Any], digests: Tensor) -> Any | None:
    """Return the batch whose samples have `digests`, in their order; `None` if one is missing."""
    wanted = [bytes(row.tolist()) for row in digests]
    return _join([found[key] for key in wanted]) if set(wanted) <= set(found) else None


def _sample(batch: Any, index: int) -> Any:
    def one(tensor: Tensor) -> Tensor:
        return tensor[index : index + 1]

    return pytree.tree_map_only(Tensor, one, batch)


def _join(samples: list[Any]) -> Any:
    if len(samples) == 1:
        return samples[0]
    leaves, spec = zip(*(pytree.tree_flatten(sample) for sample in samples))
    joined = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*leaves)]
    return pytree.tree_unflatten(joined, spec[0])


def compare(before: Probe, after: Probe) -> dict[str, float]:
    """Return the estimated relative drift per layer, in execution order."""
    position = {name: index for index, name in enumerate(after.layers)}
    drift: dict[str, float] = {}
    for index, name in enumerate(before.layers):
        if name in position:
            moved = (after.sketches[position[name]] - before.sketches[index]).double().norm()
            drift[name] = float(moved / before.norms[index].double().clamp_min(torch.finfo(torch.float32).tiny))
    return drift


def record_probe(work: LoaderPass, samples: Any, like: Probe | None = None) -> Probe:
    """Run the model on `samples` and return the probe of its layers and outputs, comparable with the probe `like`.

    A model that draws random numbers draws the same ones every time.
    """
    recorder = Recorder(like)
    present = current_parameters(work.model)
    capture = Capture(work.parameters, Settings(rows="all"), present=present, observe=recorder.observe)
    run = make_runner(work)
    with fixed_seed(), failures.raise_on_all_ranks(communicating=True), capture:
        outputs = capture.batch(lambda: run(samples))
    return recorder.finish(outputs, digests_of(samples))
