"""Tiny folders laid out as torchvision lays each data set out."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR100, MNIST, Flowers102

from reference import data, sources
from reference.config import Config
from reference.errors import ExperimentError
from reference.images import LazyImages, decode
from reference.tasks import ORDERS


def image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade, 0, 0)).save(path)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    text(base / "variants.txt", "707-320", "A300")
    for part, names in (("train", ("1", "2", "3")), ("test", ("4", "5"))):
        text(base / f"images_variant_{part}.txt", *(f"{n} {'A300' if n == '2' else '707-320'}" for n in names))
        for n in names:
            image(base / "images" / f"{n}.jpg")


def caltech101(root: Path) -> None:
    for label, count in (("BACKGROUND_Google", 1), ("Faces_easy", 5), ("accordion", 5)):
        for n in range(count):
            image(root / "caltech101" / "101_ObjectCategories" / label / f"image_{n + 1:04d}.jpg")


def cifar100(root: Path) -> None:
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    for part, count in (("train", 3), ("test", 2)):
        rows = {"data": np.zeros((count, 3072), np.uint8), "fine_labels": [n % 2 for n in range(count)]}
        (base / part).write_bytes(pickle.dumps(rows))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "aquarium_fish"]}))


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    for part, count in (("train", 3), ("test", 2)):
        text(base / "labels" / f"{part}1.txt", *(f"{('banded', 'dotted')[n % 2]}/{part}{n}.jpg" for n in range(count)))
        for n in range(count):
            image(base / "images" / ("banded", "dotted")[n % 2] / f"{part}{n}.jpg")


def eurosat(root: Path) -> None:
    for label in ("AnnualCrop", "SeaLake"):
        for n in range(5):
            image(root / "eurosat" / "2750" / label / f"{label}_{n}.jpg")


def flowers102(root: Path) -> None:
    base = root / "flowers-102"
    for n in range(1, 6):
        image(base / "jpg" / f"image_{n:05d}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1]])})
    scipy.io.savemat(
        base / "setid.mat", {"trnid": np.array([[1, 2, 3]]), "valid": np.array([[1, 2]]), "tstid": np.array([[4, 5]])}
    )


def food101(root: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part, count in (("train", 3), ("test", 2)):
        listed: dict[str, list[str]] = {"apple_pie": [], "baby_back_ribs": []}
        for n in range(count):
            label = list(listed)[n % 2]
            listed[label].append(f"{label}/{part}{n}")
            image(base / "images" / label / f"{part}{n}.jpg")
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))


def mnist(root: Path) -> None:
    base = root / "MNIST" / "raw"
    base.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        (base / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + bytes(784 * count))
        (base / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))


def oxford_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for part, names in (
        ("trainval", ("Abyssinian_1", "Bengal_2", "Abyssinian_3")),
        ("test", ("Abyssinian_4", "Bengal_5")),
    ):
        text(base / "annotations" / f"{part}.txt", *(f"{n} {1 if n[0] == 'A' else 2} 1 1" for n in names))
        for n in names:
            image(base / "images" / f"{n}.jpg")


def stanford_cars(root: Path) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, count, place in (
        ("train", 3, "devkit/cars_train_annos.mat"),
        ("test", 2, "cars_test_annos_withlabels.mat"),
    ):
        rows = np.array([(f"{n}.jpg", n % 2 + 1) for n in range(count)], dtype=[("fname", "O"), ("class", "O")])
        scipy.io.savemat(base / place, {"annotations": rows})
        for n in range(count):
            image(base / f"cars_{part}" / f"{n}.jpg")


def sun397(root: Path) -> None:
    base = root / "SUN397"
    text(base / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    for label in ("abbey", "apartment_building/outdoor"):
        for n in range(5):
            image(base / "a" / label / f"sun_{n}.jpg")


LAYOUTS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int], tuple[str, ...]]] = {
    "aircraft": (aircraft, (2, 3, 2), ("707-320", "A300")),
    "caltech101": (caltech101, (2, 8, 2), ("Faces easy", "accordion")),
    "cifar100": (cifar100, (2, 3, 2), ("apple", "aquarium fish")),
    "dtd": (dtd, (2, 3, 2), ("banded", "dotted")),
    "eurosat": (eurosat, (2, 8, 2), ("annual crop land", "lake or sea")),
    "flowers102": (flowers102, (102, 3, 2), tuple(Flowers102.classes)),
    "food101": (food101, (2, 3, 2), ("apple pie", "baby back ribs")),
    "mnist": (mnist, (10, 3, 2), tuple(MNIST.classes)),
    "oxford_pets": (oxford_pets, (2, 3, 2), ("Abyssinian", "Bengal")),
    "stanford_cars": (stanford_cars, (2, 3, 2), ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")),
    "sun397": (sun397, (2, 8, 2), ("abbey", "apartment building outdoor")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of the fake folders; checksums of archives that are not the real ones pass."""
    for name, (_, (classes, train, test), _) in LAYOUTS.items():
        monkeypatch.setitem(
            sources.SOURCES, name, replace(sources.SOURCES[name], classes=classes, train=train, test=test)
        )
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )


