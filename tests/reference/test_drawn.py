"""A reference pool of photographs and drawn print, as the reference runs read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference.config import Config
from reference.data import drawn
from reference.data.folders import load_reference_pool


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A pool of five plain pictures."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(folder / f"{number}.png")
    lines = [f"{number}.png,a photo of thing {number}." for number in range(5)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *lines]) + "\n")
    return folder


def made(photographs: Path, output: Path, *more: str) -> int:
    return drawn.main(["--reference-root", str(photographs), "--output", str(output), *more])


def test_a_pool_holds_photographs_and_print_with_their_captions(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(photographs, tmp_path / "pool", "--photographs", "3", "--drawings", "8") == 0
    assert "--set reference_images=11" in capsys.readouterr().out
    settings = Config("mini", "o", "d", "m", reference_root=str(tmp_path / "pool"), reference_images=11)
    pool = load_reference_pool(settings, size=32)
    kinds = sorted(caption.split()[1] for caption in pool.captions)
    assert kinds == ["letter"] * 4 + ["number"] * 2 + ["photo"] * 3 + ["word"] * 2
    by_caption = dict(zip(pool.captions, pool.images))
    source = load_reference_pool(Config("mini", "o", "d", "m", reference_root=str(photographs)), size=32)
    known = dict(zip(source.captions, source.images))
    kept = [caption for caption in pool.captions if "photo" in caption]
    assert all(torch.equal(by_caption[caption], known[caption]) for caption in kept)
    assert all(image.float().std() > 5 for caption, image in by_caption.items() if "photo" not in caption)


def test_the_pool_may_be_moved_and_needs_the_photographs_no_more(photographs: Path, tmp_path: Path) -> None:
    assert made(photographs, tmp_path / "pool", "--drawings", "2") == 0
    shutil.rmtree(photographs)
    (tmp_path / "pool").rename(tmp_path / "elsewhere")
    settings = Config("mini", "o", "d", "m", reference_root=str(tmp_path / "elsewhere"), reference_images=7)
    assert len(load_reference_pool(settings, size=32).captions) == 7


def test_a_missing_photograph_is_named(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photographs / "3.png").unlink()
    assert made(photographs, tmp_path / "pool") == 2
    assert "3.png is listed in captions.csv of --reference-root, but is no file" in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


def test_the_same_numbers_draw_the_same_pool(photographs: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "once", tmp_path / "again"]
    assert [made(photographs, folder, "--drawings", "6") for folder in folders] == [0, 0]
    files = [{path.name: path.read_bytes() for path in folder.rglob("*.*")} for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 6 + 5 + len(["captions.csv"])


@pytest.mark.parametrize("font", drawn._LISTED["fonts"])
def test_every_font_has_every_character(font: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A font without a character draws the same box for each."""
    seen = set()
    for character in drawn.string.digits + drawn.string.ascii_letters:
        monkeypatch.setitem(drawn._LISTED, "fonts", [font])
        monkeypatch.setattr(drawn.string, "digits", character)
        picture, caption = drawn.draw(0, np.random.default_rng(3))
        assert caption == f'the number "{character}".'
        seen.add(picture.tobytes())
    assert len(seen) == 62


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--photographs", "0"), "must be at least 1"), (("--drawings", "-1"), "must be at least 1")],
)
def test_bad_numbers_are_refused(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], message: str
) -> None:
    assert made(photographs, tmp_path / "pool", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "pool").exists()


def test_a_missing_pool_and_a_folder_that_cannot_be_written_are_named(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(tmp_path / "none", tmp_path / "pool") == 2
    assert "holds no captions.csv" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert made(photographs, tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().err
