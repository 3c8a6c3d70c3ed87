"""Layouts other than strided and higher-order operators: captured, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from nullspace_optim import ConsolidationError, Fate, NullSpaceOptimizer, NumericalRank


def _wrapped(model: nn.Module, **options: Any) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, policy=NumericalRank(), **options)


def _train(optimizer: NullSpaceOptimizer, model: nn.Module, steps: int = 10) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@torch.no_grad()
def _output(model: nn.Module, batch: Any) -> Tensor:
    output: Tensor = model(batch)
    return torch.cat(list(output.unbind())) if output.is_nested else output.to_dense().clone()


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(48, 16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class SparseProduct(Bag):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x, self.w)


class SparseSum(Bag):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.addmm(self.b.expand(len(x), -1), x, self.w)


def _few(rows: int = 16) -> Tensor:
    return torch.randn(rows, 48) * (torch.rand(rows, 48) < 0.1)


SPARSE: dict[str, tuple[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    "coo": (Bag, Tensor.to_sparse),
    "csr": (Bag, Tensor.to_sparse_csr),
    "csc": (Bag, Tensor.to_sparse_csc),
    "bsr": (Bag, lambda x: x.to_sparse_bsr((4, 4))),
    "sparse.mm": (SparseProduct, Tensor.to_sparse),
    "sparse.addmm": (SparseSum, Tensor.to_sparse),
    "linear of coo": (lambda: nn.Linear(48, 16), Tensor.to_sparse),  # type: ignore[dict-item]
    "linear of csr": (lambda: nn.Linear(48, 16), Tensor.to_sparse_csr),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("rows", ["relevant", "all"])
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_rows_are_the_dense_rows(kind: str, rows: Any) -> None:
    make, sparse = SPARSE[kind]
    model, x = make(), _few()
    optimizer = _wrapped(model, rows=rows)
    optimizer.consolidate([sparse(x)], progress=False)
    weight = "weight" if kind.startswith("linear") else "w"
    assert optimizer.bases[weight].rank == int(torch.linalg.matrix_rank(x.double()))
    before = _output(model, sparse(x))
    _train(optimizer, model)
    assert float((_output(model, sparse(x)) - before).norm() / before.norm()) < 1e-5
    verified = optimizer.verify([sparse(_few()), sparse(x)])
    assert verified.ok and verified.drift("task 1") < 1e-5
    assert optimizer.verify([sparse(_few())]).missing == ("task 1",)


def test_a_large_sparse_batch_is_remembered_without_its_zeros() -> None:
    class Graph(nn.Module):
        """A million nodes, three of which have features: dense, the adjacency alone would be four terabytes."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 8)

        def forward(self, adjacency: Tensor) -> Tensor:
            return self.layer(torch.sparse.mm(adjacency, torch.ones(1_000_000, 1))[:4].expand(-1, 3))

    place = torch.tensor([[0, 1, 2], [5, 999_999, 7]])
    adjacency = torch.sparse_coo_tensor(place, torch.randn(3), (1_000_000, 1_000_000))
    model = Graph()
    optimizer = _wrapped(model)
    optimizer.consolidate([adjacency], progress=False)
    assert optimizer.verify([adjacency]).drift("task 1") == 0.0
    assert optimizer.bases["layer.weight"].rank == 1


@pytest.mark.parametrize("rows", ["relevant", "all"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_rows_of_nested_tensors_are_those_of_their_parts(layout: torch.layout, rows: Any) -> None:
    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([x[:1], x[1:3]], layout=layout)

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))
    x = torch.randn(3, 8)
    optimizer = _wrapped(model, rows=rows)
    optimizer.consolidate([nested(x)], progress=False)
    assert (optimizer.bases["0.weight"].rank, optimizer.bases["2.weight"].rank) == (3, 3)
    before = _output(model, nested(x))
    _train(optimizer, model)
    assert float((_output(model, nested(x)) - before).norm() / before.norm()) < 1e-5
    assert optimizer.verify([nested(torch.randn(3, 8)), nested(x)]).drift("task 1") < 1e-5


def test_mkldnn_and_quantized_inputs_are_read_or_the_weight_is_frozen() -> None:
    x = torch.randn(4, 48)
    model = nn.Linear(48, 16)
    optimizer = _wrapped(model)
    optimizer.consolidate([x.to_mkldnn()], progress=False)
    assert optimizer.bases["weight"].reason == "read by aten.mkldnn_linear"
    assert optimizer.verify([x.to_mkldnn()]).drift("task 1") == 0.0
    small = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    other = nn.Linear(48, 16)
    optimizer = _wrapped(other)
    optimizer.consolidate([small], forward=lambda batch: other(batch.dequantize()), progress=False)
    assert optimizer.bases["weight"].rank == 4
    assert optimizer.verify([small], forward=lambda batch: other(batch.dequantize())).drift("task 1") == 0.0


