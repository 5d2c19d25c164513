"""The embedded data set: pictures of eight kinds of objects, rendered when asked for. No files, no network.

`EmbeddedSource` draws them without labels for pretraining, `write_folder` writes labelled ones for timm's `train.py`
(from the shell: `python -m timm_convnextv2.data.embedded FOLDER`), or with boxes and masks for detection and
segmentation (`--coco --masks`).
"""

import colorsys
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...formats.decode import check_index
from .annotations import Annotations

__all__ = ["EmbeddedSource", "write_folder"]

PRETRAINING_SEEDS = 2  # `create_source` draws the pictures of seeds 0 (train) and 1 (any other split)


class _Dice:
    """Random numbers of one picture. Uniform only: that stream is the most stable part of NumPy's generators."""

    def __init__(self, seed: int, i: int) -> None:
        self.random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, i]))).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def below(self, n: int) -> int:
        return int(n * self.random())

    def colour(self, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
        rgb = colorsys.hsv_to_rgb(hue % 1, self.uniform(*saturation), self.uniform(*value))
        return np.array(rgb, dtype=np.float32)[:, None, None]


def _box(x: np.ndarray, y: np.ndarray, w: float, h: float) -> np.ndarray:
    x, y = np.abs(x) - w, np.abs(y) - h
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)


# Shapes: signed distance, negative inside, of an object of radius about 1; `u` in [0, 1) varies its proportions.


def _disc(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    return np.hypot(x, y) - 0.85


def _ring(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.68) - (0.16 + 0.1 * u)


def _square(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    corner = 0.05 + 0.2 * u
    return _box(x, y, 0.72 - corner, 0.72 - corner) - corner


def _triangle(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    side = math.sqrt(0.75) * np.abs(x) + 0.5 * y
    return np.maximum(side, -y * (0.9 + 0.3 * u)) - 0.5


def _star(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    fold = 2 * math.pi / 5
    angle = np.arctan2(x, y) / fold
    angle = np.abs(angle - np.rint(angle)) * fold
    radius = np.hypot(x, y)
    # the straight edge from a tip (1, 0) to the notch between two tips
    notch = 0.42 + 0.16 * u
    nx, ny = notch * math.cos(fold / 2), notch * math.sin(fold / 2)
    return ((radius * np.cos(angle) - 1) * ny + radius * np.sin(angle) * (1 - nx)) / math.hypot(1 - nx, ny)


def _cross(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    width = 0.22 + 0.1 * u
    return np.minimum(_box(x, y, 0.86, width), _box(x, y, width, 0.86)) - 0.04


def _crescent(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.9, 0.62 + 0.1 * u - np.hypot(x - 0.42, y))


def _flower(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    petals = 5 + int(3 * u)
    return 0.75 * (np.hypot(x, y) - 0.72 - 0.2 * np.cos(petals * np.arctan2(y, x)))


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = dict(
    disc=_disc,
    ring=_ring,
    square=_square,
    triangle=_triangle,
    star=_star,
    cross=_cross,
    crescent=_crescent,
    flower=_flower,
)


class EmbeddedSource(Dataset):
    """The embedded data set: lit, textured objects over soft backgrounds, drawn when asked for.

    No file and no network: picture `i` is a function of `(seed, i)`. There are eight classes, the objects' shapes,
    and `label(i) = i % 8`; position, size, rotation, colours, surface, light and background vary. For demonstrations,
    tests and smoke runs; other seeds give other pictures of the same kind, for example a validation set.

    Args:
        length: Number of pictures.
        size: Height and width in pixels.
        in_chans: 3 (RGB) or 1 (luma of the same pictures).
        seed: Seed of the whole set, at least 0.
    """

    classes = tuple(_SHAPES)

    def __init__(self, length: int = 2048, size: int = 128, in_chans: int = 3, seed: int = 0) -> None:
        if in_chans not in (1, 3):
            raise ValueError(f"The embedded data set has 1 or 3 channels, got in_chans={in_chans}.")
        if length < 1 or size < 8 or seed < 0:
            raise ValueError(f"Expected length >= 1, size >= 8 and seed >= 0, got {length}, {size} and {seed}.")
        self.length, self.size, self.in_chans, self.seed = length, size, in_chans, seed

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        """Identifier of picture `i`."""
        return f"embedded {self.classes[self.label(i)]} {i}"

    def label(self, i: int) -> int:
        """Class of picture `i`, an index into `classes`."""
        return check_index(i, self.length) % len(self.classes)

    def mask(self, i: int) -> np.ndarray:
        """The pixels of picture `i` that its object covers by half or more, bool `[size, size]`."""
        return _draw(list(_SHAPES.values())[self.label(i)], _Dice(self.seed, i), self.size)[1] < 0

    def __getitem__(self, i: int) -> torch.Tensor:
        image = _render(list(_SHAPES.values())[self.label(i)], _Dice(self.seed, i), self.size)
        if self.in_chans == 1:
            image = np.tensordot(np.array([[0.299, 0.587, 0.114]], dtype=np.float32), image, axes=1)
        return torch.from_numpy((image * 255 + 0.5).astype(np.uint8))


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


_Shape = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def _render(shape: _Shape, dice: _Dice, size: int) -> np.ndarray:
    """Draws one picture, float32 `[3, size, size]` in [0, 1]."""
    return _draw(shape, dice, size)[0]


def _draw(shape: _Shape, dice: _Dice, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One picture and the signed distance from its object's edge, `[size, size]`, negative inside.

    Lengths are in half widths of the picture.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = axis[None, :], axis[:, None]
    pixels = size / 2  # per unit of length: distance times this, cut to [0, 1], is an antialiased edge

    hue = dice.uniform(0, 1)
    dark = dice.uniform(0, 1) < 0.4
    image = _background(dice, hue, dark, axis)
    for _ in range(dice.below(5)):
        bx, by, radius = dice.uniform(-1, 1), dice.uniform(-1, 1), dice.uniform(0.06, 0.24)
        colour = dice.colour(hue + dice.uniform(-0.2, 0.2), (0.2, 0.6), (0.6, 1.0))
        cover = np.clip((radius - np.hypot(x - bx, y - by)) * (pixels / 3), 0, 1) * dice.uniform(0.12, 0.4)
        image += (colour - image) * cover

    radius = dice.uniform(0.46, 0.76)
    reach = 1 - 0.8 * radius
    cx, cy, turn = dice.uniform(-reach, reach), dice.uniform(-reach, reach), dice.uniform(0, 2 * math.pi)
    cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
    light, proportions = dice.uniform(0, 2 * math.pi), dice.uniform(0, 1)
    lx, ly = math.cos(light), math.sin(light)

    def local(ox: float, oy: float) -> tuple[np.ndarray, np.ndarray]:
        return (x - ox) * cos + (y - oy) * sin, (y - oy) * cos - (x - ox) * sin

    throw, blur = dice.uniform(0.06, 0.14), dice.uniform(0.08, 0.2)
    shadow = shape(*local(cx - throw * lx, cy - throw * ly), proportions) * radius
    image *= 1 - dice.uniform(0.35, 0.6) * _smoothstep(0.5 - shadow / (2 * blur))

    u, v = local(cx, cy)
    distance = shape(u, v, proportions) * radius
    hue += dice.uniform(0.25, 0.75)
    paint = dice.colour(hue, (0.5, 0.88), (0.75, 1.0) if dark else (0.45, 0.95))
    second = dice.colour(hue + dice.uniform(-0.2, 0.2), (0.1, 0.8), (0.35, 1.0))
    paint = paint + (second - paint) * _surface(dice, u, v, pixels * radius, lx, ly)

    # light: a bevelled rim, a slow fall-off over the whole object, and a gloss on the rim that faces the light
    bevel = dice.uniform(0.08, 0.22)
    height = np.clip(distance * (-1 / bevel), 0, 1)
    height = height * (2 - height)
    slope = np.zeros_like(height)
    slope[:, 1:-1] += (height[:, 2:] - height[:, :-2]) * (0.5 * lx * pixels * bevel)
    slope[1:-1] += (height[2:] - height[:-2]) * (0.5 * ly * pixels * bevel)
    paint *= 1 - 0.28 * np.clip(slope, -1, 1.6) + 0.18 * ((x - cx) * lx + (y - cy) * ly)
    paint += 0.5 * np.clip(-slope - 0.9, 0, 1)
    image += (paint - image) * np.clip(0.5 - distance * pixels, 0, 1)
    image *= 1.04 - 0.12 * (x * x + y * y)
    return np.clip(image, 0, 1, out=image), distance


def _background(dice: _Dice, hue: float, dark: bool, axis: np.ndarray) -> np.ndarray:
    """A linear or radial gradient, soft stripes or clouds between two related colours, float32 `[3, H, W]`."""
    x, y = axis[None, :], axis[:, None]
    value = (0.2, 0.48) if dark else (0.6, 1.0)
    first = dice.colour(hue, (0.15, 0.7), value)
    second = dice.colour(hue + dice.uniform(-0.14, 0.14), (0.15, 0.7), value)
    if abs(float(first.sum() - second.sum())) < 0.3:
        second = second * np.float32(dice.uniform(0.5, 0.75))
    kind, turn = dice.below(4), dice.uniform(0, 2 * math.pi)
    cos, sin = math.cos(turn), math.sin(turn)
    if kind == 0:
        t = 0.5 + 0.42 * (cos * x + sin * y)
    elif kind == 1:
        t = np.hypot(x - 0.5 * cos, y - 0.5 * sin) * 0.6
    elif kind == 2:
        t = 0.5 + 0.5 * np.sin((cos * x + sin * y) * dice.uniform(5, 15) + dice.uniform(0, 2 * math.pi))
    else:
        n = 3 + dice.below(3)
        knots = dice.random((n + 1, n + 1)).astype(np.float32)
        weights = _smoothstep(1 - np.abs((axis[:, None] + 1) * (n / 2) - np.arange(n + 1, dtype=np.float32)))
        t = weights @ knots @ weights.T
    return first + (second - first) * np.clip(t, 0, 1)


def _surface(dice: _Dice, u: np.ndarray, v: np.ndarray, pixels: float, lx: float, ly: float) -> np.ndarray:
    """Share of the second colour on the object, `[H, W]` in [0, 1]: a gradient, stripes, checks or dots."""
    kind, waves = dice.below(4), dice.uniform(7, 13)
    if kind == 0:
        t = 0.5 + 0.5 * (u * lx + v * ly)
    elif kind == 1:
        t = 0.5 + np.sin(u * waves) * (0.5 * pixels / waves)
    elif kind == 2:
        t = 0.5 + np.sin(u * (0.8 * waves)) * np.sin(v * (0.8 * waves)) * (0.7 * pixels / waves)
    else:
        u, v = u * (0.35 * waves), v * (0.35 * waves)
        t = 0.5 + (0.3 - np.hypot(u - np.rint(u), v - np.rint(v))) * (pixels / (0.35 * waves))
    return np.clip(t, 0, 1)


def write_folder(
    folder: str | os.PathLike,
    *,
    size: int = 56,
    train: int = 160,
    validation: int = 800,
    seed: int = 0,
    coco: bool = False,
    masks: bool = False,
) -> Path:
    """Writes a labelled image folder, `FOLDER/{train,validation}/CLASS/*.png`, as timm's `train.py` reads it.

    With `coco` or `masks`, the same pictures as `FOLDER/{train,validation}/images/*.png`, with what detection and
    segmentation read.

    No picture is in both splits, in the folder of another seed, or among those that pretraining on `embedded` sees.
    The folder appears when it is complete: a run that is killed leaves at most a hidden one beside it.

    Args:
        folder: Where to; it and its parents are made if needed.
        size: Height and width in pixels.
        train: Pictures of the training split, in all; a multiple of the number of classes, 8.
        validation: Likewise for the validation split.
        seed: Which pictures, at least 0.
        coco: Write boxes and masks of the objects as `FOLDER/{train,validation}.json`, in COCO's format.
        masks: Write the classes of the pixels as `FOLDER/{train,validation}/masks/*.png`, 0 for the background and
            classes from 1, and their names by number as the lines of `FOLDER/classes.txt`.

    Returns:
        The folder.

    Raises:
        ValueError: The folder exists and is not empty (or is a file), a count that the classes cannot share evenly,
            or a size or seed out of range.
    """
    classes = EmbeddedSource.classes
    for name, count in (("train", train), ("validation", validation)):
        if count < 1 or count % len(classes):
            raise ValueError(f"{name}={count} pictures: expected a multiple of {len(classes)}, the number of classes.")
    if seed < 0:
        raise ValueError(f"Expected seed >= 0, got {seed}.")
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Name another one, or remove it.")

    first = PRETRAINING_SEEDS + 2 * seed
    sources = {
        "train": EmbeddedSource(train, size, seed=first),
        "validation": EmbeddedSource(validation, size, seed=first + 1),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for split, source in sources.items():
            if coco or masks:
                _write_annotated(source, temporary, split, coco, masks)
            else:
                _write_labelled(source, temporary / split)
        if folder.exists():
            folder.rmdir()  # Windows does not move a folder onto an empty one
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_labelled(source: EmbeddedSource, folder: Path) -> None:
    """A folder a class."""
    for name in source.classes:
        (folder / name).mkdir(parents=True)
    for i in range(len(source)):
        _as_image(source, i).save(folder / source.classes[source.label(i)] / f"{i:05d}.png")


def _write_annotated(source: EmbeddedSource, folder: Path, split: str, coco: bool, masks: bool) -> None:
    """One folder of images, with their annotations beside it."""
    (folder / split / "images").mkdir(parents=True)
    annotations = Annotations(folder, split, source.classes, coco, masks)
    for i in range(len(source)):
        name = f"{i:05d}.png"
        _as_image(source, i).save(folder / split / "images" / name)
        annotations.add(name, source.label(i), source.mask(i))
    annotations.write()


def _as_image(source: EmbeddedSource, i: int) -> Image.Image:
    return Image.fromarray(source[i].permute(1, 2, 0).numpy())
