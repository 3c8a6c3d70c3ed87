"""Basis files: what goes in comes out, and a save is whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import full_store, protected

import nullspace_optim.files.basis_file as persistence
import nullspace_optim.files.validate as validation
from nullspace_optim.errors import BasisFileError
from nullspace_optim.files.basis_file import load, save
from nullspace_optim.files.schema import digest, fingerprint, pack
from nullspace_optim.files.validate import unpack
from nullspace_optim.subspace.basis import Basis, BasisStore, Fate
from nullspace_optim.subspace.layout import Layout

FIXTURE = Path(__file__).parents[1] / "data" / "schema1.safetensors"
posix = pytest.mark.skipif(os.name == "nt", reason="modes and links of POSIX file systems")


def assert_equal(one: BasisStore, two: BasisStore) -> None:
    """Two stores hold the same records and bitwise the same tensors."""
    (tensors, metadata), (others, other) = pack(one), pack(two)
    assert metadata == other
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == others[key].dtype and torch.equal(tensor, others[key]), key
    assert list(one) == list(two)
    assert one.tasks == two.tasks


# ---- round trips ----


def test_load_returns_what_save_was_given(saved: Path) -> None:
    torch.manual_seed(0)
    assert_equal(load(saved), full_store())


@pytest.mark.fault(102)
def test_save_load_save_is_byte_identical(saved: Path, tmp_path: Path) -> None:
    for again in ("second", "third"):
        save(load(saved), tmp_path / again)
        assert (tmp_path / again).read_bytes() == saved.read_bytes()


def test_an_empty_store_is_a_valid_file(tmp_path: Path) -> None:
    save(BasisStore(), tmp_path / "empty")
    assert len(load(tmp_path / "empty")) == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_store_survives_the_round_trip(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = data.draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), unique=True, max_size=4)
    )
    store = BasisStore()
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
    store.tasks = data.draw(
        st.lists(st.dictionaries(st.text(max_size=5), plain | st.lists(plain), max_size=3), max_size=3)
    )
    for name in names:
        groups, m, d = (data.draw(st.integers(1, 4)) for _ in range(3))
        side = data.draw(st.sampled_from(["right", "left"]))
        ranks = data.draw(st.lists(st.integers(0, d if side == "right" else m), min_size=groups, max_size=groups))
        store.put(protected(name, (groups * m, d), side, *ranks, layout=Layout("grouped", groups)))
    path = tmp_path_factory.mktemp("any") / "bases"
    save(store, path)
    assert_equal(load(path), store)


def test_complex_bases_survive(tmp_path: Path) -> None:
    store = BasisStore()
    basis = protected("w", (4, 6), "right", 2)
    part = basis.subspaces["right"]
    part.basis = torch.linalg.qr(torch.randn(1, 6, 2, dtype=torch.complex64)).Q
    part.anchor = torch.randn(1, 4, 2, dtype=torch.complex64).conj()
    store.put(basis)
    save(store, tmp_path / "c")
    assert_equal(load(tmp_path / "c"), store)


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    store = full_store()
    weights = torch.randn(4, 6)
    store.buffers = {"whole": weights, "same": weights, "transposed": weights.t(), "row": weights[1]}
    save(store, tmp_path / "s")
    assert_equal(load(tmp_path / "s"), store)


def test_state_dict_form_survives_torch_save_with_weights_only(tmp_path: Path) -> None:
    store = full_store()
    tensors, metadata = pack(store)
    torch.save({"nullspace": {"metadata": metadata, "tensors": tensors}}, tmp_path / "checkpoint.pt")
    payload = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["nullspace"]
    assert_equal(unpack(payload["tensors"], payload["metadata"], source="checkpoint"), store)


def test_unpack_leaves_its_arguments_alone() -> None:
    tensors, metadata = pack(full_store())
    before = dict(tensors)
    unpack(tensors, metadata, source="here")
    assert tensors == before


@pytest.mark.fault(91)
def test_version_1_files_stay_readable() -> None:
    store = load(FIXTURE)
    assert [task["name"] for task in store.tasks] == ["aircraft", "birds"]
    assert {basis.fate for basis in store.values()} == set(Fate)
    assert store["conv.weight"].main is not None and store["conv.weight"].main.ranks == (5, 2)


def test_version_2_files_stay_readable() -> None:
    store = load(FIXTURE.with_name("schema2.safetensors"))
    soft = store["soft.weight"].subspaces["right"]
    assert soft.scale is not None and soft.scale.shape == (1, 3) and 1.0 < soft.held < 3.0
    assert soft.members is not None and soft.members.shape == (2, 1, 3) and soft.members.dtype == torch.bool


# ---- fingerprint ----


def test_fingerprint_is_the_same_for_equal_stores_and_after_loading(saved: Path) -> None:
    torch.manual_seed(0)
    assert fingerprint(load(saved)) == fingerprint(full_store())


def test_fingerprint_ignores_the_order_of_parameters() -> None:
    store, turned = full_store(), BasisStore()
    turned.tasks = store.tasks
    for name in reversed(list(store)):
        turned.put(store[name])
    assert fingerprint(store) == fingerprint(turned)


@pytest.mark.parametrize("change", ["anchor", "basis", "rank", "task", "name", "fate"])
def test_fingerprint_differs_when_anything_that_protects_differs(change: str) -> None:
    store = full_store()
    before = fingerprint(store)
    part = store["visual.fc.weight"].subspaces["right"]
    if change in ("anchor", "basis"):
        getattr(part, change).view(-1)[0] += 1
    elif change == "rank":
        part.ranks = (2,)
    elif change == "task":
        store.tasks[1]["name"] = "cars"
    elif change == "name":
        store.put(Basis("other.weight", (3, 8), Fate.FREE, ""))
    else:
        store["head.weight"].fate = Fate.FROZEN
    assert fingerprint(store) != before


# ---- atomic saving ----


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen", "chmod"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
@pytest.mark.fault(86)
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(
    saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    before = saved.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as caught:
        save(BasisStore(), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    if isinstance(caught.value, OSError):
        assert str(saved) in str(caught.value) and caught.value.errno == errno.ENOSPC


@pytest.mark.fault(86)
def test_a_half_written_temporary_is_removed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.fdopen

    def short(descriptor: int, mode: str) -> Any:
        file = opened(descriptor, mode)
        file.write(b"half")
        file.close()
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fdopen", short)
    with pytest.raises(OSError, match=r"quota.*bases\.safetensors"):
        save(BasisStore(), saved)
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.fault(85)
def test_data_are_on_disk_before_the_name_is(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    save(full_store(), saved)
    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.fault(86)
def test_missing_and_forbidden_folders_are_os_errors_that_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/such/bases"):
        save(full_store(), tmp_path / "no" / "such" / "bases")
    with pytest.raises(OSError, match=r"not a regular file.*folder"):
        (tmp_path / "folder").mkdir()
        save(full_store(), tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="absent"):
        load(tmp_path / "absent")


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.fault(86)
def test_a_read_only_folder_is_a_permission_error(saved: Path) -> None:
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"bases\.safetensors"):
            save(BasisStore(), saved)
    finally:
        saved.parent.chmod(0o700)


@pytest.mark.fault(85)
def test_the_leftover_of_a_killed_save_is_removed_by_the_next_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            save(BasisStore(), saved)
    (leftover,) = set(saved.parent.iterdir()) - {saved}
    save(full_store(), saved)
    assert leftover.exists(), "another process may still be writing it"
    os.utime(leftover, (time.time() - 7200,) * 2)
    (saved.parent / ".nullspace-of-somebody-else.tmp").touch()
    save(full_store(), saved)
    assert not leftover.exists()
    assert (saved.parent / ".nullspace-of-somebody-else.tmp").exists()


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.fault(98)
def test_a_new_file_gets_the_mode_that_open_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(full_store(), tmp_path / "bases")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "bases").stat().st_mode) == 0o666 & ~umask


@posix
@pytest.mark.fault(98)
def test_an_existing_file_keeps_its_mode(saved: Path) -> None:
    saved.chmod(0o640)
    save(full_store(), saved)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o640


@posix
@pytest.mark.fault(99)
def test_a_symbolic_link_is_followed_and_stays_a_link(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, dangling = tmp_path / "elsewhere" / "link", tmp_path / "elsewhere" / "dangling"
    link.symlink_to(saved)
    dangling.symlink_to(tmp_path / "created")
    save(BasisStore(), link)
    save(BasisStore(), dangling)
    assert link.is_symlink() and len(load(saved)) == 0
    assert dangling.is_symlink() and len(load(tmp_path / "created")) == 0


@pytest.mark.fault(97)
def test_saving_over_the_file_just_loaded_keeps_both_intact(saved: Path) -> None:
    torch.manual_seed(0)
    expected, store = full_store(), load(saved)
    save(BasisStore(), saved)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert_equal(store, expected)


def test_a_name_of_maximal_length_can_be_saved(tmp_path: Path) -> None:
    save(full_store(), tmp_path / ("b" * 255))
    assert len(load(tmp_path / ("b" * 255))) == len(full_store())


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    store = full_store()
    store.tasks.append({"name": "cars", "loader": object()})
    with pytest.raises(BasisFileError, match="object"):
        save(store, tmp_path / "a")
    store = full_store()
    store.buffers["wide"] = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(BasisFileError, match="complex128"):
        save(store, tmp_path / "a")
    store = full_store()
    store.buffers["fc/kept"] = torch.zeros(2)
    store.put(Basis("buffer/fc", (2,), Fate.FROZEN, "", kept=torch.zeros(2)))
    with pytest.raises(BasisFileError, match="buffer/fc/kept"):
        save(store, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_orthonormality_check_does_not_depend_on_matmul_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unpack(*pack(full_store()), source="here")
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_format_is_documented_in_the_module() -> None:
    document = json.loads(pack(full_store())[1])
    assert persistence.__doc__ is not None
    for key in (*document, *document["bases"][0], *document["bases"][0]["sides"]["right"]):
        assert key in persistence.__doc__, key
    assert len(persistence.__doc__.splitlines()) < 60 and validation.SCHEMA_VERSION == 2


def test_the_digest_is_sha256_over_dtype_shape_and_bytes() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    assert (
        sys.byteorder == "big"
        or digest(tensor) == hashlib.sha256(b"torch.float32 [1, 2] " + struct.pack("<2f", 1.0, 2.0)).hexdigest()
    )
    assert digest(tensor) != digest(tensor.t()) and digest(tensor) == digest(tensor.clone())
