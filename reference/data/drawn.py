"""Print that is drawn, with captions: digits, letters and words in many fonts and colours.

A pool of photographs shows none, and what a pool does not show is not protected. No image of any task is read. Beside
photographs of a reference pool:

    python -m reference.data.drawn --reference-root DIR --output DIR
"""

from __future__ import annotations

import argparse
import csv
import shutil
import string
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from reference.command import carried_out
from reference.data.folders import captioned
from reference.errors import ExperimentError
from reference.training.tracking import writing

SIDE = 224  # pixels

_LISTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def write_pool(options: argparse.Namespace) -> None:
    """Draw print into the folder `output`, beside copies of photographs of a reference pool, with a `captions.csv`.

    Raises:
        ExperimentError: there is no such pool, a number is too small, or `output` cannot be written.
    """
    if min(options.photographs, options.drawings) < 1:
        raise ExperimentError("--photographs and --drawings must be at least 1")
    pool = captioned(options.reference_root, options.photographs)
    if missing := [file for file, _ in pool if not file.is_file()]:
        raise ExperimentError(f"{missing[0]} is listed in captions.csv of --reference-root, but is no file")
    rows, folder, random = [("file", "caption")], Path(options.output), np.random.default_rng(0)
    with writing(folder / "captions.csv") as draft:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number, (file, caption) in enumerate(pool):
            rows.append((f"images/photograph-{number}{file.suffix}", caption))
            shutil.copyfile(file, folder / rows[-1][0])
        for number in range(options.drawings):
            picture, caption = draw(number, random)
            picture.save(folder / "images" / f"{number}.png")
            rows.append((f"images/{number}.png", caption))
        with draft.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)
    print(f"{folder}: give it as --reference-root with --set reference_images={len(rows) - 1}")


def draw(number: int, random: Generator) -> tuple[Image.Image, str]:
    """Picture `number` and its caption: of four, one is a digit, two are letters and one a word.

    It is as large as the picture bears, somewhat turned, sheared, thickened and blurred; half are in black and white.
    """
    listed = {"number": string.digits, "letter": string.ascii_letters, "word": _LISTED["words"]}
    kind = ("number", "letter", "letter", "word")[number % 4]
    text = str(random.choice(list(listed[kind])))
    ink, paper = random.choice(_LISTED["colours"][: 2 if random.random() < 0.5 else None], 2, replace=False)
    size = SIDE * random.uniform(0.5, 0.95) / max(1, 0.6 * len(text))
    font = ImageFont.truetype(str(_FONTS / f"{random.choice(_LISTED['fonts'])}.ttf"), round(size))
    middle, stroke = tuple(SIDE * random.uniform(0.4, 0.6, 2)), round(size * random.uniform(0, 0.05))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    ImageDraw.Draw(image).text(middle, text, ink, font, anchor="mm", stroke_width=stroke, stroke_fill=ink)
    shear, smooth = random.uniform(-0.25, 0.25), Image.Resampling.BICUBIC
    matrix = (1, shear, -shear * SIDE / 2, 0, 1, 0)
    slanted = image.transform(image.size, Image.Transform.AFFINE, matrix, smooth, fillcolor=paper)
    turned = slanted.rotate(random.uniform(-15, 15), smooth, fillcolor=paper)
    return turned.filter(ImageFilter.GaussianBlur(random.uniform(0, SIDE / 50))), f'the {kind} "{text}".'


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a reference pool of photographs and drawn print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m reference.data.drawn", description=main.__doc__)
    parser.add_argument("--reference-root", required=True, help="pool of photographs: a folder with captions.csv")
    parser.add_argument("--output", required=True, help="folder of the new pool")
    parser.add_argument("--photographs", type=int, default=1000)
    parser.add_argument("--drawings", type=int, default=200)
    return carried_out(lambda: write_pool(parser.parse_args(arguments)), str)


if __name__ == "__main__":
    sys.exit(main())
