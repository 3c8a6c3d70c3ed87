"""Capture sees every row that meets a weight, on the side the operator says, and explains what it cannot protect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nullspace_optim.capture.aliases import CONSTANT, AliasTracker
from nullspace_optim.capture.capture import Capture
from nullspace_optim.covariance.accumulator import ParameterStatistics
from nullspace_optim.covariance.rows import Patches
from nullspace_optim.errors import CaptureError, OptionError

Kind = dict[str, Any]


def capture(module: nn.Module, *batches: Any, run: Callable[[Any], Any] | None = None, **options: Any) -> Capture:
    """Run `module` on every batch under a capture with all rows, unless told otherwise."""
    observer = Capture(
        dict(module.named_parameters()), buffers=dict(module.named_buffers()), **{"rows": "all", **options}
    )
    with observer:
        for batch in batches:
            observer.batch(lambda batch=batch: (run or module)(batch))
    return observer


def gram(rows: Tensor) -> Tensor:
    """`[..., s]` -> `[s, s]` in float64."""
    rows = rows.detach().reshape(-1, rows.shape[-1]).double()
    return rows.mH.conj() @ rows.conj() if rows.is_complex() else rows.T @ rows


def close(moment: Tensor, expected: Tensor) -> bool:
    return float((moment.double() - expected).norm()) <= 1e-5 * float(expected.norm())


def hook_inputs(module: nn.Module, x: Any) -> dict[str, Tensor]:
    """The inputs of every leaf module by forward pre-hooks: the slow oracle, for modules used once."""
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, a, name=name: seen.__setitem__(name, a[0].detach().clone()))
        for name, m in module.named_modules()
        if not list(m.children())
    ]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return seen


class Holds(nn.Module):
    """Parameters by name and a function of them and `x`."""

    def __init__(self, forward: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: Any) -> Any:
        return self.function(x, **dict(self.named_parameters()))


W = torch.randn
RIGHT: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "functional linear": (lambda x, w: functional.linear(x, w), (5, 4)),
    "by keyword": (lambda x, w: functional.linear(input=x, weight=w), (5, 4)),
    "matmul of a transpose": (lambda x, w: x @ w.T, (5, 4)),
    "matmul of mT": (lambda x, w: torch.matmul(x, w.mT), (5, 4)),
    "weight on the left": (lambda x, w: (w @ x.reshape(-1, 4).T).T, (5, 4)),
    "einsum": (lambda x, w: torch.einsum("bni,oi->bno", x, w), (5, 4)),
    "bmm with an expanded weight": (lambda x, w: torch.bmm(x, w.T.expand(x.shape[0], -1, -1)), (5, 4)),
    "bmm, weight on the left": (lambda x, w: torch.bmm(w.expand(x.shape[0], -1, -1), x.mT), (5, 4)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(5), x.reshape(-1, 4), w.t()), (5, 4)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(1), x, w.t().expand(x.shape[0], -1, -1)), (5, 4)),
    "vectors": (lambda x, w: torch.stack([w.mv(row) for row in x.reshape(-1, 4)]), (5, 4)),
    "chunks of rows": (lambda x, w: torch.cat([functional.linear(x, c) for c in w.chunk(3)], -1), (6, 4)),
    "heads": (lambda x, w: torch.einsum("bni,hoi->bnho", x, w.view(2, 3, 4)), (6, 4)),
    "a clone": (lambda x, w: functional.linear(x, w.clone()), (5, 4)),
    "a contiguous transpose": (lambda x, w: x @ w.t().contiguous(), (5, 4)),
    "a cast": (lambda x, w: functional.linear(x.double(), w.double()), (5, 4)),
    "a cast, expanded": (lambda x, w: x.double().bmm(w.double().t().expand(x.shape[0], -1, -1)), (5, 4)),
    "detached": (lambda x, w: functional.linear(x, w.detach()), (5, 4)),
    "data": (lambda x, w: functional.linear(x, w.data), (5, 4)),
    "1x1 convolution": (lambda x, w: functional.conv1d(x.mT, w[..., None]).mT, (5, 4)),
    "a four-dimensional weight": (lambda x, w: functional.linear(x, w.flatten(1)), (5, 2, 2, 1)),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("rows", ["all", "relevant"])
def test_weight_contracted_over_its_input_side_is_right(name: str, rows: str) -> None:
    function, shape = RIGHT[name]
    x = W(3, 7, 4)
    seen = capture(Holds(lambda x, w: function(x, w), w=W(*shape)), x, rows=rows).captured["w"]
    assert seen.reasons == ()
    assert list(seen.sides) == ["right"]
    assert close(seen.sides["right"].matrix[0], gram(x))
    assert seen.sides["right"].rows.tolist() == [21]


LEFT: dict[str, Callable[..., Tensor]] = {
    "matmul": lambda x, p: x @ p,
    "mm": lambda x, p: x.reshape(-1, 4).mm(p),
    "einsum": lambda x, p: torch.einsum("bni,io->bno", x, p),
    "linear of a transpose": lambda x, p: functional.linear(x, p.T),
    "weight on the left": lambda x, p: p.T @ x.mT,
    "columns": lambda x, p: torch.cat([x @ p[:, :2], x @ p[:, 2:]], -1),
    "column heads": lambda x, p: torch.einsum("bni,iho->bnho", x, p.view(4, 3, 2)),
    "Conv1D of GPT-2": lambda x, p: torch.addmm(torch.zeros(6), x.view(-1, 4), p),
}


@pytest.mark.parametrize("name", LEFT)
def test_weight_contracted_over_its_first_side_is_left(name: str) -> None:
    x = W(3, 7, 4)
    seen = capture(Holds(lambda x, p: LEFT[name](x, p), p=W(4, 6)), x).captured["p"]
    assert seen.reasons == ()
    assert list(seen.sides) == ["left"]
    assert close(seen.sides["left"].matrix[0], gram(x))


def test_columns_of_a_weight_embed_their_rows() -> None:
    x = W(9, 2)
    seen = capture(Holds(lambda x, w: functional.linear(x, w[:, 1:3]), w=W(5, 4)), x).captured["w"]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[1:3, 1:3] = gram(x)
    assert close(seen.sides["right"].matrix[0], expected)


def test_a_stack_of_matrices_is_batched() -> None:
    x = W(3, 7, 4)
    seen = capture(Holds(lambda x, w: torch.bmm(x, w), w=W(3, 4, 5)), x).captured["w"]
    assert seen.layout is not None and seen.layout.kind == "batched"
    assert all(close(seen.sides["left"].matrix[g], gram(x[g])) for g in range(3))
    seen = capture(Holds(lambda x, w: torch.bmm(x, w.mT), w=W(3, 5, 4)), x).captured["w"]
    assert all(close(seen.sides["right"].matrix[g], gram(x[g])) for g in range(3))


def test_experts_picked_one_by_one_are_batched() -> None:
    x = W(3, 7, 4)
    model = Holds(lambda x, w: torch.stack([functional.linear(x[e], w[e]) for e in (2, 0)]), w=W(3, 5, 4))
    seen = capture(model, x).captured["w"]
    assert seen.sides["right"].rows.tolist() == [7, 0, 7]
    assert close(seen.sides["right"].matrix[2], gram(x[2]))


def test_a_vector_parameter_contracted_with_rows_is_left() -> None:
    x = W(9, 4)
    seen = capture(Holds(lambda x, v: x @ v, v=W(4)), x).captured["v"]
    assert close(seen.sides["left"].matrix[0], gram(x))


@pytest.mark.fault(13)
def test_complex_weights_use_the_adjoint() -> None:
    x = W(9, 4, dtype=torch.complex64)
    right = capture(Holds(lambda x, w: x @ w.T, w=W(5, 4, dtype=torch.complex64)), x).captured["w"].sides["right"]
    left = capture(Holds(lambda x, p: x @ p, p=W(4, 5, dtype=torch.complex64)), x).captured["p"].sides["left"]
    assert torch.allclose(right.matrix[0], x.T @ x.conj(), atol=1e-4)
    assert torch.allclose(left.matrix[0], x.mH @ x, atol=1e-4)


CONVOLUTIONS: dict[str, tuple[type[nn.Module], Kind, tuple[int, ...]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}, (6, 6, 7)),
    "strided, padded": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}, (6, 7, 8)),
    "same padding": (nn.Conv2d, {"kernel_size": 4, "padding": "same"}, (6, 7, 8)),
    "reflecting": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (6, 7, 8)),
    "dilated": (nn.Conv2d, {"kernel_size": (3, 2), "dilation": (2, 3), "padding": (1, 2)}, (6, 8, 9)),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2}, (6, 6, 7)),
    "depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 6, "padding": 1}, (6, 6, 7)),
    "one dimension": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "dilation": 2}, (6, 12)),
    "three dimensions": (nn.Conv3d, {"kernel_size": 2, "groups": 3}, (6, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 3}, (6, 4, 5)),
    "transposed, strided": (
        nn.ConvTranspose2d,
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "output_padding": 1, "dilation": (1, 2)},
        (6, 4, 5),
    ),
    "transposed, grouped": (nn.ConvTranspose2d, {"kernel_size": 3, "groups": 3, "stride": 2, "padding": 2}, (6, 5, 5)),
    "transposed, one dimension": (nn.ConvTranspose1d, {"kernel_size": 4, "stride": 3}, (6, 7)),
}


def dense_convolution(convolution: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The convolution as a matrix `[outputs, inputs]` of one sample, from unit vectors."""
    size = torch.Size(shape).numel()
    with torch.no_grad():
        columns = convolution(torch.eye(size).reshape(size, *shape)) - convolution(torch.zeros(1, *shape))
    return columns.reshape(size, -1).T


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.fault(18)
def test_rule_g_rows_times_the_matrix_are_the_convolution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, arguments, shape = CONVOLUTIONS[name]
    convolution = kind(6, 12, bias=False, **arguments)
    x = W(3, *shape)
    pushed: list[Tensor] = []
    original = Patches.blocks

    def recording(self: Patches, mask: Tensor | None, dtype: torch.dtype) -> Any:
        for block, count in original(self, mask, dtype):
            pushed.append(block)
            yield block, count

    monkeypatch.setattr("nullspace_optim.covariance.rows.CHUNK_BYTES", 1)
    monkeypatch.setattr(Patches, "blocks", recording)
    seen = capture(convolution, x).captured["weight"]
    assert seen.reasons == () and seen.layout is not None
    assert len(pushed) == 3
    rows = torch.cat(pushed, dim=1)
    with torch.no_grad():
        expected = convolution(x)
        outputs = rows @ seen.layout.to_matrix(convolution.weight).mT
    groups, per_group = outputs.shape[0], outputs.shape[2]
    expected = expected.flatten(2).reshape(3, groups, per_group, -1).permute(1, 0, 3, 2).reshape(groups, -1, per_group)
    assert torch.allclose(outputs, expected, atol=1e-4)
    assert close(seen.sides["right"].matrix, rows.double().mT @ rows.double())
    dense = dense_convolution(convolution, shape)
    assert torch.allclose(x.flatten(1) @ dense.T, convolution(x).detach().flatten(1), atol=1e-4)


