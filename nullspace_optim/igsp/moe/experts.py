"""Low-rank experts: their arithmetic and their storage.

Shapes: an expert is `f(x) = s B act(A x + a) + b` with `down` `A` `[r, d]`, `up` `B^T` `[r, o]`; a LoRA expert has no
activation and no biases, a bottleneck has ReLU and `a` `[r]`, `b` `[o]` (MoE-Adapters4CL). Several experts are a
`Stack`: the same tensors with a leading axis `E`.

The modules here never enter a state dict: the keys of the model that carries them do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConsolidationError
from ...subspace.linalg import append_directions, orthonormalise, polish
from .router import RoutingChoice, tokens_of

Kind = Literal["lora", "bottleneck"]
Stack = dict[str, Tensor]

PARTS = {"lora": ("down", "up"), "bottleneck": ("down", "up", "down_bias", "up_bias")}


class Stateless(nn.Module):
    """Identity module without state dict entries, whose parameters belong to the mode alone.

    `DistributedDataParallel` and `fully_shard` ask every module for its own parameters (``recurse=False``) and would
    hold on to candidates that are pruned later: they find none here. All other ways of listing parameters find them.
    """

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters with those of all children; none with ``recurse=False``."""
        return super().named_parameters(prefix, recurse, remove_duplicate) if recurse else iter(())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return

    def _load_from_state_dict(self, *args: Any) -> None:
        return

    def forward(self, x: Any) -> Any:
        """Return `x`, so that a container may call it between its other children."""
        return x


class Expert(Stateless):
    """One trainable expert; `up` starts at zero, so that a new expert changes nothing."""

    def __init__(self, down: Tensor, out: int, kind: Kind) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(down.new_zeros(len(down), out))
        if kind == "bottleneck":
            self.down_bias = nn.Parameter(down.new_zeros(len(down)))
            self.up_bias = nn.Parameter(down.new_zeros(out))


class TaskRouter(Stateless):
    """Router of one finished task: `weight` `[E, d + 1]`, `experts` `[E]` numbers in the history."""

    weight: Tensor
    experts: Tensor

    def __init__(self, weight: Tensor, experts: Tensor) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("experts", experts)):
            self.register_buffer(name, value.detach().clone())


FLOATS = (
    "keep the model in float32 under torch.autocast or use bfloat16, give AdamW an eps that its dtype can hold (1e-4 "
    "for float16), or lower IGSP(lr=...)"
)


def refuse_not_finite(parameters: Mapping[str, Tensor], where: str) -> None:
    """Refuse experts and routers of the layer `where` that hold NaN or infinity.

    Raises:
        ConsolidationError: names the layer, the parameter and its dtype.
    """
    for name, value in parameters.items():
        if not bool(torch.isfinite(value).all()):
            raise ConsolidationError(
                f"'{where}': {name} ({str(value.dtype).removeprefix('torch.')}) is not finite, so the task cannot be "
                f"finished; go back to an earlier checkpoint and {FLOATS}"
            )


