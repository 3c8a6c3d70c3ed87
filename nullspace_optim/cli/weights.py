"""Weights in safetensors files, read tensor by tensor; nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors
from safetensors import SafetensorError
from torch import Tensor

from ..errors import BasisFileError
from ..model.names import canonical_names

SINGLE = ("open_clip_model.safetensors", "model.safetensors", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Weights(Mapping[str, Tensor]):
    """The tensors of a safetensors file or of a folder with one or several, by canonical name; read on access."""

    def __init__(self, path: Path, rename: Callable[[str], str] = lambda name: name) -> None:
        """Read the headers of the files at `path`.

        Raises:
            BasisFileError: no safetensors file is there, one is damaged, or a name stands for two tensors.
            OSError: a file cannot be read.
        """
        self.path = path
        self._places: dict[str, tuple[Path, str]] = {}
        for file in _files(path):
            for key, short in canonical_names(_keys(file)).items():
                name = rename(short)
                if name in self._places:
                    raise BasisFileError(f"{_shown(path)}: two tensors are called {name!a}; check --rename")
                self._places[name] = file, key
        prefix = "module."  # as DistributedDataParallel saves
        if self._places and all(name.startswith(prefix) for name in self._places):
            self._places = {name[len(prefix) :]: place for name, place in self._places.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        with safetensors.safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _shown(path: Path) -> str:
    return ascii(str(path))


def _files(path: Path) -> list[Path]:
    """Return the safetensors files that `path` stands for."""
    if not path.is_dir():
        path.stat()  # the error of the system names the file
        if path.suffix in PICKLED:
            raise BasisFileError(f"{_shown(path)}: a pickle, which is never read; save the weights as safetensors")
        return [path]
    if (path / INDEX).is_file():
        return _indexed(path)
    single = next((path / name for name in SINGLE if (path / name).is_file()), None)
    files = [single] if single else sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        found = f"only {', '.join(map(ascii, others[:3]))}, pickles, which are never read" if others else "none"
        raise BasisFileError(f"{_shown(path)}: expected a folder with safetensors files, found {found}")
    return files


def _indexed(folder: Path) -> list[Path]:
    """Return the files that the index of a sharded checkpoint lists."""
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BasisFileError(f"{_shown(folder / INDEX)}: not an index of safetensors files ({error!r})") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise BasisFileError(f"{_shown(folder / INDEX)}: it lists files outside its own folder")
    return [folder / name for name in sorted(names)]


def _keys(file: Path) -> list[str]:
    file.stat()
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise BasisFileError(f"{_shown(file)}: not a safetensors file, or a damaged one ({error})") from error
