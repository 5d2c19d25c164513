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


class _Dice:
    """Random numbers of one image; only uniform ones, the most stable stream of NumPy's generators."""

    def __init__(self, seed: int, i: int) -> None:
        self.random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, i]))).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def below(self, n: int) -> int:
        return int(n * self.random())

    def colour(self) -> np.ndarray:
        rgb = colorsys.hsv_to_rgb(self.random(), self.uniform(0, 0.9), self.uniform(0.1, 1))
        return np.array(rgb, dtype=np.float32)[:, None, None]


# Textures: height at (u, v) in periods; the highest part gets the first colour. Slopes are about 1.
Texture = Callable[[np.ndarray, np.ndarray, _Dice], np.ndarray]


def _off(x: np.ndarray) -> np.ndarray:
    """Distance to the nearest integer, 0 to 0.5."""
    return np.abs(x - np.rint(x))


def _checks(u: np.ndarray, v: np.ndarray, dice: _Dice) -> np.ndarray:
    a, b = _off(0.6 * u) - 0.25, _off(0.6 * v) - 0.25
    return np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))


def _rings(u: np.ndarray, v: np.ndarray, dice: _Dice) -> np.ndarray:
    around = (x[x.shape[0] // 2, x.shape[1] // 2] + dice.uniform(-2, 2) for x in (u, v))
    return _off(np.hypot(*(x - centre for x, centre in zip((u, v), around, strict=True))))


def _clouds(u: np.ndarray, v: np.ndarray, dice: _Dice) -> np.ndarray:
    knots = dice.random((64, 64)).astype(np.float32)
    x, y = 1.8 * u, 1.8 * v
    left, top = np.floor(x), np.floor(y)
    a, b = (t * t * (3 - 2 * t) for t in (x - left, y - top))
    column, row = left.astype(np.int64), top.astype(np.int64)
    corners = [knots[(row + i) % 64, (column + j) % 64] for i in (0, 1) for j in (0, 1)]
    upper, lower = corners[0] + (corners[1] - corners[0]) * a, corners[2] + (corners[3] - corners[2]) * a
    return upper + (lower - upper) * b


_TEXTURES: dict[str, Texture] = {
    "stripes": lambda u, v, dice: _off(u),
    "bands": lambda u, v, dice: 2.5 * _off(0.4 * u),
    "checks": _checks,
    "dots": lambda u, v, dice: -np.hypot(_off(u), _off(v)),
    "rings": _rings,
    "bricks": lambda u, v, dice: np.minimum(2 * _off(0.4 * u + 0.5 * np.floor(v)), _off(v)),
    "grid": lambda u, v, dice: np.minimum(_off(u), _off(v)),
    "clouds": _clouds,
}


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x) - 0.6, np.abs(y) - 0.6
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0) - 0.15


# Shapes: signed distance, negative inside, of an object of radius about 1.
_SHAPES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda x, y: np.hypot(x, y) - 0.9,  # disc
    _square,
    lambda x, y: np.maximum(math.sqrt(0.75) * np.abs(x) + 0.5 * y, -y) - 0.55,  # triangle
    lambda x, y: 0.75 * (np.hypot(x, y) - 0.8 - 0.14 * np.cos(5 * np.arctan2(y, x))),  # flower
)