def shapes(kind: Kind, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of one expert."""
    sizes: dict[str, tuple[int, ...]] = {"down": (rank, inputs), "up": (rank, outputs)}
    return sizes if kind == "lora" else {**sizes, "down_bias": (rank,), "up_bias": (outputs,)}


def stack(experts: Any, kind: Kind, history: Stack | None = None) -> Stack:
    """Return the tensors of `history` followed by those of the single `experts`."""
    fresh = list(experts)
    if history is None:
        return {part: torch.stack([getattr(e, part) for e in fresh]) for part in PARTS[kind]}
    return {
        part: torch.cat([history[part], *(getattr(e, part).unsqueeze(0).to(history[part]) for e in fresh)])
        if fresh
        else history[part]
        for part in PARTS[kind]
    }


def mix(x: Tensor, experts: Stack, choice: RoutingChoice, scale: float) -> Tensor:
    """Return `sum_e gate_e f_e(x)` `[n, ..., o]` for the samples `x` `[n, ..., d]`.

    Only the chosen experts are computed, `2 k r (d + o)` operations a token, without a host synchronisation: each
    sample's own stack is gathered. The result depends on the chosen experts alone, bit for bit, not on how many others
    exist. Products run in the dtype of `x` (or of autocast).
    """
    tokens = tokens_of(x)
    chosen = {part: value.to(x.dtype)[choice.experts] for part, value in experts.items()}
    rank = chosen["down"].shape[2]
    hidden = tokens @ chosen["down"].flatten(1, 2).mT
    if "down_bias" in chosen:
        hidden = F.relu(hidden + chosen["down_bias"].flatten(1).unsqueeze(1))
    gates = scale * choice.gates
    hidden = hidden * gates.repeat_interleave(rank, dim=1).unsqueeze(1).to(hidden.dtype)
    mixed = hidden @ chosen["up"].flatten(1, 2)
    if "up_bias" in chosen:
        mixed = mixed + (gates.unsqueeze(-1).to(x.dtype) * chosen["up_bias"]).sum(dim=1, keepdim=True)
    return mixed.reshape(*x.shape[:-1], mixed.shape[-1])


def second_moment(x: Tensor, experts: Stack) -> Tensor:
    """Return `sum h h^T` `[E, r, r]` over the tokens of `x` `[..., d]`, `h = act(A x + a)` of each of the `experts`.

    With biases `h` ends with a 1, `[E, r + 1, r + 1]`: an expert's output is then linear in it (`output_rows`).
    """
    tokens = x.detach().flatten(0, -2).to(experts["down"].dtype)
    with torch.autocast(x.device.type, enabled=False):
        hidden: Tensor = tokens @ experts["down"].mT
        if "down_bias" in experts:
            hidden = F.relu(hidden + experts["down_bias"].unsqueeze(1))
            hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)
        return hidden.mT @ hidden


def output_rows(experts: Stack) -> Tensor:
    """Return the matrices `[E, r, o]` (`[E, r + 1, o]` with biases) with which `h` of `second_moment` is put out."""
    biases = [experts["up_bias"].unsqueeze(1)] if "up_bias" in experts else []
    return torch.cat([experts["up"], *biases], dim=1)


def emitted_rows(moment: Tensor, experts: Stack) -> Tensor:
    """Return rows `[E r, o]` whose second moment is that of all outputs: `R^T R = sum_e B_e (sum h h^T) B_e^T`."""
    values, vectors = torch.linalg.eigh(moment.double())
    factor: Tensor = values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT
    return (factor @ output_rows(experts).double()).flatten(0, 1)


def fresh_directions(basis: Tensor, rank: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `A` of up to `count` new experts `[m, r, d]`: rows orthonormal, orthogonal to `basis` `[d, k]`.

    This is the "basis pre-expansion": only `floor((d - k) / r)` experts fit beside `k` used directions, so fewer than
    `count` (or none) may come back.
    """
    size, used = basis.shape
    number = min(count, (size - used) // rank)
    if number < 1:
        return basis.new_zeros(0, rank, size)
    draw = torch.randn(size, number * rank, generator=generator, dtype=torch.float64)
    stored = basis.cpu().double()
    for _ in range(2):  # the second pass removes what rounding left of the first
        draw = orthonormalise(draw - stored @ (stored.mH @ draw))
    return polish(draw).mT.reshape(number, rank, size).contiguous().to(basis.device)


def extend_basis(basis: Tensor, rows: Tensor) -> Tensor:
    """Return an orthonormal basis `[s, k + j]` of the span of `basis` `[s, k]` and `rows` `[n, s]`.

    Directions of `rows` that the basis holds already (relative size below 1e-5) are not added. The stored columns stay
    bit for bit.
    """
    stored, new = basis.double(), rows.detach().double().mT
    rest = new - stored @ (stored.mH @ new)
    size = float(torch.linalg.matrix_norm(new, ord=2)) if new.numel() else 0.0
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    found = left[:, values > 1e-5 * max(size, 1e-30)][:, : basis.shape[0] - basis.shape[1]]
    return append_directions(basis, found, orthonormal=False)


def span_rows(basis: Tensor, rows: Tensor, energy: float) -> Tensor:
    """Return `basis` `[s, k]` with as few more orthonormal columns as hold the share `energy` of the rows `[n, s]`.

    The residual append of GPM: leading left singular vectors of what lies outside the basis.
    """
    stored, new = basis.double(), rows.detach().double().mT
    left, values, _ = torch.linalg.svd(new - stored @ (stored.mH @ new), full_matrices=False)
    inside = values.square().cumsum(0)
    outside = torch.cat([inside[-1:], inside[-1] - inside])
    limit = max(1 - energy, 1e-12) * new.square().sum()
    count = min(int((outside > limit).sum()), basis.shape[0] - basis.shape[1])
    return append_directions(basis, left[:, :count], orthonormal=False)
