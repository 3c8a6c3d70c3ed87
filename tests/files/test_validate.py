"""Damaged and foreign files: every one is refused, with the reason and nothing half read."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from stores import full_store, protected
from torch import Tensor

from nullspace_optim.errors import BasisFileError
from nullspace_optim.files.basis_file import load, save
from nullspace_optim.files.schema import digest, pack, sealed
from nullspace_optim.files.validate import unpack
from nullspace_optim.subspace.basis import Basis, BasisStore, Fate

SOFT = "soft.weight/right/"
LEFT = "visual.proj/left/basis"


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
    "energies": (lambda d, t: d["bases"][0].update(energies=[1.5]), "not a list of shares"),
    "energies of others": (lambda d, t: d["bases"][0].update(energies=[0.5] * 9), "9 energies of"),
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
