"""Tiny folders laid out as torchvision lays each MTIL data set out."""

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
import yaml
from PIL import Image
from torchvision.datasets import CIFAR100, MNIST

from reference.data import mtil


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


FLOWERS = tuple(yaml.safe_load(mtil.CLASSES.read_text(encoding="utf-8"))["flowers102"].values())
LAYOUTS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int], tuple[str, ...]]] = {
    "aircraft": (aircraft, (2, 3, 2), ("707-320", "A300")),
    "caltech101": (caltech101, (2, 8, 2), ("Faces easy", "accordion")),
    "cifar100": (cifar100, (2, 3, 2), ("apple", "aquarium fish")),
    "dtd": (dtd, (2, 3, 2), ("banded", "dotted")),
    "eurosat": (eurosat, (2, 8, 2), ("annual crop land", "lake or sea")),
    "flowers102": (flowers102, (102, 3, 2), FLOWERS),
    "food101": (food101, (2, 3, 2), ("apple pie", "baby back ribs")),
    "mnist": (mnist, (10, 3, 2), tuple(MNIST.classes)),
    "oxford_pets": (oxford_pets, (2, 3, 2), ("Abyssinian", "Bengal")),
    "stanford_cars": (stanford_cars, (2, 3, 2), ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")),
    "sun397": (sun397, (2, 8, 2), ("abbey", "apartment building outdoor")),
}  # fmt: skip


def expect_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the counts be those of the tiny folders; checksums of archives that are not the real ones pass."""
    for name, (_, (classes, train, test), _) in LAYOUTS.items():
        monkeypatch.setitem(mtil.SOURCES, name, replace(mtil.SOURCES[name], classes=classes, train=train, test=test))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )
