"""Renders the images of the demo data set. Image `i` is a function of `(seed, i)`."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
import torch

from ..formats.decode import check_index
from ..formats.pillow import Choose
from ..formats.pixels import PLAIN, Pixels
from ..sources.source import Source

Shape = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


class _Dice:
    """Random numbers of one image; only uniform ones, the most stable stream of NumPy's generators."""

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


_ALL = (_disc, _ring, _square, _triangle, _star, _cross, _crescent, _flower)
_SHAPES: dict[str, Shape] = {shape.__name__[1:]: shape for shape in _ALL}


class DemoSource(Source):
    """The demo data set: lit, textured objects in front of soft backgrounds.

    The eight classes are the shapes of the objects, and `label(i) = i % 8`; position, size, rotation, colours, surface,
    light and background vary. Other seeds give other images of the same kind, for example a validation set.
    """

    classes = tuple(_SHAPES)

    def __init__(
        self, length: int = 2048, size: int = 128, in_chans: int = 3, seed: int = 0, pixels: Pixels = PLAIN
    ) -> None:
        if in_chans not in (1, 3):
            raise ValueError(f"The demo data set has 1 or 3 channels, got in_chans={in_chans}.")
        if length < 1 or size < 8 or seed < 0:
            raise ValueError(f"Expected length >= 1, size >= 8 and seed >= 0, got {length}, {size} and {seed}.")
        super().__init__(in_chans, pixels)
        self.length, self.size, self.seed = length, size, seed

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"embedded {self.classes[self.label(i)]} {i}"

    def label(self, i: int) -> int:
        """Class of image `i`, an index into `classes`."""
        return check_index(i, self.length) % len(self.classes)

    def mask(self, i: int) -> np.ndarray:
        """Pixels of image `i` at least half covered by its object, bool `[size, size]`."""
        return self._draw(i)[1] < 0

    def _draw(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return draw(list(_SHAPES.values())[self.label(i)], _Dice(self.seed, i), self.size)

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor:
        """Renders image `i`, uint8 `[C, size, size]`, or float32 if the record standardises it."""
        image = self._draw(i)[0]
        if self.in_chans == 1:
            image = np.tensordot(np.array([[0.299, 0.587, 0.114]], dtype=np.float32), image, axes=1)
        return self.pixels.standardized(torch.from_numpy((image * 255 + 0.5).astype(np.uint8)))


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def draw(shape: Shape, dice: _Dice, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image, float32 `[3, size, size]` in [0, 1].

    Returns the image, and the signed distance from its object's edge, negative inside, in half widths of the image.
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

    # light: a bevelled rim, a slow fall-off over the whole object, and a gloss on the rim facing the light
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
    """A gradient, soft stripes or clouds between two related colours, float32 `[3, H, W]`."""
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
    """Opacity of the second colour on the object, `[H, W]` in [0, 1]: a gradient, stripes, checks or dots."""
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
