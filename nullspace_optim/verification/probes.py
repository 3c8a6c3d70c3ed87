"""Remember what a model did on a few samples without keeping the samples.

A probe holds a digest of each sample and, for every product with a protected weight and for the final output, a
random-sign sketch `[64]` and a norm. The same samples met again tell by how much each layer's output moved: for signs
`s`, `E (s . e)^2 = ||e||^2` (Johnson-Lindenstrauss), so `||sketch' - sketch|| / norm` estimates the relative drift.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..capture.capture import Capture
from ..distributed import failures
from ..model.batches import PLAIN, samples_in, tensors_of
from ..model.loader import LoaderPass, current_parameters, make_runner, refuse_single_batch
from ..model.storage import is_plain, plain_parts
from ..subspace.projection import exact_products

WIDTH = 64
OUTPUT = "(output)"


@dataclass(frozen=True)
class Probe:
    """Digests `[n, 16]` (uint8) of the samples, then per layer a sketch `[layers, 64]` and a norm `[layers]`."""

    digests: Tensor
    layers: tuple[str, ...]
    sketches: Tensor
    norms: Tensor


class Recorder:
    """Collects sketches of layer outputs in execution order; pass `observe` to the capture."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.sketches: list[Tensor] = []
        self.norms: list[Tensor] = []

    def observe(self, name: str, output: Tensor) -> None:
        """Record the output of one product with the weight `name`."""
        uses = sum(layer.split("#")[0] == name for layer in self.layers)
        self.layers.append(name if not uses else f"{name}#{uses + 1}")
        values, norm = sketch(output)
        self.sketches.append(values)
        self.norms.append(norm)

    def finish(self, outputs: Any, digests: Tensor) -> Probe:
        """Record the model's final `outputs` and return the probe."""
        self.observe(OUTPUT, flat_outputs(outputs))
        return Probe(digests, tuple(self.layers), torch.stack(self.sketches).cpu(), torch.stack(self.norms).cpu())


def sketch(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sketch `[64]` and the norm `[]` of a tensor of any shape."""
    flat = _reals(output) if is_plain(output) else flat_outputs(output)
    flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
    columns = -(-flat.numel() // WIDTH)
    flat = torch.nn.functional.pad(flat, (0, columns * WIDTH - flat.numel()))
    generator = torch.Generator().manual_seed(columns)
    signs = torch.randint(0, 2, (columns,), generator=generator).to(device=flat.device, dtype=flat.dtype) * 2 - 1
    with exact_products(flat.device):
        return (flat.reshape(WIDTH, columns) @ signs).float(), flat.double().norm().float()


def flat_outputs(outputs: Any) -> Tensor:
    """Return all floating tensors of an output tree as one vector."""
    parts = [part for tensor in tensors_of(outputs) for part in plain_parts(tensor)]
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
        parts = [part for tensor in tensors_of(batch) for part in plain_parts(tensor)]
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


Run = Callable[[Any], Any]


def record_probe(work: LoaderPass, samples: Any) -> Probe:
    """Run the model on `samples` and return the probe of its layers and outputs."""
    recorder = Recorder()
    capture = Capture(work.parameters, rows="all", statistics=False, present=current_parameters(work.model))
    capture.observe = recorder.observe
    run = make_runner(work)
    with failures.raise_on_all_ranks(communicating=True), capture:
        outputs = capture.batch(lambda: run(samples))
    return recorder.finish(outputs, digests_of(samples))
