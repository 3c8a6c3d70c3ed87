from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from reference.config import Config
from reference.data.__main__ import main
from reference.data.folders import held_back, load_reference_pool, load_tasks, natural
from reference.errors import ExperimentError

DATA = Path(os.environ.get("NULLSPACE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 11), ("test", 2)):
        for label, colour in (("deep_red", (200, 0, 0)), ("blue", (0, 0, 200))):
            folder = tmp_path / "paint" / part / label
            folder.mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (12 + n, 10), colour).save(folder / f"{n}.jpg")
    return tmp_path


def config(root: Path, **settings: object) -> Config:
    return Config(preset="mini", output="o", model="m", data_root=str(root), tasks=("paint",), **settings)  # type: ignore[arg-type]


def test_a_task_is_read_from_folders(root: Path) -> None:
    (task,) = load_tasks(config(root), size=8)
    assert task.class_names == ("blue", "deep red") and task.prompts() == [
        "a photo of a blue.",
        "a photo of a deep red.",
    ]
    assert task.train.images.shape == (22, 3, 8, 8) and len(task.test) == 4


def test_validation_is_the_last_fifth_in_natural_order() -> None:
    assert sorted(["10.jpg", "9.jpg", "2.jpg"], key=natural) == ["2.jpg", "9.jpg", "10.jpg"]
    kept, validation = held_back([(f"{n}.jpg", 0) for n in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)])
    assert [path for path, _ in validation] == ["9.jpg", "10.jpg"] and len(kept) == 8


def test_validation_split_never_touches_the_test_folder(root: Path) -> None:
    (task,) = load_tasks(config(root, split="validation"), size=8)
    assert (len(task.train), len(task.test)) == (18, 4)


@pytest.mark.fault(118)
def test_a_corrupt_image_is_named(root: Path) -> None:
    (root / "paint" / "train" / "blue" / "3.jpg").write_bytes(b"no image")
    with pytest.raises(ExperimentError, match=r"3\.jpg is missing or cannot be decoded"):
        load_tasks(config(root), size=8)


@pytest.mark.fault(118)
def test_a_missing_folder_is_named(root: Path) -> None:
    with pytest.raises(ExperimentError, match=r"is not a folder.*--data-root"):
        load_tasks(config(root / "nowhere"), size=8)
    (root / "paint" / "test").rename(root / "paint" / "tset")
    with pytest.raises(ExperimentError, match="paint/test is missing"):
        load_tasks(config(root), size=8)


@pytest.mark.fault(118)
def test_classes_that_differ_are_named(root: Path) -> None:
    (root / "paint" / "test" / "blue").rename(root / "paint" / "test" / "green")
    with pytest.raises(ExperimentError, match="blue, green"):
        load_tasks(config(root), size=8)


@pytest.mark.fault(118)
def test_an_unknown_task_lists_the_folders(root: Path) -> None:
    with pytest.raises(ExperimentError, match="choose from paint"):
        load_tasks(Config(preset="mini", output="o", model="m", data_root=str(root), tasks=("pain",)), size=8)


def test_a_missing_reference_pool_says_the_way_out(root: Path) -> None:
    with pytest.raises(ExperimentError, match="--reference-root"):
        load_reference_pool(config(root), size=8)


def test_a_row_without_a_caption_is_named(root: Path) -> None:
    (root / "captions.csv").write_text("file,caption\na.jpg,a cat\nb.jpg\n")
    settings = Config(preset="mini", output="o", model="m", data_root=str(root), reference_root=str(root))
    with pytest.raises(ExperimentError, match=r"captions\.csv, row 3: file or caption is missing"):
        load_reference_pool(settings, size=8)


@pytest.mark.skipif(not (DATA / "mtil-mini").is_dir(), reason="real images not found: set NULLSPACE_DATA")
def test_real_tasks_are_read() -> None:
    settings = Config(preset="mini", output="o", model="m", data_root=str(DATA / "mtil-mini"), tasks=("oxford_pets",))
    (task,) = load_tasks(settings, size=64)
    assert (len(task.class_names), len(task.train), len(task.test)) == (37, 367, 108)


def test_a_task_may_describe_itself(root: Path) -> None:
    (root / "paint" / "task.yaml").write_text(
        "templates: ['{} paint', 'the {} paint']\nclass_names: {deep_red: crimson}\n"
    )
    (task,) = load_tasks(config(root), size=8)
    assert task.prompts(1) == ["the blue paint", "the crimson paint"]
    for text, message in (("templates: [paint]", "in place of the class name"), ("class_names: [a]", "must map")):
        (root / "paint" / "task.yaml").write_text(text)
        with pytest.raises(ExperimentError, match=message):
            load_tasks(config(root), size=8)


def test_a_folder_of_other_tasks_is_a_benchmark_of_its_own(root: Path) -> None:
    (task,) = load_tasks(Config(preset="mini", output="o", model="m", data_root=str(root)), size=8)
    assert task.name == "paint" and main(["check", "--data-root", str(root)]) == 0
