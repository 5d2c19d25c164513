"""The augmentation of pretraining."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import InterpolationMode, v2

from ...console import count
from ..formats.pillow import Reduced

# A JPEG is decoded at 1/2, 1/4 or 1/8 if its crop keeps at least this many times the output's pixels per side. PSNR
# relative to the full decode at exactly this value, photograph-like JPEGs, bicubic, median (minimum) in dB: 38.8 (37.0)
# at 1, 45.4 (44.6) at 1.5, 49.2 (47.5) at 2; most crops keep more, see benchmarks/decode.py. 1.5 is the smallest of
# these above 40 dB. Drawings with sharp edges at the scale of output pixels lose more: 30 dB at 1.5.
MIN_OVERSAMPLING = 1.5


class PretrainTransform:
    """Random resized crop, flips, scaling to [0, 1] and normalisation: the paper's augmentation for pretraining.

    Uses torch's global random generator only. uint8 images are resized as uint8, which is fast. Images decoded at
    reduced size get the same crop: see `reduction`.

    Args:
        img_size: Output size in pixels, one side or `(H, W)`.
        scale, ratio: Ranges of the crop's area relative to the image, and of its width / height.
        hflip, vflip: Probabilities of a horizontal and of a vertical flip.
        interpolation: 'bilinear', 'bicubic' or 'nearest', antialiased.
        mean, std: One number per channel, in units of the scaled image (uint8 images: 0..1).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        interpolation: str = "bicubic",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(self.img_size) != 2 or min(self.img_size) < 1:
            raise ValueError(f"img_size must be one side or (height, width) in pixels, got {img_size}.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two fractions of the area, 0 < low <= high <= 1, got {scale}.")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be two values of width / height, 0 < low <= high, got {ratio}.")
        if not (0 <= hflip <= 1 and 0 <= vflip <= 1):
            raise ValueError(f"hflip and vflip are probabilities from 0 to 1, got {hflip} and {vflip}.")
        if interpolation not in ("bilinear", "bicubic", "nearest"):
            raise ValueError(f"interpolation must be 'bilinear', 'bicubic' or 'nearest', got '{interpolation}'.")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must have the same length and std be positive, got {mean} and {std}.")
        self.mean, self.std, self.interpolation = tuple(mean), tuple(std), interpolation
        self.crop = v2.RandomResizedCrop(self.img_size, scale, ratio, InterpolationMode(interpolation), antialias=True)
        flips = [v2.RandomHorizontalFlip(hflip)] * bool(hflip) + [v2.RandomVerticalFlip(vflip)] * bool(vflip)
        scaling = v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)
        self.steps = v2.Compose([*flips, *scaling])

    def reduction(self, size: tuple[int, int]) -> int:
        """The largest factor of 1, 2, 4, 8 by which an image of this `(height, width)` may be decoded smaller.

        The crop then still has at least `MIN_OVERSAMPLING` times the output's pixels in height and width. Draws the
        crop as a call does: set the random generator to the same state before both.
        """
        if self.interpolation == "nearest":  # picks single pixels, which a reduced image has averaged
            return 1
        _, _, height, width = self._box(size)
        enough = min(height / self.img_size[0], width / self.img_size[1]) / MIN_OVERSAMPLING
        return next((r for r in (8, 4, 2) if r <= enough), 1)

    def _box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Draws the crop of an image of this (height, width): `(top, left, height, width)` in pixels."""
        drawn = self.crop.make_params([torch.empty(1).expand(1, *size)])  # uses only the shape
        return drawn["top"], drawn["left"], drawn["height"], drawn["width"]

    def _crop_reduced(self, image: Reduced) -> torch.Tensor:
        """Crops as `self.crop` does, with a box that may start and end within pixels: uint8 `[C, H, W]`."""
        top, left, height, width = self._box(image.size)
        frame_top, frame_left, frame_height, frame_width = image.frame
        y, x = frame_height / image.size[0], frame_width / image.size[1]
        top, left = frame_top + top * y, frame_left + left * x
        bottom, right = top + height * y, left + width * x
        # Cut out first, as at full size, or the filter would reach beyond the crop. All numbers are multiples of 1/8:
        # rounding is exact.
        y0, x0 = math.floor(top), math.floor(left)
        window = image.pixels[:, y0 : math.ceil(bottom), x0 : math.ceil(right)]
        array = window[0].numpy() if len(window) == 1 else window.permute(1, 2, 0).numpy()
        resized = Image.fromarray(np.ascontiguousarray(array)).resize(
            (self.img_size[1], self.img_size[0]),
            Image.Resampling[self.interpolation.upper()],
            box=(left - x0, top - y0, right - x0, bottom - y0),
        )
        pixels = torch.from_numpy(np.array(resized))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)

    def __call__(self, image: torch.Tensor | Reduced) -> torch.Tensor:
        """`[C, h, w]` uint8 or float, or `Reduced` -> float32 `[C, H, W]`, normalised."""
        channels = len(image.pixels if isinstance(image, Reduced) else image)
        if channels != len(self.mean):
            given = len(self.mean)
            raise ValueError(
                f"The image has {count(channels, 'channel')}, --mean and --std have {count(given, 'number')}: give one "
                "each."
            )
        cropped = self._crop_reduced(image) if isinstance(image, Reduced) else self.crop(image)
        return self.steps(cropped).contiguous()