@pytest.mark.fault(15)
def test_a_channels_last_kernel_is_recognised() -> None:
    convolution = nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last)
    x = W(2, 4, 6, 6)
    seen = capture(convolution, x.to(memory_format=torch.channels_last)).captured["weight"]
    patches = functional.unfold(x, 3).mT
    assert close(seen.sides["right"].matrix[0], gram(patches))


@pytest.mark.fault(70)
def test_rows_of_every_module_equal_forward_hooks() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))
    batches = [W(5, 6), W(8, 6)]
    found = capture(model, *batches).captured
    for layer in (0, 2, 4):
        rows = torch.cat([hook_inputs(model, x)[str(layer)] for x in batches])
        assert close(found[f"{layer}.weight"].sides["right"].matrix[0], gram(rows))


@pytest.mark.fault(29)
def test_a_weight_used_twice_sums_both_uses() -> None:
    model = Holds(lambda x, w: functional.linear(torch.tanh(functional.linear(x, w)), w), w=W(4, 4))
    x = W(9, 4)
    inner = torch.tanh(x @ model.w.T)
    assert close(capture(model, x).captured["w"].sides["right"].matrix[0], gram(x) + gram(inner))


def test_embedding_rows_are_listed() -> None:
    seen = capture(nn.Embedding(10, 4), torch.tensor([[3, 1], [3, 7]]), torch.tensor([[0, 1]])).captured["weight"]
    assert seen.row_index is not None and seen.row_index.tolist() == [0, 1, 3, 7]
    assert seen.reasons == () and seen.sides == {}


