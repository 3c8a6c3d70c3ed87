"""What holds for every model, task, optimizer and moment: properties over random cases (see the profiles in conftest).

Others stand where their subject is tested: projections are idempotent, commute with row permutations and leave the
complement alone (`subspace/test_projection.py`); stores survive the round trip through a file
(`files/test_basis_file.py`).
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_impl import orthogonality_error
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from training import train

from nullspace_optim import BasisFileError, Energy, FixedRank, NullSpaceOptimizer, NumericalRank, TailEnergy
from nullspace_optim.consolidation import consolidate, describe, observe
from nullspace_optim.covariance.second_moment import SecondMoment
from nullspace_optim.files.basis_file import load, save
from nullspace_optim.subspace.basis import BasisStore

Build = Callable[[Any], Optimizer]
BASES: dict[str, Build] = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "SGD, momentum and decay": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adam for-loop": lambda p: Adam(p, lr=0.01, weight_decay=0.1, foreach=False, amsgrad=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.002, momentum=0.5, weight_decay=0.1),
}
seeds, bases = st.integers(0, 2**31), st.sampled_from(sorted(BASES))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def network(seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a network of random widths, inputs `[n, d]` and targets for it."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    widths = [dice.randint(3, 20) for _ in range(dice.randint(2, 4))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=dice.random() < 0.7), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    return model, torch.randn(12, widths[0], dtype=dtype), torch.randn(12, widths[-1], dtype=dtype)


def groups(model: nn.Module, seed: int) -> list[dict[str, Any]]:
    """Return the parameters in one to three groups with rates of their own."""
    dice = random.Random(seed)
    parts: list[list[nn.Parameter]] = [[] for _ in range(dice.randint(1, 3))]
    for parameter in model.parameters():
        dice.choice(parts).append(parameter)
    return [{"params": part, "lr": 0.01 * (n + 1)} for n, part in enumerate(parts) if part]


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters()]


@given(seeds, bases, dtypes)
def test_without_bases_every_bit_is_that_of_the_base_optimizer(seed: int, name: str, dtype: torch.dtype) -> None:
    model, inputs, targets = network(seed, dtype)
    twin = copy.deepcopy(model)
    train(BASES[name](groups(twin, seed)), twin, 20, inputs, targets)
    train(NullSpaceOptimizer(BASES[name](groups(model, seed)), model), model, 20, inputs, targets)
    assert bits(model) == bits(twin)


@given(seeds, bases, st.integers(1, 12), st.sampled_from(["exact", "fast"]), st.sampled_from(["update", "both"]))
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
def test_kept_directions_stay_under_any_base_optimizer(
    seed: int, name: str, rows: int, precision: Any, project: Any
) -> None:
    model, inputs, targets = network(seed)
    optimizer = NullSpaceOptimizer(
        BASES[name](groups(model, seed)), model, policy=NumericalRank(), precision=precision, project=project
    )
    old = torch.randn(rows, inputs.shape[1])
    train(optimizer, model, 3, inputs, targets)
    optimizer.consolidate([old], progress=False)
    start = {key: p.detach().clone().double() for key, p in model.named_parameters()}
    train(optimizer, model, 25, inputs, targets)
    assert optimizer.verify().worst <= 1e-5
    for key, basis in optimizer.bases.items():
        if basis.subspaces:
            now, before, U = model.get_parameter(key).detach().double(), start[key], basis.U.double()
            size = max(float(before.norm()), float(now.norm()))
            assert float(((now - before) @ U).norm()) <= 1e-5 * size, key


@given(
    seeds,
    st.lists(st.integers(1, 8), min_size=2, max_size=6),
    st.sampled_from([Energy(0.9), NumericalRank(), FixedRank(2)]),
)
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
def test_bases_stay_orthonormal_and_only_grow(seed: int, sizes: list[int], policy: Any) -> None:
    model, inputs, _ = network(seed)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=policy)
    before: dict[str, Tensor] = {}
    for size in sizes:
        optimizer.consolidate([torch.randn(size, inputs.shape[1])], progress=False)
        for key, basis in optimizer.bases.items():
            if basis.subspaces:
                U = basis.U
                assert U.shape[1] <= U.shape[0]
                assert orthogonality_error(U) <= 1e-6
                if key in before:
                    old = before[key].double()
                    assert float((old - U.double() @ (U.double().T @ old)).norm()) <= 1e-5, "a kept direction was lost"
                before[key] = U.clone()


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 40))
def test_covariances_do_not_depend_on_batches_ranks_or_order(seed: int, sizes: list[int], width: int) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(1, sum(sizes), width)
    whole = SecondMoment(1, width)
    whole.update(rows)
    ranks = [SecondMoment(1, width), SecondMoment(1, width)]
    shuffled = rows[:, torch.randperm(rows.shape[1])]
    for number, batch in enumerate(shuffled.split(sizes, dim=1)):
        ranks[number % 2].update(batch)
    ranks[0].merge(ranks[1])
    exact = rows[0].double().T @ rows[0].double()
    assert float((ranks[0].matrix[0] - exact).norm()) <= 1e-6 * max(1.0, float(exact.norm()))
    assert float((whole.matrix[0] - exact).norm()) <= 1e-6 * max(1.0, float(exact.norm()))
    assert ranks[0].rows.tolist() == whole.rows.tolist() == [sum(sizes)]


@given(seeds, st.integers(1, 30), st.sampled_from([Energy(0.95), NumericalRank(), TailEnergy()]))
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
def test_the_same_data_twice_add_nothing(seed: int, rows: int, policy: Any) -> None:
    model, inputs, _ = network(seed)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=policy)
    data = torch.randn(rows, inputs.shape[1])
    optimizer.consolidate([data], progress=False)
    before = {key: basis.rank for key, basis in optimizer.bases.items()}
    optimizer.consolidate([data[torch.randperm(rows)]], progress=False)
    assert {key: basis.rank for key, basis in optimizer.bases.items()} == before


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=FixedRank(2))
    optimizer.consolidate([torch.randn(8, 5)], progress=False)
    path: Path = tmp_path_factory.mktemp("file") / "bases"
    optimizer.save(path)
    save(load(path), path.with_name("again"))
    assert path.read_bytes() == path.with_name("again").read_bytes()
    return path


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_any_flipped_byte_and_any_cut_is_refused(small_file: Path, share: float, flip: int, cut: bool) -> None:
    content = bytearray(small_file.read_bytes())
    place = int(share * len(content))
    if cut:
        del content[place:]
    else:
        content[place] ^= flip
    mutant = small_file.with_name("mutant")
    mutant.write_bytes(content)
    with pytest.raises(BasisFileError):
        load(mutant)


PLACES: list[tuple[Any, str]] = [
    (observe, "_capture"),
    (observe, "named_buffers"),
    (consolidate, "settle_fates"),
    (consolidate, "replace"),
    (describe, "record_probe"),
    (describe, "stored_bytes"),
    (describe, "ConsolidationReport"),
]
ERRORS: list[type[BaseException]] = [RuntimeError, KeyboardInterrupt, MemoryError, StopIteration, SystemExit]


@given(seeds, st.sampled_from(range(len(PLACES))), st.integers(0, 3), st.sampled_from(ERRORS), st.booleans())
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
def test_an_exception_anywhere_in_a_consolidation_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, seed: int, place: int, calls: int, error: type[BaseException], second: bool
) -> None:
    model, inputs, targets = network(seed)
    model.insert(1, nn.BatchNorm1d(model[0].out_features))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.01), model, precision="fast")
    if second:
        optimizer.consolidate([inputs], progress=False)
    train(optimizer, model, 2, inputs, targets)
    counter = [0]
    module, name = PLACES[place]
    real = getattr(module, name)

    def failing(*args: Any, **options: Any) -> Any:
        counter[0] += 1
        if counter[0] > calls:
            raise error("injected")
        return real(*args, **options)

    before = _everything(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        try:
            optimizer.consolidate([inputs, inputs + 1], name="broken", progress=False)
            return  # the place is reached less often than that
        except BaseException as caught:
            if not isinstance(caught, (error, RuntimeError)):  # StopIteration inside a generator is a RuntimeError
                raise
    assert _everything(model, optimizer) == before
    assert optimizer.consolidate([inputs], name="whole", progress=False).batches == 1


def _everything(model: nn.Module, optimizer: NullSpaceOptimizer) -> Any:
    """Return all that a failed consolidation must leave alone, as plain values."""
    store: BasisStore = optimizer._core.store
    return (
        {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        (torch.get_rng_state().numpy().tobytes(), random.getstate()),
        {name: (id(basis), basis.rank, basis.fate) for name, basis in store.items()},
        (list(map(str, store.tasks)), sorted(store.buffers), sorted(store.probes)),
        optimizer._core.protection.owed,
    )


@given(seeds, bases, st.integers(0, 20), st.integers(1, 20), st.sampled_from(["exact", "fast"]), st.integers(1, 12))
@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
def test_a_run_saved_and_resumed_anywhere_is_the_same_to_the_bit(
    seed: int, name: str, first: int, then: int, precision: Any, rows: int
) -> None:
    def begin() -> tuple[nn.Sequential, NullSpaceOptimizer, Tensor, Tensor]:
        model, inputs, targets = network(seed)
        options: dict[str, Any] = {"policy": Energy(0.9), "precision": precision}
        return model, NullSpaceOptimizer(BASES[name](groups(model, seed)), model, **options), inputs, targets

    model, optimizer, inputs, targets = begin()
    optimizer.consolidate([torch.randn(rows, inputs.shape[1])], progress=False)
    train(optimizer, model, first, inputs, targets)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, model, then, inputs, targets)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin, resumed, inputs, targets = begin()
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, twin, then, inputs, targets)
    assert bits(twin) == bits(model)
