"""Basis files: what goes in comes out, a save is whole or not at all, and no damaged file is ever accepted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import stat
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import full_store, protected
from torch import Tensor

import nullspace_optim.files.basis_file as persistence
import nullspace_optim.files.validate as validation
from nullspace_optim.errors import BasisFileError
from nullspace_optim.files.basis_file import load, save
from nullspace_optim.files.schema import digest, fingerprint, pack, sealed
from nullspace_optim.files.validate import unpack
from nullspace_optim.subspace.basis import Basis, BasisStore, Fate
from nullspace_optim.subspace.layout import Layout

SOFT = "soft.weight/right/"
LEFT = "visual.proj/left/basis"
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


def write(path: Path, tensors: dict[str, Tensor], metadata: str) -> Path:
    """Write a file as `save` does, without its checks."""
    path.write_bytes(safetensors.torch.save(tensors, {"nullspace_optim": metadata}))
    return path


def forged(
    store: BasisStore, change: Callable[[dict[str, Any], dict[str, Tensor]], None]
) -> tuple[dict[str, Tensor], str]:
    """Return what an author of wrong files would write: changed content, all digests recomputed."""
    tensors, metadata = pack(store)
    document = json.loads(metadata)
    change(document, tensors)
    document["tensors"] = {key: digest(tensor) for key, tensor in tensors.items()}
    document.pop("digest")
    return tensors, sealed(document)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "bases.safetensors"
    save(full_store(), path)
    return path


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


# ---- damaged and foreign files ----


def refused(path: Path, reason: str) -> None:
    """Loading is one error: one line with path and reason."""
    with pytest.raises(BasisFileError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"short", "5 bytes"),
        (b"name,rank\nfc.weight,12\n" * 99, "cut off or foreign"),
        (b"<!DOCTYPE html><html><title>404 Not Found</title></html>", "web page"),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", "pickle"),
        (b"PK\x03\x04" + b"\0" * 99, "weights_only=True"),
        (struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{" * 64, "at most 100000000"),
        (struct.pack("<Q", 2) + b"{}", "lack the one key"),
        (struct.pack("<Q", 2) + b"[]", "list"),
        (struct.pack("<Q", 3) + b"\xff{}", "UTF-8"),
        (struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995, "JSON"),
        (struct.pack("<Q", 17) + b'{"a":{},"a":[1]} ', "duplicate keys 'a'"),
        (struct.pack("<Q", 8) + b'{"a" :1}', "not spelled"),
    ],
    ids=[
        "empty",
        "short",
        "text",
        "html",
        "pickle",
        "zip",
        "huge",
        "large",
        "bare",
        "list",
        "latin",
        "nested",
        "double",
        "space",
    ],
)
@pytest.mark.fault(87)
def test_other_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", reason)


@pytest.mark.fault(87)
def test_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "not a regular file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "not a regular file")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"nullspace_optim": "{}", "format": "pt"}], ids=["none", "pt", "two"]
)
@pytest.mark.fault(90)
def test_a_model_in_safetensors_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"fc.weight": torch.zeros(3)}, tmp_path / "model", metadata)
    refused(tmp_path / "model", "another program")


@pytest.mark.fault(87)
def test_every_cut_and_every_extension_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [*range(64), *random.sample(range(len(content)), 64), len(content) - 1]:
        saved.write_bytes(content[:length])
        refused(saved, "not a nullspace_optim file")
    for tail in (b"\0", b" ", b"\0" * 8, content):
        saved.write_bytes(content + tail)
        refused(saved, "not a nullspace_optim file")


def test_three_hundred_random_mutations_are_all_refused(saved: Path) -> None:
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for trial in range(300):
        mutant = bytearray(content)
        for _ in range(random.choice([1, 1, 1, 4])):
            place = random.randrange((8, header, len(content))[trial % 3])
            kind = random.choice(["bit", "byte", "insert", "delete", "swap"])
            if kind == "bit":
                mutant[place] ^= 1 << random.randrange(8)
            elif kind == "byte":
                mutant[place] = random.randrange(256)
            elif kind == "insert":
                mutant.insert(place, random.randrange(256))
            elif kind == "delete":
                del mutant[place]
            else:
                other = random.randrange(header)
                mutant[place], mutant[other] = mutant[other], mutant[place]
        if bytes(mutant) != content:
            saved.write_bytes(mutant)
            refused(saved, "nullspace_optim")


@pytest.mark.fault(88)
def test_every_flipped_bit_of_the_header_is_refused(tmp_path: Path) -> None:
    store = BasisStore()
    store.tasks = [{"name": "a", "rows": 3}]
    store.put(Basis("w", (), Fate.FROZEN, "b", kept=torch.tensor(1.0)))
    save(store, tmp_path / "small")
    content = (tmp_path / "small").read_bytes()
    for place in range(len(content)):
        mutant = bytearray(content)
        mutant[place] ^= 1 << place % 8
        (tmp_path / "small").write_bytes(mutant)
        refused(tmp_path / "small", "nullspace_optim")


@pytest.mark.fault(88)
def test_a_flipped_payload_bit_names_the_tensor(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin, _ = header["visual.proj/left/anchor"]["data_offsets"]
    content[8 + length + begin] ^= 1
    saved.write_bytes(content)
    refused(saved, r"tensor 'visual\.proj/left/anchor' does not match its digest")


@pytest.mark.fault(89)
def test_missing_and_unexpected_tensors_are_all_listed(tmp_path: Path) -> None:
    tensors, metadata = pack(full_store())
    for gone in ("visual.proj/left/basis", "buffer/mask"):
        del tensors[gone]
    tensors["smuggled"] = tensors["other"] = torch.zeros(1)
    refused(
        write(tmp_path / "f", {k: v.clone() for k, v in tensors.items()}, metadata),
        "missing tensors: 'buffer/mask', 'visual.proj/left/basis'; unexpected tensors: 'other', 'smuggled'",
    )


@pytest.mark.fault(91)
def test_a_newer_schema_says_which_version_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "f", *forged(full_store(), lambda d, t: d.update(schema=3, library="9.1.0")))
    refused(path, r"schema version 3, written by nullspace_optim '9\.1\.0'.*upgrade")


FORGERIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "no schema": (lambda d, t: d.pop("schema"), "'schema'"),
    "schema 0": (lambda d, t: d.update(schema=0), "version 0"),
    "schema true": (lambda d, t: d.update(schema=True), "'schema'"),
    "tasks": (lambda d, t: d.update(tasks={}), "'tasks'"),
    "task": (lambda d, t: d.update(tasks=["aircraft"]), r"tasks\[0\]"),
    "bases": (lambda d, t: d.update(bases=None), "'bases'"),
    "twice": (lambda d, t: d["bases"].append(d["bases"][-1]), "'head.weight' is described twice"),
    "no basis": (lambda d, t: d["bases"].pop(0), "no parameter uses the tensors 'visual.fc.weight/right/anchor'"),
    "name": (lambda d, t: d["bases"][0].update(name=3), r"bases\[0\].*'name'"),
    "fate": (lambda d, t: d["bases"][0].update(fate="lost"), "'visual.fc.weight' has the unknown fate 'lost'"),
    "shape": (lambda d, t: d["bases"][0].update(shape=[6, 9]), r"'visual.fc.weight' right.*\[6, 9\]"),
    "negative": (lambda d, t: d["bases"][0].update(shape=[-6, 8]), "'shape'"),
    "overflow": (lambda d, t: d["bases"][0].update(shape=[10**30, 8]), "'shape'"),
    "axes": (lambda d, t: d["bases"][0].update(shape=[1] * 999), "999 axes"),
    "scalar": (lambda d, t: d["bases"][0].update(shape=[]), "does not fit"),
    "kind": (lambda d, t: d["bases"][0]["layout"].update(kind="round"), "'round'"),
    "groups": (lambda d, t: d["bases"][2]["layout"].update(groups=4), "does not fit"),
    "zero groups": (lambda d, t: d["bases"][2]["layout"].update(groups=0), "groups >= 1"),
    "side": (lambda d, t: d["bases"][0]["sides"].update(top={}), "unknown side 'top'"),
    "ranks": (lambda d, t: d["bases"][0]["sides"]["right"].update(ranks=[2]), r"\[3\] columns.*\[2\]"),
    "rank > size": (lambda d, t: d["bases"][0]["sides"]["right"].update(ranks=[99]), "rank 99"),
    "size": (lambda d, t: d["bases"][0]["sides"]["right"].update(size=7), "size 7"),
    "energy": (lambda d, t: d["bases"][0]["sides"]["right"].update(energy="all"), "'energy'"),
    "bias": (lambda d, t: d["bases"][0].update(bias="fc.bias"), "size 8"),
    "history": (lambda d, t: d["bases"][0].update(history=[1.5]), "'history'"),
    "names": (lambda d, t: d["bases"][0].update(tasks=[1]), "'tasks'"),
    "buffers": (lambda d, t: d.update(buffers=["mask"]), "bn.num_batches_tracked"),
    "kept": (lambda d, t: t.update({"visual.ln.weight/kept": torch.ones(7)}), r"kept value of shape \[7\]"),
    "lost": (lambda d, t: t.pop("visual.proj/left/anchor"), "'visual.proj/left/anchor' is missing"),
    "NaN": (
        lambda d, t: t["visual.proj/left/anchor"].view(-1)[2].fill_(torch.nan),
        "'visual.proj' left.*non-finite.*anchor",
    ),
    "Inf": (
        lambda d, t: t["visual.proj/left/basis"].view(-1)[2].fill_(torch.inf),
        "'visual.proj' left.*non-finite.*basis",
    ),
    "scaled": (lambda d, t: t["visual.fc.weight/right/basis"].mul_(1.01), "'visual.fc.weight' right.*not orthonormal"),
    "parallel": (lambda d, t: t[LEFT][..., 0].copy_(t[LEFT][..., 1]), "orthonormal"),
    "bf16": (lambda d, t: t.update({LEFT: t[LEFT].bfloat16()}), "bfloat16"),
    "wide": (lambda d, t: t.update({LEFT: torch.eye(8, 9)[None]}), "9 columns in dimension 8"),
    "flat": (lambda d, t: t.update({LEFT: torch.tensor(1.0)}), "rank 4 and 0 columns"),
    "anchor": (
        lambda d, t: t.update({"visual.proj/left/anchor": torch.zeros(1, 4, 4)}),
        r"anchor of shape \[1, 4, 4\]",
    ),
    "spectrum": (lambda d, t: t.update({"visual.proj/left/spectrum": torch.zeros(1, 7)}), "spectrum of shape"),
    "covariance": (
        lambda d, t: t.update({"joint.weight/right/covariance": torch.zeros(1, 7, 7)}),
        "covariance of shape",
    ),
    "share": (lambda d, t: t[SOFT + "scale"].mul_(2), "0..1"),
    "shares": (lambda d, t: t.update({SOFT + "scale": torch.ones(1, 4)}), r"scale of shape \[1, 4\]"),
    "NaN share": (lambda d, t: t[SOFT + "scale"].fill_(torch.nan), "0..1"),
    "members": (lambda d, t: t.update({SOFT + "members": torch.ones(3, 1, 3, dtype=torch.bool)}), "members of shape"),
    "member type": (lambda d, t: t.update({SOFT + "members": torch.ones(2, 1, 3)}), "members of dtype"),
    "padded share": (lambda d, t: t.update({"conv.weight/right/scale": torch.ones(2, 5)}), "beyond its rank 2"),
    "row range": (lambda d, t: t.update({"tied.weight/rows/basis": torch.tensor([0, 3, 9])}), r"within 0\.\.8"),
    "row twice": (lambda d, t: t.update({"tied.weight/rows/basis": torch.tensor([0, 3, 3])}), "repeated"),
    "row below": (lambda d, t: t.update({"tied.weight/rows/basis": torch.tensor([-1, 3, 4])}), "within"),
    "row dtype": (lambda d, t: t.update({"tied.weight/rows/basis": torch.tensor([0.0, 3, 4])}), "int64"),
}


@pytest.mark.parametrize("case", FORGERIES)
@pytest.mark.fault(82, 92, 93)
def test_wrong_content_with_right_digests_is_refused(tmp_path: Path, case: str) -> None:
    change, reason = FORGERIES[case]
    tensors, metadata = forged(full_store(), change)
    refused(write(tmp_path / "f", {k: v.clone() for k, v in tensors.items()}, metadata), reason)


def test_changed_metadata_do_not_match_their_digest() -> None:
    tensors, metadata = pack(full_store())
    with pytest.raises(BasisFileError, match=r"checkpoint 7.*own digest"):
        unpack(tensors, metadata.replace("aircraft", "airships"), source="checkpoint 7")


@pytest.mark.parametrize("metadata", [None, 7, "", "[]", "{}", "[" * 5000, '{"schema":1}'], ids=repr)
def test_foreign_metadata_in_a_checkpoint_are_refused(metadata: Any) -> None:
    with pytest.raises(BasisFileError, match="checkpoint"):
        unpack({}, metadata, source="checkpoint")


def test_tensors_that_a_framework_cast_or_replaced_are_refused() -> None:
    tensors, metadata = pack(full_store())
    with pytest.raises(BasisFileError, match=rf"{LEFT}.*dtype"):
        unpack({**tensors, LEFT: tensors[LEFT].half()}, metadata, source="checkpoint")
    with pytest.raises(BasisFileError, match=rf"{LEFT}.*list"):
        unpack({**tensors, LEFT: [1.0]}, metadata, source="checkpoint")  # type: ignore[dict-item]


def test_rank_zero_and_later_rows_are_valid() -> None:
    store = full_store()
    store.put(protected("dead.weight", (3, 4), "right", 0))
    store["tied.weight"].subspaces["rows"].basis = torch.tensor([5, 8, 2])
    assert len(unpack(*pack(store), source="here")) == len(store)


@pytest.mark.fault(94)
def test_names_are_escaped_in_messages(tmp_path: Path) -> None:
    def lose(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["bases"][-2]["fate"] = "lost"

    refused(write(tmp_path / "f", *forged(full_store(), lose)), r"scale\\n\\x1b\[31m/\.\./\\xe9")


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