def test_embedding_bag_rows_are_listed() -> None:
    seen = capture(nn.EmbeddingBag(10, 4), torch.tensor([[3, 1], [3, 7]]), rows="relevant").captured["weight"]
    assert seen.row_index is not None and seen.row_index.tolist() == [1, 3, 7]


def test_weights_that_share_their_rows_share_one_sum() -> None:
    model = Holds(
        lambda x, q, k, o: functional.linear(functional.linear(x, q) + functional.linear(x, k), o),
        q=W(4, 4),
        k=W(6, 4)[:4],
        o=W(4, 4),
    )
    found = capture(model, W(2, 7, 4), W(2, 5, 4)).captured
    assert found["q"].sides["right"] is found["k"].sides["right"]
    assert found["q"].sides["right"] is not found["o"].sides["right"]


@pytest.mark.parametrize("rows", ["all", "relevant"])
def test_a_shared_sum_is_split_when_rows_differ(rows: str) -> None:
    model = Holds(lambda x, q, k: functional.linear(x[0], q) + functional.linear(x[1], k), q=W(4, 4), k=W(4, 4))
    a, b, c = W(7, 4), W(7, 4), W(7, 4)
    found = capture(model, (a, a), (b, c), (a, a), rows=rows).captured
    assert close(found["q"].sides["right"].matrix[0], 2 * gram(a) + gram(b))
    assert close(found["k"].sides["right"].matrix[0], 2 * gram(a) + gram(c))


