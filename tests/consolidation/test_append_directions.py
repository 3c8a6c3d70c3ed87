"""The residual append against dense projectors; stored columns stay bit for bit."""

from __future__ import annotations

import pytest
import reference_impl as slow
import torch

from nullspace_optim.subspace.linalg import append_directions, polish


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_appended_columns_span_what_lies_outside_the_basis(kept: int, dtype: torch.dtype, orthonormal: bool) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    basis = polish(torch.linalg.qr(torch.randn(9, kept, dtype=wide)).Q)
    outside = torch.eye(9, dtype=wide) - basis.to(wide) @ basis.to(wide).mH
    found = outside @ torch.randn(9, 3, dtype=wide)
    if orthonormal:
        found = torch.linalg.qr(found).Q
    grown = append_directions(
        basis, found if orthonormal else found + basis.to(wide).sum(1, keepdim=True), orthonormal=orthonormal
    )
    assert grown.dtype == dtype and torch.equal(grown[:, :kept], basis)
    assert slow.orthogonality_error(grown) <= 1e-6
    both = torch.linalg.qr(torch.cat([basis.to(wide), found], dim=1)).Q
    assert float((grown.to(wide) @ grown.to(wide).mH - both @ both.mH).abs().max()) < 1e-6


def test_nothing_found_leaves_the_basis_itself() -> None:
    basis = torch.eye(4)[:, :2]
    assert append_directions(basis, torch.zeros(4, 0, dtype=torch.float64), orthonormal=True) is basis
