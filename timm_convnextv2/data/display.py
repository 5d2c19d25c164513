"""Pixels of any number of channels and any range as RGB, for figures."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLE = 2**18  # pixels per channel that the percentiles are taken of


class Display(NamedTuple):
    """How images are shown: three channels as red, green and blue, or one as grey."""

    bands: tuple[int, ...]  # channels, counted from 1
    low: Tensor  # per band: this value and lower ones are black
    high: Tensor  # per band: this value and higher ones have full brightness

    def rgb(self, images: Tensor) -> Tensor:
        """`[..., C, H, W]` as `[..., H, W, 3]` in 0..1."""
        x = images[..., [band - 1 for band in self.bands], :, :].float()
        low, high = (v.view(-1, 1, 1) for v in (self.low, self.high))
        x = ((x - low) / (high - low)).clamp(0, 1)
        return x.expand(*x.shape[:-3], 3, *x.shape[-2:]).movedim(-3, -1)

    def __str__(self) -> str:
        return f"channel{'s' * (len(self.bands) > 1)} {', '.join(map(str, self.bands))}, percentiles 2 to 98"


def check_bands(bands: Sequence[int] | None, in_chans: int) -> tuple[int, ...]:
    """The channels to show, counted from 1; by default the first three, or the first. ValueError if there are none."""
    bands = tuple(bands) if bands else (1, 2, 3) if in_chans >= 3 else (1,)
    if len(bands) not in (1, 3) or not all(1 <= band <= in_chans for band in bands):
        raise ValueError(
            f"--show-bands {' '.join(map(str, bands))}: expected one channel, or three for red, green and blue, each "
            f"from 1 to {in_chans}."
        )
    return bands


def display_of(images: Sequence[Tensor], bands: Sequence[int] | None = None) -> Display:
    """The display of images `[C, H, W]`, in which each shown channel is stretched over all of them.

    From the 2nd to the 98th percentile, or if these are equal from the lowest to the highest value: raw values of
    12-bit images and of scenes would be black. Images in other units, such as normalised ones, look the same.
    """
    bands = check_bands(bands, len(images[0]))
    step = max(1, sum(image[0].numel() for image in images) // _SAMPLE)
    pixels = torch.cat([image[[band - 1 for band in bands]].flatten(1)[:, ::step].float() for image in images], 1)
    low, high = torch.quantile(pixels, torch.tensor([0.02, 0.98], device=pixels.device), dim=1)
    flat = high <= low
    low, high = torch.where(flat, pixels.amin(1), low), torch.where(flat, pixels.amax(1), high)
    return Display(bands, low, torch.where(high <= low, low + 1, high))