@pytest.mark.parametrize("rows", ["all", "relevant"])
def test_rows_written_after_the_product_are_saved_before(rows: str) -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        hidden = x * 1.0
        y = functional.linear(hidden, w)
        hidden.zero_()
        return y

    x = W(9, 4)
    model = Holds(forward, w=W(5, 4))
    model.w.requires_grad_(False)
    assert close(capture(model, x, rows=rows).captured["w"].sides["right"].matrix[0], gram(x))


# --- the rules of the design, by letter ------------------------------------------------------------------------------


def test_rule_a_parameters_in_one_storage_are_told_apart() -> None:
    flat = torch.randn(5 * 4 + 3 * 4)
    model = nn.Module()
    model.a = nn.Parameter(flat[:20].view(5, 4))
    model.b = nn.Parameter(flat[20:].view(3, 4))
    x = W(9, 4)
    found = capture(model, x, run=lambda x: functional.linear(x, model.a)).captured
    assert close(found["a"].sides["right"].matrix[0], gram(x))
    assert not found["b"].met


def test_rule_a_a_freed_address_is_not_mistaken_for_a_weight() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(50):
            copy = w.clone()
            del copy
            fresh = torch.rand_like(x) + x
            x = x + fresh.sum() * 0
        return functional.linear(x, w)

    found = capture(Holds(forward, w=W(8, 8)), W(8, 8)).captured
    assert found["w"].reasons == () and found["w"].sides["right"].rows.tolist() == [8]


def test_rule_a_nothing_is_held_after_the_batch() -> None:
    import weakref

    kept: list[Any] = []

    def forward(x: Tensor, w: Tensor) -> Tensor:
        hidden = x + 1
        kept.append(weakref.ref(hidden))
        return functional.linear(hidden, w)

    for rows in ("all", "relevant"):
        capture(Holds(forward, w=W(4, 4)), W(3, 4), rows=rows)
        assert kept[-1]() is None


