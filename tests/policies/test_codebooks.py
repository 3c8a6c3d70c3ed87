"""Tables that are looked up and multiplied from the left as well: frozen rows and a left side are kept together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_policy import POLICIES
from models import Codebook
from torch import nn
from torch.optim import SGD, AdamW
from training import relative_drift

from nullspace_optim import Energy, NullSpaceOptimizer, NumericalRank
from nullspace_optim.distributed.communicator import communicator
from nullspace_optim.errors import BasisFileError, ConsolidationError
from nullspace_optim.policies import OSF, TRGP, Policy
from nullspace_optim.subspace.basis import Fate, Subspace
from nullspace_optim.subspace.shards import WHOLE
from nullspace_optim.subspace.tables import clear_of_rows

TOKENS, FEW = torch.arange(6).view(2, 3), torch.arange(9).view(3, 3)


def protected(policy: Policy, order: tuple[bool, ...], base: Any = AdamW) -> tuple[Codebook, NullSpaceOptimizer]:
    model = Codebook()
    optimizer = NullSpaceOptimizer(base(model.parameters(), lr=0.01, weight_decay=0.1), model, policy=policy)
    for mixed, tokens in zip(order, (TOKENS, FEW)):
        optimizer.consolidate(
            [tokens], name=str(mixed), forward=lambda batch, kind=mixed: model(batch, kind), progress=False
        )
    return model, optimizer


def train(model: nn.Module, optimizer: NullSpaceOptimizer, steps: int = 20) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randint(0, 20, (6, 5))) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("order", [(True,), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if not isinstance(policy, TRGP)], ids=repr)
def test_every_policy_holds_rows_and_columns_together(policy: Policy, order: tuple[bool, ...]) -> None:
    model, optimizer = protected(policy, order)
    assert {"left", "rows"} <= set(optimizer.bases["codes.weight"].subspaces)
    before = model.codes.weight.detach().clone()
    train(model, optimizer)
    assert optimizer.verify().worst < 1e-5
    assert not torch.equal(model.codes.weight, before)
    looked_up = optimizer.bases["codes.weight"].subspaces["rows"].basis
    assert torch.equal(model.codes.weight[looked_up], before[looked_up])


@pytest.mark.parametrize("base", [AdamW, SGD])
def test_old_outputs_stay_however_the_table_was_read(base: Any) -> None:
    model, optimizer = protected(NumericalRank(), (True, False), base)
    old = [model(TOKENS).detach(), model(FEW, False).detach()]
    train(model, optimizer, steps=100)
    assert torch.equal(model(FEW, False), old[1])
    assert relative_drift(model(TOKENS).detach(), old[0]) < 1e-5


def test_a_file_whose_sides_overlap_is_refused_by_name(tmp_path: Path) -> None:
    _, optimizer = protected(NumericalRank(), (True,))
    left = optimizer.bases["codes.weight"].subspaces["left"]
    left.basis = torch.linalg.qr(torch.randn(1, 20, left.rank))[0]
    optimizer.reanchor()
    optimizer.save(tmp_path / "bases")
    with pytest.raises(BasisFileError, match=r"keeps rows and a left side that overlap, .* consolidate"):
        optimizer.load(tmp_path / "bases")


def test_policies_that_tell_tasks_apart_refuse_it_by_name() -> None:
    with pytest.raises(ConsolidationError, match=r"'codes\.weight' is looked up and multiplied from the left"):
        protected(TRGP(), (True,))


def test_what_is_free_is_counted_once_and_nothing_is_free_in_the_end() -> None:
    model, optimizer = protected(NumericalRank(), (True,))
    basis = optimizer.bases["codes.weight"]
    used = basis.subspaces["left"].rank + basis.subspaces["rows"].rank
    assert optimizer.capacity()["codes.weight"] == pytest.approx(1 - used / 20) and 0 < used < 20
    assert (basis.rank, basis.dimension, basis.history) == (used, 20, (used,))
    report = optimizer.consolidate([torch.arange(20).view(4, 5)], progress=False)
    line = next(row for row in report.parameters if row.name == "codes.weight")
    assert (line.fate, line.rank, line.added, line.free) == (Fate.FULL, 20, 20 - used, 0)
    assert optimizer.capacity()["codes.weight"] == 0
    before = model.codes.weight.detach().clone()
    train(model, optimizer, steps=3)
    assert torch.equal(model.codes.weight, before)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_it_is_the_dense_product_with_the_projection_off_the_rows(soft: bool, dtype: torch.dtype) -> None:
    W, index = torch.randn(1, 10, 4, dtype=dtype), torch.tensor([1, 4, 7])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    inside = torch.zeros(10, 1, dtype=dtype).index_fill(0, index[:1], 1.0)  # a direction that is one of the rows
    U = torch.linalg.qr(torch.cat([inside, torch.randn(10, 4, dtype=dtype)], 1))[0][None]
    scale = torch.tensor([[1.0, 1.0, 0.7, 0.5, 0.2]]) if soft else None
    spectrum = torch.zeros(1, 10)
    left = Subspace("left", U, U.mH @ W, (5,), 10, spectrum, 1.0, scale=scale)
    rows = Subspace("rows", index, W[0, index], (3,), 10, spectrum[:, :0], 1.0)
    found = clear_of_rows(W, WHOLE, left, rows, "W", communicator())
    V = found.basis[0].to(wide)
    torch.testing.assert_close(V.mH @ V, torch.eye(4, dtype=wide), atol=1e-6, rtol=0)
    assert found.ranks == (4,) and not V[index].any()
    torch.testing.assert_close(found.anchor, found.basis.mH @ W)
    P = torch.eye(10, dtype=wide)
    P[index, index] = 0
    C = U[0].to(wide) @ torch.diag((torch.ones(5) if scale is None else scale[0]).to(wide)) @ U[0].to(wide).mH
    if soft:
        assert found.scale is not None and found.scale.max() <= 1
        torch.testing.assert_close(V @ torch.diag(found.scale[0].to(wide)) @ V.mH, P @ C @ P, atol=1e-6, rtol=0)
    else:
        both = torch.cat([U[0].to(wide), torch.eye(10, dtype=wide)[:, index]], 1)
        wanted = both @ torch.linalg.pinv(both)  # onto all that both sides keep
        torch.testing.assert_close(V @ V.mH + torch.eye(10, dtype=wide) - P, wanted, atol=1e-6, rtol=0)
    assert clear_of_rows(W, WHOLE, found, rows, "W", communicator()) is found


@pytest.mark.parametrize("policy", [Energy(0.9), OSF(0.3)], ids=repr)
def test_later_rows_take_their_share_out_of_what_was_kept(policy: Policy) -> None:
    model, optimizer = protected(policy, (True, False))
    for number, codes in enumerate((torch.tensor([[11, 12]]), torch.tensor([[13, 3]]))):
        train(model, optimizer, steps=5)
        optimizer.consolidate([codes], name=f"more {number}", progress=False)
        sides = optimizer.bases["codes.weight"].subspaces
        assert not sides["left"].basis[:, sides["rows"].basis].any()
    train(model, optimizer, steps=5)
    assert optimizer.verify().worst < 1e-5
