"""Baselines that need no network: what small pixels, a histogram or the border of an image tell about its class.

Each is a function of normalised images `[B, C, H, W]` that returns rows `[B, D]` for `extract_many`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.measure.inspection import thumbnail
from ..data.sources.source import Source

SIDE = 8  # of the shrunk images, in pixels
BINS = 16  # of the histogram of a channel
BORDER = 16  # the border is a sixteenth of the image wide
SAMPLED = 64  # training images that set the range of the histograms
SHRUNK, HISTOGRAM, FRAME = f"{SIDE}x{SIDE} pixels", "histogram of each channel", "border only"
SHORTCUTS = (HISTOGRAM, FRAME)  # a class that these tell may not be about the object


def shrunk(images: Tensor) -> Tensor:
    """Images averaged to 8 x 8 pixels, `[B, C * 64]`."""
    return F.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)


def border(images: Tensor) -> Tensor:
    """The outer cells of images averaged to 16 x 16, `[B, C * 60]`: the background alone."""
    cells = F.adaptive_avg_pool2d(images.float(), BORDER)
    return torch.cat([cells[:, :, 0], cells[:, :, -1], cells[:, :, 1:-1, 0], cells[:, :, 1:-1, -1]], dim=2).flatten(1)


def histogram(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Square roots of the shares of 16 bins between `low` and `high` (`[C, 1, 1]`) per channel, `[B, C * 16]`."""
    bins = ((images.float() - low) / (high - low).clamp_min(1e-12) * BINS).clamp(0, BINS - 1).long().flatten(2)
    counts = torch.zeros(*bins.shape[:2], BINS).scatter_add_(2, bins, torch.ones(bins.shape))
    return (counts / bins.shape[2]).sqrt().flatten(1)


def hashes(near: Callable, images: Tensor) -> Tensor:
    """The perceptual hash `near` (see `perceptual_hash`) of each image as four numbers; -1 for blank images."""
    rows = []
    for image in images:
        blank = bool((image.amin((1, 2)) == image.amax((1, 2))).all())
        word = near(thumbnail(image))
        rows.append([-1.0] * 4 if blank else [float(int(word[i : i + 4], 16)) for i in range(0, 16, 4)])
    return torch.tensor(rows)


def near_duplicates(train: Tensor, test: Tensor) -> list[int]:
    """Indices of the rows of `test` (see `hashes`) that are in `train`."""
    known = {tuple(row) for row in train.tolist() if row[0] >= 0}
    return [i for i, row in enumerate(test.tolist()) if tuple(row) in known]


def plain_baselines(train: Source, transform: Callable) -> dict[str, Callable[[Tensor], Tensor]]:
    """The baselines by name; up to 64 training images set the range of the histograms."""
    count = min(SAMPLED, len(train))
    sample = [transform(train[i * len(train) // count]) for i in range(count)]
    # percentiles: hot pixels would put all others into one bin
    low, high = (torch.stack([x.flatten(1).float().quantile(q, dim=1) for x in sample]) for q in (0.002, 0.998))
    of_range = {"low": low.amin(0)[:, None, None], "high": high.amax(0)[:, None, None]}
    return {SHRUNK: shrunk, HISTOGRAM: partial(histogram, **of_range), FRAME: border}
