"""Which rows can reach the model's output: one backward pass of a random probe.

A row is irrelevant if the gradient of its output row is exactly zero *because nothing reads it* (tokens after
EOT, every token but the pooled one in the last block). A unit that is merely switched off reads its row all the
same, so during the probe the derivatives of activation functions and pools are replaced by ones that pass every
gradient on. Where a forward pass chooses by value in a way that this cannot mend (sorting, clamping, comparing
activations), `Relevance.note` names the operator and all rows of the capture count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..model.batches import tensors_in
from ..model.storage import Key, storage_pointer, tensor_key

aten = torch.ops.aten

# Backward operators whose first argument is the gradient of an elementwise activation's output.
_ACTIVATIONS = frozenset(
    f"{name}_backward"
    for name in (
        "threshold hardtanh hardswish hardsigmoid leaky_relu elu gelu silu mish softplus hardshrink softshrink sigmoid "
        "tanh log_sigmoid rrelu_with_noise"
    ).split()
)
# Operators that choose by value: their gradient does not tell what they have read.
_CHOOSING = frozenset(
    (
        "max min amax amin aminmax topk sort argmax argmin argsort kthvalue median nanmedian mode cummax cummin "
        "maximum minimum fmax fmin adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d "
        "fractional_max_pool3d max_pool3d_with_indices gt ge lt le eq ne sign sgn round floor ceil trunc frac "
        "heaviside bucketize searchsorted multinomial _local_scalar_dense nonzero nan_to_num isnan logical_and "
        "logical_or logical_not _unique2 histc"
    ).split()
)
_RANDOM = frozenset(("bernoulli", "bernoulli_", "native_dropout", "_fused_dropout"))
_VIEWS = frozenset(("view", "alias", "detach"))
_CLAMPS = frozenset(("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"))


class Relevance:
    """Watches a forward pass for what a probe cannot see through, then runs the probe."""

    def __init__(self, seed: int = 0) -> None:
        """Prepare probes drawn from a private generator seeded with `seed`."""
        self.note: str | None = None
        self._seed = seed
        self._gates: dict[Key, Tensor] = {}
        self._cut: dict[int, Tensor] = {}
        self._recomputed = False

    def forget(self) -> None:
        """End the batch."""
        self._gates.clear()
        self._cut.clear()
        self._recomputed = False

    def refuse(self, reason: str) -> None:
        """Give up on relevance for the rest of the capture."""
        self.note = self.note or f"all rows count: {reason}"

    def watch(self, name: str, arguments: Sequence[Any], operands: Sequence[Tensor], output: Any) -> None:
        """Look at one forward operator that reads activations; `operands` are its tensors that are not parameters."""
        if name in _RANDOM:
            self.refuse(f"aten.{name} drops activations at random; call eval() first")
        floats = [t for t in operands if t.is_floating_point() or t.is_complex()]
        if not torch.is_grad_enabled():
            self._watch_outside(name, [t for t in floats if t.requires_grad or storage_pointer(t) in self._cut])
            return
        if self._cut and any(not t.requires_grad and storage_pointer(t) in self._cut for t in floats):
            if name != "detach":
                self.refuse(f"aten.{name} reads detached activations")
            return
        alive = [t for t in floats if t.requires_grad]
        if alive:
            self._watch_alive(name, arguments, alive, output)

    def _watch_outside(self, name: str, alive: list[Tensor]) -> None:
        """The same outside autograd. A view changes nothing (FSDP2 passes every input through a Function that returns
        it); who reads that view without a gradient reads detached activations.
        """
        if alive and name in _VIEWS:
            self._cut[storage_pointer(alive[0])] = alive[0]
        elif alive:
            self.refuse(f"aten.{name} reads activations outside autograd (torch.no_grad or a custom Function)")

    def _watch_alive(self, name: str, arguments: Sequence[Any], alive: list[Tensor], output: Any) -> None:
        """The same for operands that carry gradients."""
        if name in _CHOOSING:
            self.refuse(f"aten.{name} chooses activations by value")
        elif name in _CLAMPS:
            if name.endswith("_") or not torch.equal(output, alive[0]):
                self.refuse(f"aten.{name} cuts activations off")
        elif name == "detach":
            self._cut[storage_pointer(alive[0])] = alive[0]
        elif name in ("mul", "mul_") and len(alive) == 2:
            self._gates.update((tensor_key(t), t) for t in alive)
        elif name == "pow" and not bool(alive[0].all()):
            self.refuse("aten.pow of an activation that is exactly zero")
        elif name == "max_pool2d_with_indices" and len(arguments) > 4 and set(arguments[4]) != {1}:
            self.refuse("aten.max_pool2d with dilation chooses activations by value")

    def backward(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one operator of the probe's backward pass, with derivatives of switched-off units replaced."""
        if torch.is_grad_enabled():  # a checkpointed part of the forward pass is run again
            if not self._recomputed and any(not bool(gate.all()) for gate in self._gates.values()):
                self.refuse("an activation that is exactly zero multiplies another in a checkpointed model")
            self._recomputed = True
            return func(*args, **kwargs)
        if name in _ACTIVATIONS:
            return args[0].clone()
        if name == "glu_backward":
            return torch.cat([args[0], args[0]], dim=args[2])
        if name == "_prelu_kernel_backward":
            return args[0].clone(), func(*args, **kwargs)[1]
        if name == "_softmax_backward_data":
            return args[0] * args[1].ne(0)
        if name == "max_pool2d_with_indices_backward":
            gradient, source, kernel, stride, padding, _, ceil_mode = args[:7]
            return aten.avg_pool2d_backward(gradient, source, kernel, stride, padding, ceil_mode, True, 1)
        if name == "mul" and self._gates:
            args = [self._opened(a) if isinstance(a, Tensor) else a for a in args]
        return func(*args, **kwargs)

    def _opened(self, gate: Tensor) -> Tensor:
        """Return a gate (an activation that multiplied another) with ones where it was closed."""
        return torch.where(gate == 0, 1, gate) if tensor_key(gate) in self._gates else gate

    def probe(self, outputs: Any, wanted: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Return the gradient of a random probe of all floating `outputs` with respect to each of `wanted`.

        `None` as a whole means that relevance cannot be used (see `note`); an entry is `None` where nothing
        reads that tensor.
        """
        floats = [t for t in tensors_in(outputs) if t.is_floating_point() or t.is_complex()]
        if not floats:
            self.refuse("the model returned no floating-point tensor")
        elif any(t.grad_fn is None and storage_pointer(t) in self._cut for t in floats):
            self.refuse("the model returned a detached tensor")
        elif not any(t.requires_grad for t in floats):
            self.refuse("no output of the model carries a gradient")
        if self.note is not None:
            return None
        live = [t for t in floats if t.grad_fn is not None]
        with ExitStack() as stack:
            for device_type in {t.device.type for t in live} | {"cpu"}:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            try:
                gradients = torch.autograd.grad(live, list(wanted), self._directions(live), allow_unused=True)
            except (RuntimeError, NotImplementedError) as error:
                self.refuse(f"the probe's backward pass failed ({str(error).splitlines()[0]})")
                return None
        return None if self.note else list(gradients)

    @torch.no_grad()
    def _directions(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Draw a random direction for every output; no generator of the user is touched."""
        directions = []
        for i, output in enumerate(outputs):
            generator = torch.Generator(output.device).manual_seed(self._seed + i)
            directions.append(torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device))
        return directions
