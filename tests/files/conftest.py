"""A saved file with every kind of record."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import full_store

from nullspace_optim.files.basis_file import save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "bases.safetensors"
    save(full_store(), path)
    return path