def test_a_sparse_buffer_is_left_as_it_was() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)
            self.register_buffer("adjacency", (torch.rand(10, 10) < 0.3).float().to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.sparse.mm(self.adjacency, torch.relu(self.first(x))))

    model, x = Graph(), torch.randn(10, 3) @ torch.randn(3, 6)
    kept = model.adjacency.to_dense()
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    before = _output(model, x)
    _train(optimizer, model)
    assert torch.equal(model.adjacency.to_dense(), kept)
    assert float((_output(model, x) - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_a_sparse_weight_is_refused_by_name(layout: str) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.eye(8)
            self.w = nn.Parameter(weight.to_sparse() if layout == "sparse_coo" else weight.to_sparse_csr())
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.w, self.head(x))

    model = Sparse()
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ConsolidationError, match=rf"'w' is a {layout} tensor.*to_dense\(\).*requires_grad=False"):
        optimizer.consolidate([torch.randn(8, 8)], progress=False)
    model.w.requires_grad_(False)
    optimizer.consolidate([torch.randn(8, 8)], progress=False)


class Two(nn.Module):
    """Layers `a` and `b` and a function of them and `x`."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.bias, self.function = nn.Parameter(torch.randn(2, 8, 8)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _heads(x: Tensor) -> Tensor:
    return x.view(1, 8, 2, 16).transpose(1, 2)


def _step(carry: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    new = torch.tanh(layer(carry))
    return new, new.clone()


def _attention(s: Any, x: Tensor) -> Tensor:
    h = _heads(s.a(x))
    out: Tensor = flex_attention(h, h, h)
    return s.b(out.transpose(1, 2).reshape(8, 32))


def _masked_attention(s: Any, x: Tensor) -> Tensor:
    h = _heads(s.a(x))
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")
    out: Tensor = flex_attention(
        h, h, h, score_mod=lambda score, b, head, q, k: score + s.bias[head, q, k], block_mask=mask
    )
    return s.b(out.transpose(1, 2).reshape(8, 32))


HIGHER: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str]]] = {
    "cond": (lambda s, x: torch.cond(x.sum() > 1e9, lambda t: s.a(t), lambda t: s.b(t), (x,)), {"b"}),
    "while_loop": (
        lambda s, x: while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, torch.tanh(s.a(h))), (torch.tensor(0), x))[1],
        {"a"},
    ),
    "map": (lambda s, x: map_rows(lambda row: torch.tanh(s.a(row)), x), {"a"}),
    "scan": (lambda s, x: scan(lambda c, row: _step(c + s.a(row), s.b), torch.zeros(32), x)[1], {"a", "b"}),
    "associative_scan": (
        lambda s, x: associative_scan(lambda p, q: torch.tanh(s.b(p)) + q, s.a(x), dim=0, combine_mode="generic"),
        {"a", "b"},
    ),
    "checkpoint": (lambda s, x: checkpoint(lambda t: s.b(torch.relu(s.a(t))), x, use_reentrant=False), {"a", "b"}),
    "flex_attention": (_attention, {"a", "b"}),
    "flex_attention with a learnt bias": (_masked_attention, {"a", "b", "bias"}),
}


@pytest.mark.parametrize("rows", ["relevant", "all"])
@pytest.mark.parametrize("name", HIGHER)
def test_bodies_of_higher_order_operators_are_captured(name: str, rows: Any) -> None:
    function, read = HIGHER[name]
    model, x = Two(function), torch.randn(8, 4) @ torch.randn(4, 32)
    optimizer = _wrapped(model, rows=rows)
    optimizer.consolidate([x], progress=False)
    fates = {key: basis.fate for key, basis in optimizer.bases.items()}
    assert {key.split(".")[0] for key, fate in fates.items() if fate is not Fate.FREE} == read
    assert all(fates[f"{layer}.weight"] is Fate.PROTECTED for layer in read - {"bias"})
    before = _output(model, x)
    _train(optimizer, model)
    assert float((_output(model, x) - before).norm() / before.norm()) < 1e-5
    assert optimizer.verify([x]).drift("task 1") < 1e-5


def test_a_higher_order_operator_without_an_eager_body_freezes_what_it_reads() -> None:
    from torch._higher_order_ops.out_dtype import out_dtype

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return out_dtype(torch.ops.aten.mm.default, torch.float64, x, self.w)

    model, x = Wide(), torch.randn(3, 6)
    optimizer = _wrapped(model, rows="all")
    optimizer.consolidate([x], progress=False)
    assert optimizer.bases["w"].reason == "read by the higher-order operator out_dtype"
    optimizer = _wrapped(model)
    report = optimizer.consolidate([x], progress=False)
    assert optimizer.bases["w"].fate is Fate.FROZEN
    assert any("all rows count" in note for note in report.notes)


def test_a_model_that_runs_without_gradients_only_is_captured() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tensor(self.first(x).numpy().clip(0)))

    model, x = Plain(), torch.randn(3, 6)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    assert (optimizer.bases["first.weight"].rank, optimizer.bases["second.weight"].rank) == (3, 3)