@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.fault(67)
def test_rule_b_a_filled_autocast_cache_is_cleared(rows: str) -> None:
    model, x = nn.Linear(4, 5), W(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        found = capture(model, x, rows=rows).captured["weight"]
    assert close(found.sides["right"].matrix[0], gram(x.bfloat16()))


def test_rule_b_a_cast_that_nothing_reads_is_an_error() -> None:
    model = Holds(lambda x, w: (w.bfloat16(), x)[1], w=W(5, 4))
    with pytest.raises(CaptureError, match="'w' was cast"):
        capture(model, W(9, 4))


def test_rule_b_a_cast_read_by_another_operator_is_a_reason() -> None:
    model = Holds(lambda x, w: x * w.double().sum(), w=W(5, 4))
    assert capture(model, W(9, 4)).captured["w"].reasons == ("read by aten.sum",)


def test_rule_c_a_product_of_two_parameters_builds_another_weight() -> None:
    model = Holds(lambda x, w, a, b: functional.linear(x, w + b @ a), w=W(5, 4), a=W(2, 4), b=W(5, 2))
    found = capture(model, W(9, 4)).captured
    assert found["a"].reasons == found["b"].reasons == ("used to build another weight",)
    assert found["w"].reasons == ("read by aten.add",)
    assert all(not f.sides for f in found.values())


def test_rule_c_a_derived_operand_is_no_input_but_a_constant_is() -> None:
    model = Holds(lambda x, w, v: x + functional.linear(torch.tanh(v), w).sum(), w=W(5, 4), v=W(3, 4))
    assert capture(model, W(9, 4)).captured["w"].reasons == ("used to build another weight",)
    model = Holds(lambda x, w: x + functional.linear(torch.ones(3, 4), w).sum(), w=W(5, 4))
    assert close(capture(model, W(9, 4)).captured["w"].sides["right"].matrix[0], gram(torch.ones(3, 4)))


READERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[int, ...], str]] = {
    "multiplication": (lambda x, w: x * w, (4,), "read by aten.mul"),
    "concatenation": (lambda x, w: torch.cat([x, w]), (5, 4), "read by aten.cat"),
    "weight norm": (lambda x, w: functional.linear(x, torch._weight_norm(w, w[:, :1])), (5, 4), "aten._weight_norm"),
    "trilinear": (lambda x, w: functional.bilinear(x, x, w), (5, 4, 4), "read by aten._trilinear"),
    "layer norm": (lambda x, w: functional.layer_norm(x, (4,), w), (4,), "read by aten.native_layer_norm"),
    "indexing": (lambda x, w: x + w[torch.tensor([0, 2])].sum(), (5, 4), "read by aten.index"),
    "a copied transpose": (lambda x, w: x[:, :2] @ w.t().contiguous().view(2, 10), (5, 4), "of a copied transpose"),
    "a skewed view": (lambda x, w: functional.linear(x[:, :2], w.as_strided((3, 2), (5, 1))), (5, 4), "no block"),
    "kernel slices": (lambda x, w: functional.conv1d(x.mT[None], w[:, :, :1]), (5, 4, 2), "not the whole kernel"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.fault(69)
def test_rule_d_every_other_reader_is_a_reason(name: str, rows: str) -> None:
    function, shape, reason = READERS[name]
    seen = capture(Holds(lambda x, w: function(x, w), w=W(*shape)), W(9, 4), rows=rows).captured["w"]
    assert seen.met and not seen.sides
    assert len(seen.reasons) == 1 and reason in seen.reasons[0]


def test_rule_d_shapes_and_types_may_be_read_freely() -> None:
    model = Holds(lambda x, w: x + torch.zeros_like(w).sum() + w.new_ones(3).sum() + w.shape[0], w=W(5, 4))
    assert not capture(model, W(9, 4)).captured["w"].met


def test_rule_d_a_returned_parameter_has_been_used() -> None:
    model = Holds(lambda x, w, b: (functional.linear(x, w), b), w=W(5, 4), b=W(()))
    assert capture(model, W(9, 4)).captured["b"].reasons == ("returned by the model",)


@pytest.mark.fault(69)
def test_rule_d_recurrent_kernels_are_accounted_for() -> None:
    found = capture(nn.LSTM(4, 5), W(3, 2, 4)).captured
    assert all(seen.met and (seen.reasons or seen.sides) for seen in found.values())


def test_rule_e_position_and_strides_decide_the_side() -> None:
    square = W(4, 4)
    sides = [
        list(capture(Holds(f, w=square.clone()), W(9, 4)).captured["w"].sides)
        for f in (lambda x, w: x @ w, lambda x, w: x @ w.T, lambda x, w: w @ x.T, lambda x, w: w.T @ x.T)
    ]
    assert sides == [["left"], ["right"], ["right"], ["left"]]


class Tied(nn.Module):
    """An embedding that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(index)))


@pytest.mark.parametrize("rows", ["all", "relevant"])
def test_rule_f_a_tied_embedding_keeps_both_sides(rows: str) -> None:
    model, index = Tied(), torch.tensor([[1, 4, 4]])
    seen = capture(model, index, rows=rows).captured["embed.weight"]
    assert seen.row_index is not None and seen.row_index.tolist() == [1, 4]
    assert close(seen.sides["right"].matrix[0], gram(torch.tanh(model.embed(index))))


@pytest.mark.fault(31)
def test_rule_f_names_of_one_tensor_have_one_fate() -> None:
    model = Tied()
    observer = Capture(dict(model.named_parameters(remove_duplicate=False)), rows="all")
    observer.batch(lambda: model(torch.tensor([[1, 4]])))
    found = observer.captured
    assert found["head.weight"] is found["embed.weight"]


def test_rule_g_two_layouts_of_one_weight_are_a_reason() -> None:
    model = Holds(
        lambda x, w: functional.conv1d(x.mT[None], w, groups=2).sum() + (x[:, :2] @ w[..., 0].T).sum(), w=W(6, 2, 1)
    )
    assert capture(model, W(9, 4)).captured["w"].reasons == ("used with two layouts (grouped and matrix)",)


# --- biases ----------------------------------------------------------------------------------------------------------


def test_a_bias_is_frozen_with_its_reason() -> None:
    assert capture(nn.Linear(4, 5), W(9, 4)).captured["bias"].reasons == ("read by aten.addmm as bias",)


@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.parametrize("kind", ["linear", "noncontiguous", "grouped", "transposed"])
def test_joint_rows_end_in_one(kind: str, rows: str) -> None:
    x = W(3, 4, 7)
    layers: dict[str, nn.Module] = {
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(28, 5)),
        "noncontiguous": nn.Linear(4, 5),
        "grouped": nn.Conv1d(4, 6, 3, groups=2),
        "transposed": nn.ConvTranspose1d(4, 6, 3, groups=2),
    }
    model = layers[kind]
    run = (lambda x: model(x.mT)) if kind == "noncontiguous" else model
    observer = capture(model, x, run=run, rows=rows, bias="joint")
    plain = capture(model, x, run=run, rows=rows)
    weight, bias = list(observer.captured)
    seen = observer.captured[weight]
    moment, without = seen.sides["right"].matrix, plain.captured[weight].sides["right"].matrix
    assert seen.bias == bias and observer.captured[bias] == ParameterStatistics(met=True)
    assert close(moment[:, :-1, :-1], without.double())
    assert moment[:, -1, -1].tolist() == seen.sides["right"].rows.float().tolist()


def test_a_bias_with_two_weights_is_not_joint() -> None:
    model = Holds(
        lambda x, w, v, b: functional.linear(x, w, b) + functional.linear(x, v, b), w=W(5, 4), v=W(5, 4), b=W(5)
    )
    x = W(9, 4)
    found = capture(model, x, bias="joint").captured
    assert found["w"].bias is None and close(found["w"].sides["right"].matrix[0], gram(x))
    assert found["b"].reasons == ("read by aten.addmm as bias",)
    assert found["w"].sides["right"] is found["v"].sides["right"]


def test_a_weight_used_once_without_its_bias_is_not_joint() -> None:
    model = Holds(lambda x, w, b: functional.linear(x, w, b) + functional.linear(x * 2, w), w=W(5, 4), b=W(5))
    found = capture(model, W(9, 4), bias="joint").captured
    assert found["w"].bias is None and found["b"].reasons == ("read by aten.addmm as bias",)


def test_packed_attention_biases_are_joint() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = W(2, 5, 8)
    found = capture(attention, x, run=lambda x: attention(x, x, x, need_weights=False), bias="joint").captured
    assert found["in_proj_weight"].bias == "in_proj_bias" and found["out_proj.weight"].bias == "out_proj.bias"
    assert close(found["in_proj_weight"].sides["right"].matrix[0, :-1, :-1], gram(x))


# --- surroundings ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(68)
def test_encoder_fast_path_is_off_and_restored() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    found = capture(layer, W(2, 5, 8)).captured
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert all(found[n].sides for n in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"))


@pytest.mark.fault(66)
def test_activation_checkpointing_counts_rows_once() -> None:
    inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    x = W(9, 4).requires_grad_()
    run = lambda x: checkpoint(inner, x, use_reentrant=False)  # noqa: E731
    observer = capture(inner, x, run=run, rows="relevant")
    assert observer.relevance_note is None
    assert observer.captured["0.weight"].sides["right"].rows.tolist() == [9]


def test_reentrant_checkpointing_counts_the_rows_that_are_read() -> None:
    inner, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), W(9, 4).requires_grad_()
    for rows in (9, 3):
        observer = capture(
            inner, x, run=lambda x, n=rows: checkpoint(inner, x + 0, use_reentrant=True)[:n], rows="relevant"
        )
        assert observer.relevance_note is None
        assert close(observer.captured["0.weight"].sides["right"].matrix[0], gram(x[:rows]))


@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.fault(65)
def test_compiled_models_run_eagerly(rows: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    compiled = torch.compile(model, backend="eager")
    x = W(9, 4)
    compiled(x)
    observer = capture(model, x, run=compiled, rows=rows)
    assert close(observer.captured["0.weight"].sides["right"].matrix[0], gram(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.fault(75, 76)
def test_the_callers_grad_mode_does_not_matter(context: Callable[[], Any], rows: str) -> None:
    model, x = nn.Linear(4, 5), W(9, 4)
    with context():
        inside = torch.randn(9, 4)
        observer = capture(model, x, inside, rows=rows)
    assert close(observer.captured["weight"].sides["right"].matrix[0], gram(x) + gram(inside.clone()))


def test_nothing_is_left_on_model_or_random_state() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), W(9, 4)
    model[0].weight.grad = torch.ones(5, 4)
    model[2].weight.requires_grad_(False)
    before = torch.get_rng_state()
    observer = Capture(dict(model.named_parameters()))
    outputs = observer.batch(lambda: {"y": model(x), "more": [model(x)]})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight.grad, torch.ones(5, 4)) and model[2].weight.grad is None
    assert not model[2].weight.requires_grad and model[0].weight.requires_grad
    assert not outputs["y"].requires_grad and not outputs["more"][0].requires_grad


@pytest.mark.fault(46)
def test_non_finite_rows_name_the_parameter_and_the_batch() -> None:
    bad = W(9, 4)
    bad[3, 1] = float("nan")
    with pytest.raises(CaptureError, match=r"batch 1: non-finite input rows of '0.weight'"):
        capture(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)), W(9, 4), bad)


def test_buffers_that_were_read_are_listed() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    assert capture(model, W(2, 4, 5)).buffers_read == {"1.running_mean", "1.running_var"}


def test_observe_sees_products_in_execution_order() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))
    seen: list[tuple[str, tuple[int, ...]]] = []
    observer = Capture(dict(model.named_parameters()), rows="all", statistics=False)
    observer.observe = lambda name, output: seen.append((name, tuple(output.shape)))
    observer.batch(lambda: model(torch.tensor([1, 2])))
    assert seen == [("0.weight", (2, 4)), ("1.weight", (2, 5)), ("2.weight", (2, 3))]
    assert observer.order == ["0.weight", "1.weight", "2.weight"]


def test_unknown_options_are_refused() -> None:
    with pytest.raises(OptionError, match="relevant"):
        Capture({}, rows="some")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="joint"):
        Capture({}, bias="some")  # type: ignore[arg-type]


# --- relevance -------------------------------------------------------------------------------------------------------


def rows_of(model: nn.Module, x: Any, name: str, **options: Any) -> tuple[int, str | None]:
    observer = capture(model, x, rows="relevant", **options)
    return int(observer.captured[name].sides["right"].rows.sum()), observer.relevance_note


@pytest.mark.fault(54)
def test_rows_that_no_output_reads_do_not_count() -> None:
    model = Holds(lambda x, w: functional.linear(x, w)[:, 0], w=W(5, 4))
    x = W(3, 7, 4)
    seen = capture(model, x, rows="relevant").captured["w"]
    assert seen.sides["right"].rows.tolist() == [3]
    assert close(seen.sides["right"].matrix[0], gram(x[:, 0]))


ALIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": torch.relu_,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softshrink": functional.softshrink,
    "hardshrink": functional.hardshrink,
    "elu": functional.elu,
    "glu": functional.glu,
    "gate": lambda y: torch.relu(y) * torch.relu(y.flip(-1)),
    "square": lambda y: torch.relu(y).square(),
    "clamp": lambda y: y.clamp(min=1e6),
    "max over a window": lambda y: functional.max_pool1d(torch.relu(y), 2),
    "softmax": lambda y: (1e4 * y).softmax(-1),
}


@pytest.mark.parametrize("name", ALIVE)
def test_rows_whose_units_are_switched_off_count(name: str) -> None:
    model = Holds(lambda x, w: ALIVE[name](functional.linear(x, w)[None] - 1e3), w=W(4, 4))
    count, _ = rows_of(model, W(9, 4), "w")
    assert count == 9


@pytest.mark.parametrize("name", ALIVE)
def test_switched_off_rows_count_under_checkpointing(name: str) -> None:
    model = Holds(
        lambda x, w: checkpoint(lambda x: ALIVE[name](functional.linear(x, w)[None] - 1e3), x, use_reentrant=False),
        w=W(4, 4),
    )
    count, _ = rows_of(model, W(9, 4), "w")
    assert count == 9


def test_max_pooling_spreads_over_its_window() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.MaxPool2d(2))
    assert rows_of(model, W(2, 2, 6, 6), "0.weight") == (72, None)


CHOOSING: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda y: y.max(0).values,
    "amax": lambda y: y.amax(0),
    "topk": lambda y: y.topk(1, 0).values,
    "sort": lambda y: y.sort(0).values[:1],
    "argmax": lambda y: y[y.sum(-1).argmax()],
    "gt": lambda y: torch.where(y > 0, y, 0),
    "maximum": lambda y: torch.maximum(y, y * 2),
    "adaptive_max_pool2d": lambda y: functional.adaptive_max_pool2d(y[None], 1),
    "_local_scalar_dense": lambda y: y[:1] * float(y.mean()),
    "bernoulli_": lambda y: functional.dropout(y, 0.5, training=True),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_choosing_by_value_counts_all_rows_and_says_so(name: str) -> None:
    model = Holds(lambda x, w: CHOOSING[name](functional.linear(x, w)), w=W(5, 4))
    count, note = rows_of(model, W(9, 4), "w")
    assert count == 9
    assert note is not None and name.split()[-1] in note


def mean_outside_autograd(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y.mean()


DETACHED: dict[str, Callable[[Tensor, int], Any]] = {
    "detached": lambda y, n: y[:1] * y[:n].detach().mean(),
    "data": lambda y, n: y[:1] * y[:n].data.mean(),
    "returned detached": lambda y, n: (y[:1], y[:n].detach() * 1),
    "no_grad": lambda y, n: y[:1] * mean_outside_autograd(y[:n]),
}


@pytest.mark.parametrize("name", DETACHED)
@pytest.mark.parametrize("read", [9, 4])
def test_rows_that_are_read_outside_autograd_count(name: str, read: int) -> None:
    model = Holds(lambda x, w: DETACHED[name](functional.linear(x, w), read), w=W(5, 4))
    assert rows_of(model, W(9, 4), "w") == (read, None)


def test_integer_choices_keep_relevance() -> None:
    def forward(x: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
        y = functional.linear(x[0], w)
        return functional.normalize(y[torch.arange(3), x[1].argmax(-1)], dim=-1)

    model = Holds(forward, w=W(5, 4))
    assert rows_of(model, (W(3, 7, 4), torch.randint(0, 9, (3, 7))), "w") == (3, None)


def test_a_zero_weight_does_not_hide_what_comes_before() -> None:
    model = Holds(lambda x, a, b: functional.linear(functional.linear(x, a), b), a=W(2, 4), b=torch.zeros(5, 2))
    assert rows_of(model, W(9, 4), "a") == (9, None)


def test_outputs_without_gradient_count_all_rows() -> None:
    model = Holds(lambda x, w: functional.linear(x, w).argmax(-1), w=W(5, 4))
    assert rows_of(model, W(9, 4), "w")[0] == 9
    model = nn.Linear(4, 5)
    model.requires_grad_(False)
    assert rows_of(model, W(9, 4), "weight")[0] == 9


def test_an_output_overwritten_out_of_order_counts_the_row_that_is_returned() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = functional.linear(x, w)
        y.copy_(y.flip(0).clone())
        return y[:1]

    x = W(9, 4)
    seen = capture(Holds(forward, w=W(5, 4)), x, rows="relevant").captured["w"]
    assert close(seen.sides["right"].matrix[0], gram(x[8:]))


def test_constant_rows_count_where_the_product_is_detached() -> None:
    """DoRA divides by the detached norm of `A(eye)`; without those rows `A` would be free to change it."""
    model = Holds(lambda x, a: functional.linear(x, a) / functional.linear(torch.eye(6), a).detach().norm(), a=W(4, 6))
    x = W(2, 6)
    seen = capture(model, x, rows="relevant").captured["a"]
    assert seen.sides["right"].rows.tolist() == [8]
    assert close(seen.sides["right"].matrix[0], torch.eye(6).double() + gram(x))


def test_an_address_that_another_parameter_takes_over_changes_its_name() -> None:
    whole, there = nn.Parameter(torch.randn(3, 4)), ["first"]
    shapes = {name: torch.empty(3, 4) for name in ("first", "second")}
    memory = AliasTracker(shapes, {}, {}, lambda: {there[0]: whole})
    assert memory.origin(whole).names == ("first",)
    there[0] = "second"
    memory.refresh()
    assert memory.origin(whole).names == ("second",)


def test_a_buffer_that_is_freed_under_its_holder_is_forgotten() -> None:
    memory = AliasTracker({}, {}, {}, dict)
    buffer = torch.empty(64)
    memory.learn(buffer, CONSTANT)
    address = buffer.data_ptr()
    assert memory.origin(buffer) == CONSTANT
    buffer.untyped_storage().resize_(0)  # as FSDP2 frees what it has gathered
    memory._look_again(address, torch.empty(1))
    assert not memory._storages and not memory._holders
