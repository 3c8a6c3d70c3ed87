"""The demo's data and model: nothing is downloaded.

Six tasks of different kinds, 32 x 32 pixels, rendered with PIL and numpy or taken from what scikit-learn ships, and a
tiny CLIP of open_clip that is first trained on the same class names in *another style* (other fonts, positions, noise
and contrast), as a pretrained model knows the classes of a new data set without knowing its images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from reference.config import Config
from reference.data.folders import ReferencePool
from reference.data.tasks import Split, Task, chosen

SIZE = 32
TRAIN, TEST, PRETRAIN = 400, 200, 400  # images per task
Pixels = NDArray[Any]  # `[32, 32, 3]`, floats 0..1

_LISTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
CLASSES: dict[str, tuple[str, Sequence[str]]] = {
    name: (listed["prompt"], tuple(listed["labels"])) for name, listed in _LISTED["classes"].items()
}
ORDER = {order: tuple(names) for order, names in _LISTED["order"].items()}
DIGITS = CLASSES["digits"][1]


def tasks(config: Config) -> list[Task]:
    """The tasks of the configuration, rendered; `split=validation` tests on the last fifth of the training images."""
    names = chosen(config.tasks, ORDER[config.order])
    return [_task(name, config.split == "validation") for name in names]


def pretraining_task() -> Task:
    """All classes of all tasks in one task, in the style of pretraining; its class names are whole sentences."""
    sentences = [template.format(label) for template, labels in CLASSES.values() for label in labels]
    parts, first = [], 0
    for number, (name, (_, labels)) in enumerate(CLASSES.items()):
        part = _render(name, PRETRAIN, np.random.default_rng([1, number]), pretraining=True)
        parts.append(Split(part.images, part.labels + first))
        first += len(labels)
    split = Split(torch.cat([p.images[:] for p in parts]), torch.cat([p.labels for p in parts]))
    return Task("pretraining", tuple(sentences), ("{}",), split, split)


def reference_pool(pretraining: Task, count: int) -> ReferencePool:
    """`count` pretraining images with their captions."""
    drawn = pretraining.train.drawn(count, seed=0)
    return ReferencePool(drawn.images[:], tuple(pretraining.class_names[label] for label in drawn.labels.tolist()))


def _task(name: str, validation: bool) -> Task:
    template, labels = CLASSES[name]
    number = list(CLASSES).index(name)
    training = _digits() if name == "digits" else _render(name, TRAIN + TEST, np.random.default_rng([0, number]))
    kept, test = _cut(training, TRAIN)
    if validation:
        kept, test = _cut(kept, TRAIN * 4 // 5)
    return Task(name, tuple(labels), (template,), kept, test)


def _cut(split: Split, at: int) -> tuple[Split, Split]:
    return Split(split.images[:at], split.labels[:at]), Split(split.images[at:], split.labels[at:])


def _digits() -> Split:
    """Handwritten digits of scikit-learn (8 x 8 pixels), enlarged."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: TRAIN + TEST]
    grey = torch.tensor(images[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    large = torch.nn.functional.interpolate(grey, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1)
    return Split((large * 255).round().to(torch.uint8).contiguous(), torch.tensor(labels[order], dtype=torch.int64))


def _render(name: str, count: int, random: Generator, pretraining: bool = False) -> Split:
    labels = CLASSES[name][1]
    numbers = random.permutation(np.arange(count) % len(labels))
    draw = RENDERERS[name]
    pixels = np.stack([draw(labels[n], random, pretraining) for n in numbers])
    if pretraining:
        pixels = (pixels - 0.5) * random.uniform(0.6, 1.0, (count, 1, 1, 1)) + random.normal(0.5, 0.05, pixels.shape)
    images = torch.tensor((pixels.clip(0, 1) * 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(numbers, dtype=torch.int64))


def _ink(random: Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours: light paper and dark ink."""
    return tuple(random.integers(140, 256, 3).tolist()), tuple(random.integers(0, 100, 3).tolist())


def _floats(image: Image.Image) -> Pixels:
    return np.asarray(image, np.float32) / 255


def _shape(label: str, random: Generator, pretraining: bool) -> Pixels:
    """A filled figure in varying colour, size and place; pretraining has it in grey and nearly in the middle."""
    paper, ink = ((200, 200, 200), (40, 40, 40)) if pretraining else _ink(random)
    image = Image.new("RGB", (SIZE, SIZE), paper)
    pen = ImageDraw.Draw(image)
    radius = random.uniform(10, 13) if pretraining else random.uniform(7, 11)
    x, y = SIZE / 2 + random.uniform(-1, 1, 2) * (1 if pretraining else 4)
    box = (x - radius, y - radius, x + radius, y + radius)
    thin = radius / 3
    if label in ("circle", "ring"):
        pen.ellipse(box, fill=ink if label == "circle" else None, outline=ink, width=max(2, round(thin)))
    elif label == "square":
        pen.rectangle(box, fill=ink)
    elif label in ("cross", "bar"):
        pen.rectangle((x - radius, y - thin, x + radius, y + thin), fill=ink)
        if label == "cross":
            pen.rectangle((x - thin, y - radius, x + thin, y + radius), fill=ink)
    else:
        corners = {"triangle": 3, "diamond": 4, "star": 10}[label]
        inner = 0.45 if label == "star" else 1.0
        angles = -np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
        reach = radius * np.where(np.arange(corners) % 2 == 0, 1.0, inner)
        pen.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(reach, angles)], fill=ink)
    return _floats(image)


def _glyph(text: str, fonts: Sequence[str], random: Generator, pretraining: bool) -> Pixels:
    """One character in a font that matplotlib ships, turned a little."""
    paper, ink = ((230, 230, 230), (20, 20, 20)) if pretraining else _ink(random)
    image = Image.new("RGB", (SIZE, SIZE), paper)
    name = f"{fonts[int(random.integers(len(fonts)))]}.ttf"
    font = ImageFont.truetype(str(_FONTS / name), int(random.integers(24, 30)))
    place = tuple(SIZE / 2 + random.uniform(-2, 2, 2))
    ImageDraw.Draw(image).text(place, text, fill=ink, font=font, anchor="mm")
    return _floats(image.rotate(random.uniform(-8, 8), fillcolor=paper))


def _letter(label: str, random: Generator, pretraining: bool) -> Pixels:
    fonts = ("DejaVuSans",) if pretraining else ("DejaVuSerif-Bold", "STIXGeneral")
    return _glyph(label, fonts, random, pretraining)


def _digit(label: str, random: Generator, pretraining: bool) -> Pixels:
    return 1 - _glyph(str(DIGITS.index(label)), ("DejaVuSans", "DejaVuSerif"), random, pretraining)


def _colour(label: str, random: Generator, pretraining: bool) -> Pixels:
    """A plain patch in pretraining; speckled and unevenly lit in the task."""
    patch: Pixels = np.tile(np.array(_LISTED["colours"][label], np.float32), (SIZE, SIZE, 1))
    if pretraining:
        return patch
    light = np.linspace(random.uniform(0.3, 1), random.uniform(0.3, 1), SIZE)[:, None, None]
    return patch * light + random.normal(0, 0.25, (SIZE, SIZE, 1))


def _texture(label: str, random: Generator, pretraining: bool) -> Pixels:
    """A periodic pattern; fine and coloured in the task, coarse and grey in pretraining."""
    y, x = np.mgrid[:SIZE, :SIZE] + random.uniform(0, SIZE, (2, 1, 1))
    k = 2 * np.pi / (random.uniform(9, 12) if pretraining else random.uniform(4, 8))
    centre = np.hypot(x - x.mean() + random.uniform(-6, 6), y - y.mean() + random.uniform(-6, 6))
    waves = {
        "horizontal": np.sin(k * y), "vertical": np.sin(k * x), "rising": np.sin(k * (x + y) * 0.7),
        "falling": np.sin(k * (x - y) * 0.7), "chequered": np.sign(np.sin(k * x) * np.sin(k * y)),
        "dotted": np.where(np.sin(k * x) + np.sin(k * y) > 1.0, 1.0, -1.0), "concentric": np.sin(k * centre),
        "grainy": random.normal(0, 0.7, (SIZE, SIZE)),
    }  # fmt: skip
    tint = np.ones(3) if pretraining else random.uniform(0.2, 1, 3)
    return 0.5 + 0.45 * waves[label][:, :, None] * tint


def _photograph(label: str, random: Generator, pretraining: bool) -> Pixels:
    """A crop of one of scikit-learn's two sample photographs, treated; small and grey crops in pretraining."""
    treatment, subject = label.split()
    photo = _PHOTOS[("temple", "flower").index(subject)]
    side = int(random.integers(60, 120) if pretraining else random.integers(160, 400))
    left, top = int(random.integers(0, photo.width - side)), int(random.integers(0, photo.height - side))
    crop = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
    if treatment == "blurred":
        crop = crop.filter(ImageFilter.GaussianBlur(2))
    pixels = _floats(crop) * (0.35 if treatment == "dark" else 1.0)
    return pixels.mean(axis=2, keepdims=True).repeat(3, axis=2) if pretraining else pixels


_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]
RENDERERS: dict[str, Callable[[str, Generator, bool], Pixels]] = {
    "digits": _digit,
    "shapes": _shape,
    "colours": _colour,
    "textures": _texture,
    "letters": _letter,
    "photographs": _photograph,
}
