"""Many small weights of one shape, corrected in one product a side; their gradients likewise.

A small correction costs the calls around it, not its arithmetic. Weights of one shape, dtype and device whose ranks
are close are copied into one stack `[n g, m, d]`, corrected together and copied back. Bases and anchors are stacked
once, padded with zero columns, which protect nothing. Large weights gain nothing and stay alone. In a stack the anchor
form is cheap at any rank, so its weights owe nothing. Gradients wait for the end of their backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterable

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.functional import pad

from ..distributed.group import in_group
from ..subspace.basis import Subspace
from ..subspace.layout import MatrixSide
from ..subspace.projection import exact_products, project_gradient_, restore_anchor_
from .guard import Guard, Workspace, gradient_hook, mask_rounding_, rounding_of, size_of

FEWEST = 4  # fewer weights of a shape gain little
LARGEST = 64 * 64  # entries of a weight; above, copies cost more than calls (measured on one core)


class WeightStack:
    """Guards of one kind with their bases and anchors, stacked."""

    def __init__(self, guards: list[Guard], workspace: Workspace) -> None:
        first = guards[0]
        self.guards, self.workspace = guards, workspace
        self.shape = first.basis.layout.matrix_shape(first.parameter.shape)
        sides = [_dense(guard) for guard in guards]
        self.sides = [_stacked([one[number] for one in sides]) for number in range(len(sides[0]))]

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked bases and anchors."""
        return sum(tensor.nbytes for _, *tensors in self.sides for tensor in tensors)

    def correct(self, moved: Collection[int]) -> None:
        """Anchor form on every side of the guards that `moved` (by identity): `W <- W - (W U - A) U^H`; others stay
        bitwise.
        """
        chosen = [guard for guard in self.guards if id(guard) in moved]
        if not chosen:
            return
        _, outputs, inputs = self.shape
        weights = torch.stack([guard.parameter.detach() for guard in self.guards])
        matrix = weights.reshape(-1, outputs, inputs)
        matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        biases = [guard.bias.detach() for guard in self.guards if guard.bias is not None]
        if biases:
            column = torch.stack(biases).to(matrix.dtype).reshape(-1, outputs, 1)
            matrix = torch.cat([matrix, column], dim=2)
        for side, basis, anchor in self.sides:
            restore_anchor_(matrix, basis, anchor, side, self.workspace.take(anchor.shape, matrix))
        new = matrix[:, :, :inputs].reshape(weights.shape).unbind()
        pairs = [(guard.parameter.detach(), one) for guard, one in zip(self.guards, new) if id(guard) in moved]
        if biases:
            new = matrix[:, :, -1].reshape(len(biases), *biases[0].shape).unbind()
            pairs += [(old, one) for guard, old, one in zip(self.guards, biases, new) if id(guard) in moved]
        torch._foreach_copy_([old for old, _ in pairs], [one for _, one in pairs])
        for guard in chosen:
            guard.pending = False

    def project(self, waiting: Collection[int]) -> None:
        """Remove the kept directions from the gradients of the guards that are `waiting` (by identity); zeros stand in
        the place of rounding, and norms are noted, as by the hook of a guard alone.
        """
        fitting = {id(guard): _gradient(guard) for guard in self.guards if id(guard) in waiting}
        found = {key: gradient for key, gradient in fitting.items() if gradient is not None}
        if not found:
            return
        new = [(guard, found[id(guard)]) for guard in self.guards if id(guard) in found and not guard.measured]
        sizes = [size_of(gradient) for _, gradient in new]
        spare = next(iter(found.values()))  # in the place of those that are absent
        gradients = [found.get(id(guard), spare) for guard in self.guards]
        matrix = torch.stack(gradients).reshape(-1, *self.shape[1:])
        matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        limit = rounding_of(matrix, {side for side, *_ in self.sides})
        for side, basis, _ in self.sides:
            project_gradient_(matrix, basis, side)
        mask_rounding_(matrix, limit)
        free = matrix.reshape(len(gradients), *gradients[0].shape).unbind()
        pairs = [(old, one) for guard, old, one in zip(self.guards, gradients, free) if id(guard) in found]
        torch._foreach_copy_([old for old, _ in pairs], [one for _, one in pairs])
        for (guard, gradient), whole in zip(new, sizes):
            guard.norms = whole, size_of(gradient)


