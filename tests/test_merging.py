"""Merging of softly kept directions, experts and wide types: against dense mathematics and real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from nullspace_optim import CODECL, IGSP, OWM, SGP, FixedRank, NullSpaceOptimizer, Policy
from nullspace_optim.cli import main
from nullspace_optim.files.basis_file import load
from nullspace_optim.files.merge import merged
from nullspace_optim.subspace.basis import Basis, BasisStore, Fate, Subspace
from nullspace_optim.subspace.conceptors import conceptor_of, directions_of, either
from nullspace_optim.subspace.linalg import orthogonality_error

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = 7


def conceptor(seed: int, shares: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)).Q[:, : len(shares)]
    return conceptor_of(U, torch.tensor(shares), torch.eye(SIZE, dtype=torch.float64))


SHARES = st.lists(st.one_of(st.just(1.0), st.floats(0.01, 0.99)), max_size=SIZE)


@given(SHARES, SHARES)
def test_neither_conceptor_is_loosened_and_nothing_beyond_their_spans_is_kept(
    one: list[float], two: list[float]
) -> None:
    first, second = conceptor(1, one), conceptor(2, two)
    both = either(first, second)
    for part in (first, second):
        assert float(torch.linalg.eigvalsh(both - part).min()) >= -1e-6
    assert float(torch.linalg.eigvalsh(both).max()) <= 1 + 1e-6
    _, values, beyond = torch.linalg.svd(torch.cat([first, second]))
    outside = beyond[values < 1e-9]
    assert float((both @ outside.mT).abs().sum()) < 1e-6
    vectors, shares = directions_of(both)
    assert torch.allclose((vectors * shares) @ vectors.mT, both, atol=1e-5)


@given(st.lists(st.floats(0.01, 0.95), max_size=SIZE), st.lists(st.floats(0.01, 0.95), max_size=SIZE))
def test_without_full_directions_odds_add_up(one: list[float], two: list[float]) -> None:
    identity = torch.eye(SIZE, dtype=torch.float64)
    first, second = conceptor(1, one), conceptor(2, two)
    odds = sum(part @ torch.linalg.inv(identity - part) for part in (first, second))
    expected = odds @ torch.linalg.inv(identity + odds)
    assert torch.allclose(either(first, second), expected, atol=1e-9)


def soft_store(seed: int, shares: list[float] | None, rank: int = 2) -> BasisStore:
    weight = torch.randn(1, 4, SIZE, generator=torch.Generator().manual_seed(0))
    U = torch.linalg.qr(torch.randn(1, SIZE, rank, generator=torch.Generator().manual_seed(seed))).Q
    scale = None if shares is None else torch.tensor([shares])
    part = Subspace("right", U, weight @ U, (rank,), SIZE, torch.zeros(1, SIZE), 1.0, scale=scale)
    store = BasisStore()
    store.put(Basis("w", (4, SIZE), Fate.PROTECTED, "", subspaces={"right": part}, tasks=(str(seed),), history=(rank,)))
    store.tasks = [{"name": str(seed)}]
    return store


@pytest.mark.parametrize("other", [[0.3, 0.6], None], ids=["both soft", "one exact"])
def test_anchors_of_merged_soft_directions_are_those_of_the_weight(other: list[float] | None) -> None:
    part = merged(soft_store(1, [1.0, 0.5]), soft_store(2, other), "b")["w"].subspaces["right"]
    weight = torch.randn(1, 4, SIZE, generator=torch.Generator().manual_seed(0))
    assert part.ranks == (4,) and part.scale is not None and orthogonality_error(part.basis) < 1e-6
    assert float((weight @ part.basis - part.anchor).norm() / part.anchor.norm()) < 1e-5
    full = soft_store(1, None)["w"].subspaces["right"].basis[0, :, :1]
    kept = part.basis[0] * part.scale[0] @ part.basis[0].mT
    assert torch.allclose(kept @ full, full, atol=1e-5), "what one file keeps fully is kept fully"
    assert int((part.scale == 1).sum()) == (1 if other else 3)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))


@pytest.mark.parametrize("policy", [SGP(0.9), CODECL(), OWM()], ids=lambda policy: type(policy).__name__)
def test_soft_files_of_one_model_are_merged_and_train_on(policy: Policy, tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, file in enumerate(files):
        model = network()
        opt = NullSpaceOptimizer(SGD(model.parameters(), 1e-2), model, policy=policy)
        rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(number)) @ torch.randn(4, 12)
        opt.consolidate([rows], progress=False)
        opt.save(file)
    assert main(["export", str(tmp_path / "both.safetensors"), *map(str, files)]) == 0
    model = network()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), 1e-2), model, policy=policy)
    opt.load(tmp_path / "both.safetensors")
    held = opt.bases["0.weight"].subspaces["right"].held
    assert held >= max(load(file)["0.weight"].subspaces["right"].held for file in files) - 1e-4
    for _ in range(5):
        opt.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        opt.step()
    assert opt.verify().ok
    opt.consolidate([torch.randn(20, 12)], name="later", progress=False)
    assert opt.verify().ok


def experts(prefix: str, folder: Path) -> tuple[nn.Module, NullSpaceOptimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(prefix, network())
    mode = IGSP(target_modules=f"{prefix}.0", rank=2, candidates=2, cap=2, window=50)
    return model, NullSpaceOptimizer(AdamW(model.parameters(), 1e-4), model, mode=mode), torch.randn(16, 12)


def test_experts_are_renamed_with_their_layers_and_nothing_of_them_is_lost(tmp_path: Path) -> None:
    model, opt, rows = experts("net", tmp_path)
    for _ in range(2):  # the second task is left in its second phase, whose bases stand below the layer's name
        for _ in range(4):
            opt.zero_grad()
            model(rows).square().mean().backward()
            opt.step()
        if not opt._core.store.tasks:
            opt.consolidate([rows], name="one", progress=False)
    opt.save(tmp_path / "in.safetensors")
    assert any(name.startswith("igsp.net/0.") for name in load(tmp_path / "in.safetensors"))
    command = [
        "export",
        str(tmp_path / "out.safetensors"),
        str(tmp_path / "in.safetensors"),
        "--rename",
        "^net[.]",
        "tower.",
    ]
    assert main(command) == 0
    other, later, _ = experts("tower", tmp_path)
    later.load(tmp_path / "out.safetensors")
    with opt.task("one"), later.task("one"):
        assert torch.equal(model(rows), other(rows))
    assert later.status().phase == opt.status().phase == 2 and later.verify().ok


def test_experts_of_two_files_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, opt, _ = experts("net", tmp_path)
    for name in ("a", "b"):
        opt.save(tmp_path / name)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "experts of a mode cannot be merged" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "a"), "--dtype", "float64"]) == 0


def test_kept_values_are_cast_as_well_and_complex_ones_stay(tmp_path: Path) -> None:
    for dtype, cast in ((torch.float32, torch.float64), (torch.complex64, torch.complex64)):
        model = nn.Sequential(nn.Linear(6, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype))
        opt = NullSpaceOptimizer(SGD(model.parameters(), 1e-2), model, policy=FixedRank(2))
        opt.consolidate([torch.randn(20, 6, dtype=dtype)], progress=False)
        opt.save(tmp_path / "in")
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "in"), "--dtype", "float64"]) == 0
        store = load(tmp_path / "out")
        assert store["0.weight"].subspaces["right"].anchor.dtype == cast
        assert store["0.bias"].kept is not None and store["0.bias"].kept.dtype == cast
        wide = model.to(cast)
        again = NullSpaceOptimizer(SGD(wide.parameters(), 1e-2), wide, policy=FixedRank(2))
        again.load(tmp_path / "out")
        assert again.verify().ok
