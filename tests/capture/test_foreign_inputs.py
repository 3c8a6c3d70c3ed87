"""Rows of any size, scaled sums, loaders and batches of any kind, names that collide, weights that were folded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

from nullspace_optim import Energy, Fate, NullSpaceOptimizer, NumericalRank, TailEnergy
from nullspace_optim.covariance.second_moment import SecondMoment
from nullspace_optim.covariance.sketch import FrequentDirections, SketchedCovariance
from nullspace_optim.errors import BatchError, StaleAnchorError
from nullspace_optim.model.find import unwrap
from nullspace_optim.model.names import named_buffers, named_parameters, present_parameters
from nullspace_optim.policies.base import Policy
from nullspace_optim.subspace.linalg import eigh, largest_eigenvalue


def _wrapped(model: nn.Module, policy: Policy | None = None, **options: Any) -> NullSpaceOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return NullSpaceOptimizer(base, model, policy=policy or NumericalRank(), **options)


def _train(optimizer: NullSpaceOptimizer, model: nn.Module, steps: int = 10) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def _moved(model: nn.Module, x: Tensor, before: Tensor) -> float:
    difference = (model(x).detach() - before).double()
    return float(difference.norm() / before.double().norm())


# Rows of any size

SIZES = [1e-30, 1e-23, 1e-20, 1e-13, 1e-5, 1e5, 1e16, 1e25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("policy", [Energy(), NumericalRank(), TailEnergy()], ids=repr)
def test_the_rank_does_not_depend_on_the_unit_of_the_rows(policy: Policy, dtype: torch.dtype) -> None:
    factors = torch.randn(2, 64, 6, dtype=torch.float64) @ torch.randn(2, 6, 16, dtype=torch.float64)
    first, second = factors.to(dtype).double()
    ranks = []
    for size in [1.0, *(2.0 ** round(np.log2(size)) for size in SIZES)]:
        model = nn.Linear(16, 8, bias=False).to(dtype)
        optimizer = _wrapped(model, policy)
        optimizer.consolidate([(size * first).to(dtype)], progress=False)
        rank = optimizer.bases["weight"].rank
        optimizer.consolidate([(size * second).to(dtype)], progress=False)
        ranks.append((rank, optimizer.bases["weight"].rank))
    assert len(set(ranks)) == 1


@pytest.mark.parametrize("size", SIZES)
def test_outputs_stay_for_rows_of_any_size(size: float) -> None:
    model, x = nn.Linear(16, 8, bias=False), size * torch.randn(6, 16)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5 and optimizer.verify([x]).drift("task 1") < 1e-5


@pytest.mark.parametrize("small", [1e-30, 1e-22])
def test_rows_of_several_sizes_count_by_their_energy(small: float) -> None:
    tiny = torch.cat([torch.randn(4, 8), torch.zeros(4, 8)], 1) * small
    x = torch.cat([tiny, torch.cat([torch.zeros(3, 8), torch.randn(3, 8)], 1)])
    model = nn.Linear(16, 8, bias=False)
    optimizer = _wrapped(model, Energy())
    optimizer.consolidate([tiny, x], progress=False)
    assert optimizer.bases["weight"].rank == 3  # beside rows of size 1, the tiny ones are below rounding
    optimizer.detach()
    optimizer = _wrapped(model, Energy())
    optimizer.consolidate([tiny], progress=False)
    assert optimizer.bases["weight"].rank == 4  # alone they are all there is


def test_convolutions_and_joint_biases_meet_tiny_rows_too() -> None:
    model, x = nn.Conv2d(3, 4, 3), 1e-25 * torch.randn(1, 3, 5, 5)
    optimizer = _wrapped(model, Energy())
    optimizer.consolidate([x], progress=False)
    assert optimizer.bases["weight"].rank == 9
    layer, x = nn.Linear(16, 8), 1e20 * torch.randn(3, 16)
    optimizer = _wrapped(layer, bias="joint")
    optimizer.consolidate([x], progress=False)
    before = layer(x).detach()
    _train(optimizer, layer)
    assert _moved(layer, x, before) < 1e-5


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_sums_equal_the_dense_second_moment_at_every_size(size: float) -> None:
    rows = size * torch.randn(1, 32, 6)
    wanted = rows[0].double().T @ rows[0].double()
    moment = SecondMoment(1, 6)
    moment.update(torch.randn(1, 0, 6))
    moment.update(rows[:, :16])
    other = SecondMoment(1, 6)
    other.update(rows[:, 16:])
    moment.merge(other)
    assert torch.allclose(moment.matrix[0].double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.diagonal().max()))
    sketch = FrequentDirections(1, 6, 7, dtype=torch.float32, device="cpu")
    sketch.update(rows)
    factor = sketch.factor[0].double()
    assert torch.allclose(factor.T @ factor, wanted, rtol=1e-4, atol=1e-4 * float(wanted.diagonal().max()))


def test_ordinary_rows_are_summed_in_the_type_that_was_asked_for() -> None:
    moment = SecondMoment(1, 6)
    moment.update(torch.randn(1, 8, 6))
    moment.update(torch.zeros(1, 8, 6))
    assert moment.dtype == torch.float32


def test_sketched_weights_meet_tiny_rows_too() -> None:
    model, x = nn.Linear(64, 8, bias=False), 1e-24 * torch.randn(5, 64)
    optimizer = _wrapped(model, Energy(), covariance=SketchedCovariance(16, 32))
    optimizer.consolidate([x], progress=False)
    assert optimizer.bases["weight"].rank == 5


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1e24, 1e36])
def test_eigenvalues_of_tiny_and_huge_matrices(size: float) -> None:
    rows = torch.randn(4, 8)
    matrix = size * (rows.T @ rows)
    values, vectors = eigh(matrix)
    assert torch.allclose(values[:4], torch.linalg.eigvalsh(matrix.double()).flip(0)[:4].float(), rtol=1e-4)
    assert torch.allclose(vectors.T @ vectors, torch.eye(8), atol=1e-5)
    top = float(largest_eigenvalue(matrix))
    assert 0.8 * float(values[0]) < top < 1.001 * float(values[0])


# Scaled sums under a joint bias


class Scaled(nn.Module):
    """A product with a bias by `how`, with `beta` and `alpha`."""

    def __init__(self, how: str, **factors: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(16, 20) * 0.3), nn.Parameter(torch.randn(16))
        self.o, self.how, self.factors = nn.Linear(16, 40), how, factors

    def forward(self, x: Tensor) -> Tensor:
        many = (x[None], self.w.t()[None])
        if self.how == "addmm":
            h = torch.addmm(self.b, x, self.w.t(), **self.factors)
        elif self.how == "addmm_":
            h = self.b.expand(len(x), -1).clone().addmm_(x, self.w.t(), **self.factors)
        elif self.how == "baddbmm":
            h = torch.baddbmm(self.b, *many, **self.factors)[0]
        elif self.how == "addbmm":
            h = torch.addbmm(self.b, *many, **self.factors)
        elif self.how == "sparse.addmm":
            h = torch.sparse.addmm(self.b.expand(len(x), -1), x.to_sparse(), self.w.t(), **self.factors)
        elif self.how == "addmv":
            h = torch.stack([torch.addmv(self.b, self.w, row, **self.factors) for row in x])
        else:
            ones = torch.ones(len(x))
            h = torch.addr(x @ self.w.t(), ones, self.b, **self.factors)
        return self.o(torch.tanh(h))


HOW = ("addmm", "addmm_", "baddbmm", "addbmm", "sparse.addmm", "addmv", "addr")
FACTORS: list[dict[str, float]] = [{}, {"beta": 0.5}, {"alpha": 2.0}, {"beta": 0.5, "alpha": 2.0}, {"beta": 0.0}]


@pytest.mark.parametrize("bias", ["joint", "freeze"])
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_a_scaled_bias_is_no_constant_input(how: str, factors: dict[str, float], bias: Any) -> None:
    model, x = Scaled(how, **factors), torch.randn(5, 20)
    optimizer = _wrapped(model, bias=bias)
    optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5
    if factors and how in ("addmm", "baddbmm"):
        assert optimizer.bases["b"].fate is Fate.FROZEN
    elif how == "addmm" and bias == "joint":
        assert optimizer.bases["b"].fate is Fate.PROTECTED


# Loaders and batches


class Loader:
    def __init__(self, error: BaseException, batches: list[Any]) -> None:
        self.error, self.batches = error, batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error", [TypeError("x"), NotImplementedError("stream"), RuntimeError("iter first"), KeyError(0)]
)
def test_a_loader_whose_length_raises_has_no_length(error: BaseException) -> None:
    model = nn.Linear(24, 40)
    batches = [torch.randn(4, 24)] * 3
    assert _wrapped(model).consolidate(Loader(error, batches), progress=False).batches == 3
    assert _wrapped(model).consolidate(Loader(error, batches), max_batches=2, progress=False).batches == 2


def test_ctrl_c_in_the_length_of_a_loader_passes() -> None:
    model = nn.Linear(24, 40)
    with pytest.raises(KeyboardInterrupt):
        _wrapped(model).consolidate(Loader(KeyboardInterrupt(), []), progress=False)


@pytest.mark.parametrize("whole", [torch.randn(4, 24), np.zeros((4, 24), dtype=np.float32)], ids=["tensor", "array"])
def test_a_tensor_in_the_place_of_a_loader_is_refused(whole: Any) -> None:
    model = nn.Linear(24, 40)
    with pytest.raises(BatchError, match=r"of shape \(4, 24\) was passed where batches are expected: pass \[tensor\]"):
        _wrapped(model).consolidate(whole, progress=False)
    optimizer = _wrapped(model)
    optimizer.consolidate([torch.ones(4, 24)], progress=False)
    with pytest.raises(BatchError, match="pass"):
        optimizer.verify(whole)


@pytest.mark.parametrize("kind", ["array", "doubles", "with labels", "mapping"])
def test_batches_of_arrays_are_read_as_tensors(kind: str) -> None:
    x, model = np.random.randn(4, 24).astype(np.float32), nn.Linear(24, 40)
    batch: dict[str, Any] = {
        "array": x,
        "doubles": x.astype(np.float64),
        "with labels": (x, np.arange(4)),
        "mapping": {"input": x, "label": np.arange(4)},
    }
    optimizer = _wrapped(model)
    optimizer.consolidate([batch[kind]], progress=False)
    assert optimizer.bases["weight"].rank == 4


@pytest.mark.parametrize("batch", [["a photo", "a dog"], [1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]], (1, 2)], ids=str)
def test_batches_of_plain_values_are_refused_in_a_sentence(batch: Any) -> None:
    model = nn.Linear(24, 40)
    with pytest.raises(BatchError, match=r"plain values .* holds no tensor.*forward="):
        _wrapped(model).consolidate([batch], progress=False)
    optimizer = _wrapped(model)
    optimizer.consolidate([batch], forward=lambda _: model(torch.ones(1, 24)), progress=False)
    assert optimizer.bases["weight"].rank == 1


@pytest.mark.parametrize("kind", ["words", "arrays", "both"])
def test_samples_without_tensors_are_told_apart(kind: str) -> None:
    def batch(number: int) -> Any:
        words, array = [f"word {number}"], np.full(3, number)
        return {"words": words, "arrays": (array,), "both": {"text": words, "x": torch.ones(2)}}[kind]

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(4, 6)

        def forward(self, batch: Any) -> Tensor:
            seed = int(batch[0][0]) if kind == "arrays" else int((batch["text"] if kind == "both" else batch)[0][-1])
            return self.table(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)))

    model = Words()
    optimizer = _wrapped(model)
    optimizer.consolidate([batch(1), batch(2)], forward=model, progress=False)
    assert optimizer.verify([batch(2), batch(1)], forward=model).drift("task 1") == 0.0
    assert optimizer.verify([batch(2), batch(3)], forward=model).missing == ("task 1",)


# Names that collide


class Colliding(nn.Module):
    """A child of the name that wrappers give, beside parameters and buffers of the same names as its own."""

    def __init__(self, child: str) -> None:
        super().__init__()
        self.child = child
        self.add_module(child, nn.Linear(24, 20))
        self.get_submodule(child).register_buffer("scale", torch.ones(1))
        self.weight, self.bias = nn.Parameter(torch.randn(20, 24)), nn.Parameter(torch.zeros(20))
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.get_submodule(self.child)
        return inner(x) * inner.scale + functional.linear(x, self.weight, self.bias) * self.scale


@pytest.mark.parametrize("child", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
def test_parameters_whose_names_would_become_one_keep_their_full_names(child: str) -> None:
    model, x = Colliding(child), torch.randn(4, 24)
    optimizer = _wrapped(model)
    optimizer.consolidate([x], progress=False)
    assert set(optimizer.bases) == {"weight", "bias", f"{child}.weight", f"{child}.bias"}
    assert set(named_buffers(model)) == set(optimizer._core.store.buffers) == {"scale", f"{child}.scale"}
    assert named_parameters(model).keys() == present_parameters(model)().keys()
    before = model(x).detach()
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5 and optimizer.verify().ok


def test_a_child_called_like_a_wrapper_is_no_wrapper() -> None:
    model = Colliding("_orig_mod")
    assert unwrap(model) is model
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model  # type: ignore[arg-type]


def test_names_that_do_not_collide_lose_the_parts_of_wrappers() -> None:
    inner = nn.Linear(4, 4)
    parametrize.register_parametrization(inner, "weight", nn.Identity())
    model = nn.ModuleDict({"a": nn.ModuleDict({"_checkpoint_wrapped_module": inner})})
    assert set(named_parameters(model)) == {"a.weight", "a.bias"}


# Folded weights


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def test_a_removed_parametrization_is_said_to_leave_a_new_weight() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 30))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    optimizer, x = _wrapped(model), torch.randn(4, 24)
    optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    parametrize.remove_parametrizations(model[0], "weight")
    said = r"'0\.weight' was changed.*the original is gone and the fused weight is a new weight\. .*reanchor\(\)"
    with pytest.raises(StaleAnchorError, match=said):
        optimizer.consolidate([torch.randn(4, 24)], progress=False)
    with pytest.raises(StaleAnchorError, match=said):
        _train(optimizer, model, 1)
    optimizer.reanchor()
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5
    optimizer.consolidate([torch.randn(4, 24)], progress=False)


def test_weights_that_were_never_parametrized_get_the_plain_message() -> None:
    model = nn.Linear(24, 24)
    optimizer = _wrapped(model)
    optimizer.consolidate([torch.randn(4, 24)], progress=False)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(StaleAnchorError) as caught:
        optimizer.consolidate([torch.randn(4, 24)], progress=False)
    assert "parametrization" not in str(caught.value)


@pytest.mark.parametrize("how", ["weight_norm", "old weight_norm", "pruning"])
def test_parts_that_were_folded_into_one_weight_are_named(how: str) -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 30))
    if how == "weight_norm":
        parametrizations.weight_norm(model[0])
    elif how == "old weight_norm":
        weight_norm(model[0])
    else:
        prune.random_unstructured(model[0], "weight", 0.5)
    optimizer = _wrapped(model)
    optimizer.consolidate([torch.randn(4, 24)], progress=False)
    parts = [name for name in optimizer.bases if name.startswith("0.") and "weight" in name]
    if how == "weight_norm":
        parametrize.remove_parametrizations(model[0], "weight")
    elif how == "old weight_norm":
        remove_weight_norm(model[0])
    else:
        prune.remove(model[0], "weight")
    with pytest.raises(StaleAnchorError, match=rf"'{parts[0]}'.* folded into '0\.weight'.*new weight.*release\(\)"):
        optimizer.consolidate([torch.randn(4, 24)], progress=False)
    if how != "pruning":  # which leaves the same parameter object under another name
        optimizer.add_param_group({"params": [model[0].weight]})
    with pytest.raises(StaleAnchorError, match="folded"):
        _train(optimizer, model, 1)
    for name in parts:
        optimizer.release(name)
    x = torch.randn(4, 24)
    optimizer.consolidate([x], progress=False)
    before = model(x).detach()
    _train(optimizer, model)
    assert _moved(model, x, before) < 1e-5
