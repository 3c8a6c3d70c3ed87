from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import FLOWERS, LAYOUTS, dtd, eurosat, expect_them, stanford_cars, sun397, text
from torchvision.datasets import Flowers102

from reference.config import Config
from reference.data import folders, mtil
from reference.data.__main__ import main
from reference.data.folders import natural
from reference.data.images import LazyImages, decode
from reference.data.tasks import ORDERS
from reference.errors import ExperimentError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_them(monkeypatch)


def test_the_benchmark_is_the_eleven_tasks_with_1201_classes() -> None:
    assert list(LAYOUTS) == list(ORDERS["I"]) == list(mtil.SOURCES)


@pytest.mark.skipif(not hasattr(Flowers102, "classes"), reason="torchvision has the names of the flowers from 0.22 on")
def test_the_flowers_have_torchvisions_names() -> None:
    assert list(Flowers102.classes) == list(FLOWERS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read_with_names_and_splits(name: str, tmp_path: Path) -> None:
    build, (_, train, test), names = LAYOUTS[name]
    with pytest.raises(ExperimentError, match=f"{name}: (missing|cannot be read).*lay it out as"):
        mtil.read_source(name, str(tmp_path))
    build(tmp_path)
    found = mtil.read_source(name, str(tmp_path))
    assert found.class_names == names
    assert (len(found.train[1]), len(found.test[1])) == (train, test)
    everything = [str(s) for s in found.train[0] + found.test[0]]
    assert len(set(everything)) == train + test or name in ("cifar100", "mnist")
    assert decode(found.train[0][0], 8).shape == (3, 8, 8)


def test_labels_follow_their_images(tmp_path: Path) -> None:
    sun397(tmp_path)
    found = mtil.read_source("sun397", str(tmp_path))
    for paths, labels in (found.train, found.test):
        assert ["outdoor" in path for path in paths] == [label == 1 for label in labels]
    stanford_cars(tmp_path)
    assert mtil.read_source("stanford_cars", str(tmp_path)).train[1] == [0, 1, 0]


def test_unofficial_splits_are_the_random_split_of_seed_42(tmp_path: Path) -> None:
    eurosat(tmp_path)
    found = mtil.read_source("eurosat", str(tmp_path))
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    assert [int(label * 5 + int(Path(p).stem[-1])) for p, label in zip(*found.train)] == expected[:8]


def test_a_wrong_count_and_a_missing_file_are_named(tmp_path: Path) -> None:
    dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "images" / "banded" / "train0.jpg").unlink()
    with pytest.raises(ExperimentError, match=r"dtd: image .*train0\.jpg is listed but missing"):
        mtil.read_source("dtd", str(tmp_path))
    text(tmp_path / "dtd" / "dtd" / "labels" / "test1.txt", "banded/test0.jpg")
    with pytest.raises(
        ExperimentError, match="dtd: wrong count, found 2 classes, 3 train and 1 test images, expected 2, 3 and 2"
    ):
        mtil.read_source("dtd", str(tmp_path))


def test_the_check_names_every_set_and_fails_if_one_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (build, *_) in LAYOUTS.items():
        if name != "stanford_cars":
            build(tmp_path)
    assert main(["check", "--data-root", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and sum(line.endswith("found") for line in lines) == 10
    assert "missing; get it: by hand" in next(line for line in lines if line.startswith("stanford_cars"))
    stanford_cars(tmp_path)
    assert main(["check", "--data-root", str(tmp_path), "--decode"]) == 0
    (tmp_path / "eurosat" / "2750" / "SeaLake" / "SeaLake_2.jpg").write_bytes(b"no image")
    assert main(["check", "--data-root", str(tmp_path), "--decode"]) == 1
    assert "SeaLake_2.jpg is missing or cannot be decoded" in capsys.readouterr().out


def test_tasks_decode_when_indexed_and_all_missing_sets_are_named_at_once(tmp_path: Path) -> None:
    config = Config("paper", "o", data_root=str(tmp_path), model="m", source="torchvision", tasks=("dtd", "sun397"))
    with pytest.raises(ExperimentError, match=r"(?s)2 data sets .* dtd: missing.* sun397: missing"):
        folders.load_sources(config, 8)
    dtd(tmp_path), sun397(tmp_path)
    task = folders.load_sources(config, 8)[0]
    assert isinstance(task.train.images, LazyImages)
    assert task.train.images[torch.tensor([2, 0])].shape == (2, 3, 8, 8)
    assert len(task.train.drawn(2, seed=0)) == 2 and task.train.drawn(2, seed=0).images[:].shape == (2, 3, 8, 8)
    banded = tmp_path / "dtd" / "dtd" / "images" / "banded" / "train0.jpg"
    banded.write_bytes(b"no image")
    with pytest.raises(ExperimentError, match=r"task dtd: image .*train0\.jpg is missing or cannot be decoded"):
        task.train.images[:]
    validation = folders.load_sources(replace(config, split="validation", tasks=("sun397",)), 8)[0]
    assert (len(validation.train), len(validation.test)) == (6, 2)
    kept, held = ([natural(path) for path in part.images.sources] for part in (validation.train, validation.test))
    for label in validation.test.labels.unique():  # the last of each class by file name
        mine = [path for path, c in zip(kept, validation.train.labels) if c == label]
        last = [path for path, c in zip(held, validation.test.labels) if c == label]
        assert max(mine) < min(last)
    arrays, labels = [np.full((8, 8), n, dtype=np.uint8) for n in range(11)], list(range(11))
    assert [part[1] for part in folders._without_last(arrays, labels)] == [[0, 1, 2, 3, 5, 6, 7, 8, 10], [4, 9]]
