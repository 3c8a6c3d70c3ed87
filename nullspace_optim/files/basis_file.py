"""Basis files: one safetensors file, written atomically, checked completely when it is read, never a pickle.

The format, schema version 2 (version 1 had neither `scale`, `members` nor `mode`). `__metadata__` of the safetensors
header has one key, ``nullspace_optim``, with one canonical JSON object (sorted keys, no spaces, ASCII)::

    schema      2                    a reader refuses a newer number and migrates an older one
    library     "0.1.0"              nullspace_optim that wrote the file
    torch       "2.6.0"              torch that wrote the file
    tasks       [{...}, ...]         one plain record a consolidation, oldest first: name, policy, sample counts ...
    bases       [{...}, ...]         one record a parameter, in the order of the store:
        name, shape                  canonical parameter name and the weight's shape
        fate, reason                 "free" | "protected" | "full" | "frozen", and why
        layout {kind, groups}        how the weight is read as matrices `[g, m, d]` (see `layout`)
        tasks, history               names of the tasks that used it, rank after each of them
        energies                     share (0..1) of each task's energy that is kept; older files have none
        bias                         bias parameter folded in as one more column (`d + 1`), or null
        sides {side: {ranks, size, energy}}      rank of each group, `s`, share (0..1) of the last task's energy in `U`
    buffers     [name, ...]          buffers that past tasks relied on
    probes      {task: [key, ...]}   tensors with which a task is verified
    mode        {...}                what a mode stores beside its tensors, only there if the optimizer has one
    tensors     {key: sha256}        digest over dtype, shape and bytes of every tensor in the file
    digest      sha256               of the JSON object without this key

Tensor keys and shapes (`k` columns; a group of smaller rank has columns of zeros)::

    <parameter>/<side>/basis         right `[g, d, k]`, left `[g, m, k]`, orthonormal; rows `int64` `[k]`
    <parameter>/<side>/anchor        right `W U` `[g, m, k]`, left `U^H W` `[g, k, d]`, rows `[k, d]`
    <parameter>/<side>/spectrum      eigenvalues `[g, s]`, descending
    <parameter>/<side>/covariance    `[g, s, s]`, only where the policy accumulates
    <parameter>/<side>/scale         `[g, k]` in 0..1, how strongly each column is kept; absent: fully
    <parameter>/<side>/members       bool `[tasks, g, k]`, columns of each task's own subspace, if the policy says
    <parameter>/kept                 value of a frozen parameter, any dtype
    buffer/<name>    probe/<task>/<key>    mode/<key>          any shape, dtype and values

Names are data: they are never used as paths and are printed escaped. Two processes that save to one path: the last
complete file wins. The same pair `pack` / `unpack` makes the ``"nullspace"`` entry of an optimizer's `state_dict()`:
``{"metadata": str, "tensors": {key: Tensor}}``, which ``weights_only=True`` accepts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import BasisFileError
from ..subspace.basis import BasisStore
from .schema import pack, parse_json, refuse
from .validate import unpack

KEY = "nullspace_optim"
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
MOST_TENSORS = 200_000
STALE = 3600.0  # seconds after which the temporary file of a killed save is removed
FORMATS = {
    b"PK": "it begins like a zip archive (a torch.save checkpoint: read it with weights_only=True and load_state_dict)",
    b"\x80": "it begins like a pickle, which is never read",
    b"<": "it begins like a web page",
}


def save(store: BasisStore, path: str | os.PathLike[str]) -> None:
    """Write `store` to `path`: afterwards the new file is complete and on disk, or the old one is untouched.

    Symbolic links are followed, an existing file keeps its mode and owner, a new one gets the mode `open` gives.
    Equal stores give equal bytes. Raises `OSError` naming `path`, or `BasisFileError` if the format cannot hold it.
    """
    payload = dumps(store, _name(path))
    try:
        _replace(Path(os.path.realpath(path)), payload)
    except OSError as error:
        raise OSError(error.errno, f"bases not saved: {error.strerror or error}", os.fspath(path)) from error


def dumps(store: BasisStore, source: str) -> bytes:
    """Return the bytes of the file that `save` writes; `source` names it in errors."""
    tensors, metadata = pack(store)
    try:
        payload: bytes = safetensors.torch.save(_unshared(tensors), {KEY: metadata})
    except (SafetensorError, KeyError, ValueError, RuntimeError, NotImplementedError) as error:
        raise BasisFileError(f"{source}: the bases cannot be written as safetensors ({error!r})") from error
    return payload


def load(path: str | os.PathLike[str]) -> BasisStore:
    """Return the store in the file `path`, on the CPU and independent of the file from then on.

    Raises `OSError` if the file cannot be read and `BasisFileError`, with path, key and reason, for every defect in it.
    """
    source = _name(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        refuse(source, "it is not a regular file")
    with open(path, "rb") as file:
        return _read(file, source)


def loads(data: bytes, source: str) -> BasisStore:
    """Return the store in bytes that `dumps` made; defects are refused as in `load`."""
    return _read(io.BytesIO(data), source)


def _read(file: BinaryIO, source: str) -> BasisStore:
    header = _header(file, source)
    file.seek(0)
    data = file.read()
    entry = header.get("__metadata__")
    if not isinstance(entry, dict) or set(entry) != {KEY} or not isinstance(entry[KEY], str):
        refuse(source, f"its metadata lack the one key '{KEY}' (a safetensors file of another program)")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, AssertionError) as error:
        refuse(source, f"safetensors refuses it ({ascii(str(error))[:200]})")
    return unpack(tensors, entry[KEY], source)


def _name(path: str | os.PathLike[str]) -> str:
    return ascii(os.fspath(path))


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each with a memory of its own (safetensors refuses shared memory)."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        host = tensor.cpu().resolve_conj().resolve_neg()
        address = host.untyped_storage().data_ptr()
        found[key] = host.clone() if address in taken else host
        taken.add(address)
    return found


def _header(file: BinaryIO, source: str) -> dict[str, Any]:
    """Return the parsed safetensors header of `file`, its length checked before it is read."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        refuse(source, f"it has {size} bytes, too few for a header")
    length = int.from_bytes(start, "little")
    if length > min(LARGEST_HEADER, size - 8):
        guess = next((text for magic, text in FORMATS.items() if start.startswith(magic)), "it is cut off or foreign")
        refuse(source, f"{guess}: a header of {length} bytes in {size} (at most {LARGEST_HEADER} are allowed)")
    raw = file.read(length)
    if raw.count(b'"data_offsets"') > MOST_TENSORS:
        refuse(source, f"it lists more than {MOST_TENSORS} tensors")
    try:
        text = raw.decode().rstrip(" ")
    except UnicodeDecodeError as error:
        refuse(source, f"the header is not valid UTF-8 ({error.reason} at byte {error.start})")
    return parse_json(text, source, "the header", ensure_ascii=False, sort_keys=False)


def _replace(target: Path, payload: bytes) -> None:
    """Put `payload` in the place of `target` so that at every moment one complete file is there."""
    before = target.stat() if target.exists() else None
    if before and not stat.S_ISREG(before.st_mode):
        raise OSError(errno.EINVAL, "the target is not a regular file")
    stem = f".nullspace-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"
    _sweep(target.parent, stem)
    temporary = target.parent / f"{stem}{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        if before:
            _inherit(temporary, before)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _sweep(directory: Path, stem: str) -> None:
    """Remove what killed saves of the same target left behind."""
    for leftover in directory.glob(f"{stem}*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE:
                leftover.unlink()


def _inherit(temporary: Path, before: os.stat_result) -> None:
    """Give `temporary` the mode of the file it replaces, and its owner if this process may."""
    if hasattr(os, "chown"):
        with contextlib.suppress(PermissionError):
            os.chown(temporary, before.st_uid, before.st_gid)
    os.chmod(temporary, stat.S_IMODE(before.st_mode))


def _sync_directory(directory: Path) -> None:
    """Make the new directory entry durable; Windows and some network file systems have no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