def test_the_benchmark_is_the_eleven_tasks_with_1201_classes() -> None:
    assert list(LAYOUTS) == list(ORDERS["I"]) == list(sources.SOURCES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read_with_names_and_splits(name: str, tmp_path: Path) -> None:
    build, (_, train, test), names = LAYOUTS[name]
    with pytest.raises(ExperimentError, match=f"{name}: (missing|cannot be read).*lay it out as"):
        sources.read_source(name, str(tmp_path))
    build(tmp_path)
    found = sources.read_source(name, str(tmp_path))
    assert found.class_names == names
    assert (len(found.train[1]), len(found.test[1])) == (train, test)
    everything = [str(s) for s in found.train[0] + found.test[0]]
    assert len(set(everything)) == train + test or name in ("cifar100", "mnist")
    assert decode(found.train[0][0], 8).shape == (3, 8, 8)


def test_labels_follow_their_images(tmp_path: Path) -> None:
    sun397(tmp_path)
    found = sources.read_source("sun397", str(tmp_path))
    for paths, labels in (found.train, found.test):
        assert ["outdoor" in path for path in paths] == [label == 1 for label in labels]
    stanford_cars(tmp_path)
    assert sources.read_source("stanford_cars", str(tmp_path)).train[1] == [0, 1, 0]


def test_unofficial_splits_are_the_random_split_of_seed_42(tmp_path: Path) -> None:
    eurosat(tmp_path)
    found = sources.read_source("eurosat", str(tmp_path))
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    assert [int(label * 5 + int(Path(p).stem[-1])) for p, label in zip(*found.train)] == expected[:8]


def test_a_wrong_count_and_a_missing_file_are_named(tmp_path: Path) -> None:
    dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "images" / "banded" / "train0.jpg").unlink()
    with pytest.raises(ExperimentError, match=r"dtd: image .*train0\.jpg is listed but missing"):
        sources.read_source("dtd", str(tmp_path))
    text(tmp_path / "dtd" / "dtd" / "labels" / "test1.txt", "banded/test0.jpg")
    with pytest.raises(
        ExperimentError, match="dtd: wrong count, found 2 classes, 3 train and 1 test images, expected 2, 3 and 2"
    ):
        sources.read_source("dtd", str(tmp_path))


def test_the_check_names_every_set_and_fails_if_one_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (build, *_) in LAYOUTS.items():
        if name != "stanford_cars":
            build(tmp_path)
    assert data.main(["check", "--data-root", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and sum(line.endswith("found") for line in lines) == 10
    assert "missing; get it: by hand" in next(line for line in lines if line.startswith("stanford_cars"))
    stanford_cars(tmp_path)
    assert data.main(["check", "--data-root", str(tmp_path), "--decode"]) == 0
    (tmp_path / "eurosat" / "2750" / "SeaLake" / "SeaLake_2.jpg").write_bytes(b"no image")
    assert data.main(["check", "--data-root", str(tmp_path), "--decode"]) == 1
    assert "SeaLake_2.jpg is missing or cannot be decoded" in capsys.readouterr().out


def test_tasks_decode_when_indexed_and_all_missing_sets_are_named_at_once(tmp_path: Path) -> None:
    config = Config("paper", "o", data_root=str(tmp_path), model="m", source="torchvision", tasks=("dtd", "sun397"))
    with pytest.raises(ExperimentError, match=r"(?s)2 data sets .* dtd: missing.* sun397: missing"):
        data.load_sources(config, 8)
    dtd(tmp_path), sun397(tmp_path)
    task = data.load_sources(config, 8)[0]
    assert isinstance(task.train.images, LazyImages)
    assert task.train.images[torch.tensor([2, 0])].shape == (2, 3, 8, 8)
    assert len(task.train.drawn(2, seed=0)) == 2 and task.train.drawn(2, seed=0).images[:].shape == (2, 3, 8, 8)
    validation = data.load_sources(replace(config, split="validation", tasks=("sun397",)), 8)[0]
    assert (len(validation.train), len(validation.test)) == (7, 1)
