"""Attempts to execute code, exhaust memory or deceive through a file; see the README beside this file."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from stores import full_store

from nullspace_optim.cli import main
from nullspace_optim.errors import BasisFileError
from nullspace_optim.files.basis_file import load, save
from nullspace_optim.files.schema import pack
from nullspace_optim.files.validate import unpack
from nullspace_optim.subspace.basis import Basis, BasisStore, Fate

TESTS = Path(__file__).parents[1]


class Payload:
    """Creates the file `marker` wherever it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def refused(path: Path, reason: str = "not a nullspace_optim file") -> None:
    with pytest.raises(BasisFileError, match=reason):
        load(path)


def test_the_payload_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "otherwise the tests below prove nothing"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.fault(95)
def test_a_pickle_is_not_executed(tmp_path: Path, marker: Path, protocol: int) -> None:
    (tmp_path / "bases").write_bytes(pickle.dumps(Payload(marker), protocol))
    refused(tmp_path / "bases")
    assert main(["inspect", str(tmp_path / "bases")]) == 2
    assert not marker.exists()


@pytest.mark.fault(95)
def test_wrapped_pickles_are_not_executed(tmp_path: Path, marker: Path) -> None:
    content = pickle.dumps(Payload(marker))
    (tmp_path / "gzip").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    torch.save({"bases": Payload(marker)}, tmp_path / "torch")
    for name in ("gzip", "zip", "torch"):
        refused(tmp_path / name)
    assert not marker.exists()


@pytest.mark.fault(95)
def test_a_pickle_beside_valid_bases_in_a_checkpoint_is_refused(tmp_path: Path, marker: Path) -> None:
    tensors, metadata = pack(full_store())
    torch.save({"nullspace": {"tensors": tensors, "metadata": metadata, "more": Payload(marker)}}, tmp_path / "c.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pt", weights_only=True)
    assert not marker.exists()


def test_polyglots_are_refused(tmp_path: Path, marker: Path) -> None:
    save(full_store(), tmp_path / "bases")
    content, hidden = (tmp_path / "bases").read_bytes(), pickle.dumps(Payload(marker))
    length = int.from_bytes(content[:8], "little")
    for mutant in (
        content + hidden,
        hidden + content,
        content[:8] + hidden + content[8:],
        struct.pack("<Q", length + len(hidden)) + content[8 : 8 + length] + hidden + content[8 + length :],
        struct.pack("<Q", length + 4096) + content[8 : 8 + length] + b" " * 4096 + content[8 + length :] + hidden,
    ):
        (tmp_path / "bases").write_bytes(mutant)
        refused(tmp_path / "bases")
    assert not marker.exists()


@pytest.mark.fault(94)
def test_names_are_never_used_as_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = BasisStore()
    outside = tmp_path / "outside"
    for name in ("../outside", str(outside), "\x1b]0;owned\x07", "a\r\nb", "\u202egnp.exe"):
        store.put(Basis(name, (1,), Fate.FROZEN, name, tasks=(name,), kept=torch.zeros(1)))
        store.buffers[name] = torch.zeros(1)
    store.tasks = [{"name": "../outside", "path": str(outside)}]
    (tmp_path / "inside").mkdir()
    save(store, tmp_path / "inside" / "bases")
    assert len(load(tmp_path / "inside" / "bases")) == 5
    assert main(["inspect", str(tmp_path / "inside" / "bases")]) == 0
    text = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bases", "inside"]


@pytest.mark.parametrize("claimed", [2**63 - 1, 2**64 - 1, 100_000_001, 10**9], ids=str)
@pytest.mark.fault(96)
def test_giant_headers_are_refused_before_they_are_read(tmp_path: Path, claimed: int) -> None:
    with open(tmp_path / "bases", "wb") as file:
        file.write(struct.pack("<Q", claimed))
        file.truncate(2**31)  # sparse: two gigabytes that take no room
    tracemalloc.start()
    began = time.perf_counter()
    try:
        refused(tmp_path / "bases", "header")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 5


@pytest.mark.fault(96)
def test_a_million_tensors_are_refused_fast(tmp_path: Path) -> None:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % place for place in range(1_000_000)) + b"}"
    (tmp_path / "bases").write_bytes(struct.pack("<Q", len(header)) + header)
    began = time.perf_counter()
    refused(tmp_path / "bases", "more than 200000 tensors")
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    "opening", [b'{"a":' * 100_000, b"[" * 1_000_000, b'{"a":' + b"1" * 1_000_000], ids=["objects", "lists", "digits"]
)
def test_hostile_json_is_refused(tmp_path: Path, opening: bytes) -> None:
    (tmp_path / "bases").write_bytes(struct.pack("<Q", len(opening)) + opening)
    refused(tmp_path / "bases", "JSON")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]},
        {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32"},
        None,
        7,
    ],
    ids=str,
)
@pytest.mark.fault(96)
def test_impossible_tensors_are_refused(tmp_path: Path, entry: object) -> None:
    metadata = pack(BasisStore())[1]
    header = json.dumps({"__metadata__": {"nullspace_optim": metadata}, "a": entry}, separators=(",", ":")).encode()
    (tmp_path / "bases").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    refused(tmp_path / "bases")


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": tensor, "b": tensor, "__metadata__": {"nullspace_optim": "{}"}}, separators=(",", ":"))
    (tmp_path / "bases").write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0\0\0\0")
    refused(tmp_path / "bases", "safetensors refuses it")


@pytest.mark.fault(89)
def test_duplicate_keys_are_refused_in_header_and_metadata(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"nullspace_optim":"{}","nullspace_optim":"{}"}}'
    (tmp_path / "bases").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path / "bases", "duplicate keys 'nullspace_optim'")
    tensors, metadata = pack(BasisStore())
    with pytest.raises(BasisFileError, match="duplicate keys 'schema'"):
        unpack(tensors, '{"schema":1,' + metadata[1:], source="checkpoint")


@pytest.mark.fault(90)
def test_a_renamed_model_is_refused(tmp_path: Path) -> None:
    tensors, _ = pack(full_store())
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    safetensors.torch.save_file(copies, tmp_path / "model", {"format": "pt"})
    refused(tmp_path / "model", "another program")


SAVING = """
import sys
sys.path[:0] = sys.argv[2:]
from stores import full_store
from nullspace_optim.subspace.basis import BasisStore
from nullspace_optim.files.basis_file import save
import torch
large = full_store()
large.buffers["large"] = torch.arange(2_000_000)
save(large, sys.argv[1])
print("ready", flush=True)
while True:
    save(BasisStore(), sys.argv[1])
    save(large, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.fault(85)
def test_killed_while_saving_a_complete_file_remains(tmp_path: Path) -> None:
    path = tmp_path / "bases"
    for delay in (0.0, 0.011, 0.033):
        command = [sys.executable, "-c", SAVING, str(path), str(TESTS / "support"), str(TESTS.parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        assert len(load(path)) in (0, 11)