class GradientQueue:
    """Gradients of stacked weights that a backward pass has accumulated and nothing has projected yet.

    Autograd calls `project` at the end of the pass. Steps, and whatever changes the bases, call `flush`: after a pass
    that failed, and inside of one. Nothing waits where somebody else takes the gradient within the pass: a hook of the
    same parameter, a process group (DDP copies gradients to and from its buckets, also in one process).
    """

    def __init__(self, stacks: list[WeightStack]) -> None:
        self.stacks = stacks
        self.stacked = {id(guard) for stack in stacks for guard in stack.guards}
        self.waiting: dict[int, Guard] = {}
        self._pass = -1

    def add(self, guard: Guard) -> bool:
        """Let the gradient of `guard` wait for the end of the pass; False outside of one, or if it fits no stack."""
        if torch.compiler.is_compiling() or in_group() or _gradient(guard) is None:
            return False
        current = torch._C._current_graph_task_id()
        if current < 0:
            return False
        if len(guard.parameter._post_accumulate_grad_hooks) > 1:  # type: ignore[attr-defined]
            self.flush()  # those may read other gradients as well
            return False
        if current != self._pass:
            self._pass = current
            Variable._execution_engine.queue_callback(self.project)  # type: ignore[attr-defined]
        self.waiting[id(guard)] = guard
        return True

    def flush(self) -> None:
        """Project what still waits, if anything does."""
        if self.waiting:
            self.project()

    @torch.inference_mode(False)
    @torch.no_grad()
    def project(self) -> None:
        """Project what waits."""
        waiting, self.waiting = self.waiting, {}
        if waiting:
            with exact_products(next(iter(waiting.values())).parameter.device):
                for stack in self.stacks:
                    stack.project(waiting)


def accumulation_hook(guard: Guard, queue: GradientQueue) -> Callable[[Tensor], None]:
    """Return the hook for gradients that accumulate in the parameter of `guard`: they wait in `queue`, or are projected
    at once. The hook keeps neither alive.
    """
    project, into = gradient_hook(guard), weakref.ref(queue)
    if id(guard) not in queue.stacked:
        return project
    reference = weakref.ref(guard)

    def wait(parameter: Tensor) -> None:
        found, waiting = reference(), into()
        if found is None or waiting is None or not waiting.add(found):
            project(parameter)

    return wait


def stack_alike(guards: Iterable[Guard], workspace: Workspace) -> list[WeightStack]:
    """Return stacks of the guards that can be corrected together, `FEWEST` or more at a time."""
    kinds: dict[Hashable, list[Guard]] = {}
    for guard in guards:
        if _can_be_stacked(guard):
            kinds.setdefault(_kind(guard), []).append(guard)
    return [WeightStack(members, workspace) for members in kinds.values() if len(members) >= FEWEST]


def _gradient(guard: Guard) -> Tensor | None:
    """Return the gradient of a guard in a stack; `None` where there is none, or none that can be projected with it."""
    gradient, parameter = guard.parameter.grad, guard.parameter
    if gradient is None or guard.grown or gradient.layout != torch.strided:
        return None
    return gradient.detach() if (gradient.dtype, gradient.device) == (parameter.dtype, parameter.device) else None


def _dense(guard: Guard) -> list[Subspace]:
    return [subspace for subspace in guard.basis.subspaces.values() if subspace.rank]


def _can_be_stacked(guard: Guard) -> bool:
    """Return True for a small whole weight with strict sides."""
    if guard.frozen or guard.grown or guard.sharded or guard.basis.layout.kind == "transposed":
        return False
    sides = _dense(guard)
    strict = bool(sides) and all(side.side != "rows" and side.scale is None for side in sides)
    return strict and guard.parameter.numel() <= LARGEST


def _kind(guard: Guard) -> Hashable:
    """Return what weights of one stack have in common; ranks up to the same power of two."""
    weight = guard.parameter
    sides = tuple((side.side, _bucket(side.basis.shape[-1])) for side in _dense(guard))
    bias = None if guard.bias is None else (guard.bias.dtype, guard.bias.shape)
    return weight.shape, guard.basis.layout, weight.dtype, weight.device, bias, sides


def _bucket(rank: int) -> int:
    """Return the power of two, 8 or more, up to which ranks share a stack."""
    return max(8, 1 << (rank - 1).bit_length())


def _stacked(sides: list[Subspace]) -> tuple[MatrixSide, Tensor, Tensor]:
    """Return the side, the bases `[n g, s, k]` and the anchors of several weights, padded to the largest rank."""
    side, dtype = sides[0].side, sides[0].anchor.dtype
    assert side != "rows"
    widest = max(s.basis.shape[-1] for s in sides)
    with torch.inference_mode(False), torch.no_grad():
        missing = [widest - s.basis.shape[-1] for s in sides]
        bases = [pad(s.basis.to(dtype), (0, n)) for s, n in zip(sides, missing)]
        edges = [(0, n) if side == "right" else (0, 0, 0, n) for n in missing]
        return side, torch.cat(bases), torch.cat([pad(s.anchor, edge) for s, edge in zip(sides, edges)])