class DemoSource(Source):
    """The demo data set: textures that fill the image, or, with `objects`, one object of a texture in each image.

    The eight classes are the textures, and `label(i) = i % 8`. Scale, turn (up to 23 degrees), position, proportions,
    both colours and so contrast and polarity, light, noise, and an object's shape, place and background vary. Other
    seeds give other images of the same kind, for example a validation set.
    """

    classes = tuple(_TEXTURES)

    def __init__(
        self, length: int = 2048, size: int = 128, in_chans: int = 3, seed: int = 0, pixels: Pixels = PLAIN,
        objects: bool = False,
    ) -> None:  # fmt: skip
        if in_chans not in (1, 3):
            raise ValueError(f"The demo data set has 1 or 3 channels, got in_chans={in_chans}.")
        if length < 1 or size < 8 or seed < 0:
            raise ValueError(f"Expected length >= 1, size >= 8 and seed >= 0, got {length}, {size} and {seed}.")
        if pixels._replace(standardize=None) != PLAIN:
            raise ValueError(f"The demo data set is 8-bit in 0..255 without nodata: leave out options on {pixels}.")
        super().__init__(in_chans, pixels)
        self.length, self.size, self.seed, self.objects = length, size, seed, objects

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"demo {self.classes[self.label(i)]} {i}"

    def label(self, i: int) -> int:
        """Class of image `i`, an index into `classes`."""
        return check_index(i, self.length) % len(self.classes)

    def mask(self, i: int) -> np.ndarray:
        """Pixels of image `i` at least half covered by its object, bool `[size, size]`; needs `objects`."""
        return self._draw(i)[1] < 0

    def _draw(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return draw(_TEXTURES[self.classes[self.label(i)]], _Dice(self.seed, i), self.size, self.objects)

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor:
        """Renders image `i`, uint8 `[C, size, size]`, or float32 if the record standardises it."""
        image = self._draw(i)[0]
        if self.in_chans == 1:
            image = np.tensordot(np.array([[0.299, 0.587, 0.114]], dtype=np.float32), image, axes=1)
        return self.pixels.standardized(torch.from_numpy((image * 255 + 0.5).astype(np.uint8)))


def draw(texture: Texture, dice: _Dice, size: int, objects: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image, float32 `[3, size, size]` in [0, 1].

    Returns the image, and the signed distance from its object's edge, negative inside, in half widths of the image;
    without objects everything is inside.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = axis[None, :], axis[:, None]
    pixels = size / 2  # per unit of length: distance times this, cut to [0, 1], is an antialiased edge

    turn = dice.uniform(-0.4, 0.4)  # a full turn would rule the features: masked prediction has to know directions
    cos, sin = math.cos(turn), math.sin(turn)
    period = dice.uniform(0.2, 0.32)
    u = (x * cos + y * sin) / period + dice.uniform(0, 32)
    v = (y * cos - x * sin) / period + dice.uniform(0, 32)
    first, second = _two_colours(dice)
    distance = texture(u, v, dice)
    rank = int(dice.uniform(0.42, 0.58) * distance.size)  # one range for all textures: a histogram tells nothing
    distance -= np.partition(distance, rank, None)[rank]
    focus = dice.uniform(1, 4)
    image = second + (first - second) * np.clip(0.5 + distance * (period * pixels / focus), 0, 1)

    edge = np.full((size, size), -1, np.float32)
    if objects:
        shape = _SHAPES[dice.below(len(_SHAPES))]
        radius = dice.uniform(0.45, 0.75)
        reach = 1 - 0.8 * radius
        cx, cy = dice.uniform(-reach, reach), dice.uniform(-reach, reach)
        cos, sin = (part / radius for part in _direction(dice))
        edge = shape((x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin) * radius
        behind = dice.colour() * _gradient(dice, x, y, 0.4)
        image = behind + (image - behind) * np.clip(0.5 - edge * pixels, 0, 1)
    image = image * _gradient(dice, x, y, 0.8)
    image += (dice.random(image.shape) - 0.5).astype(np.float32) * dice.uniform(0.02, 0.1)
    return np.clip(image, 0, 1, out=image), edge


def _direction(dice: _Dice) -> tuple[float, float]:
    turn = dice.uniform(0, 2 * math.pi)
    return math.cos(turn), math.sin(turn)


def _two_colours(dice: _Dice) -> tuple[np.ndarray, np.ndarray]:
    """Two colours that differ visibly."""
    first = dice.colour()
    while np.abs((second := dice.colour()) - first).mean() < 0.15:
        pass
    return first, second


def _gradient(dice: _Dice, x: np.ndarray, y: np.ndarray, most: float) -> np.ndarray:
    """Light that falls off to one side, by at most the fraction `most`, `[H, W]`."""
    cos, sin = _direction(dice)
    return 1 - dice.uniform(0, most) * (0.5 + 0.35 * (cos * x + sin * y))
