"""Checks the input of the network before the start: one line of statistics, warnings, and refusals.

A wrong normalisation trains without an error, as the target of the loss is normalised per patch, to constant features.
"""

import math
from collections.abc import Iterable

import torch

from ..console import count
from ..data import InputStatistics, Pixels
from ..data.formats.pixels import PLAIN

# Pixels in [0, 1] with ImageNet's mean and std have at most |mean| 2.7 and std 2.3; dark microscopy has std 0.2.
LARGEST_MEAN = 3.0
SMALLEST_STD, LARGEST_STD = 0.1, 4.0
NOTHING_LEFT = 0.01  # standard deviation; a patch then has a variance near the 1e-6 that the loss adds


def input_line(found: InputStatistics) -> str:
    """Mean, std, range and flat patches after normalisation, in one line."""
    return (
        f"Input after normalisation, {count(found.images, 'image')}: mean {_values(found.mean)}, std "
        f"{_values(found.std)}, range {float(found.low.min()):.3g} to {float(found.high.max()):.3g}, flat patches "
        f"{_values(100 * found.flat, '.0f')} %, median variance of a patch {found.patch_variance:.2g}"
    )


def check_input(found: InputStatistics, pixels: Pixels = PLAIN) -> None:
    """Refuses images or a normalisation from which the model cannot learn; names the mean and std that fit."""
    tried = f"in all {found.images} images tried"
    if len(found.constant) == len(found.mean):
        raise ValueError(
            f"All pixels are identical {tried} ({_values(found.mean)} after normalisation); the model has nothing to "
            f"learn. Remove blank images, or check {_options_to_check(pixels)}. {_scale(pixels)}"
        )
    if (found.std < NOTHING_LEFT).all():
        raise ValueError(
            f"--mean and --std do not fit: after normalisation, pixels have mean {_values(found.mean)} and standard "
            f"deviation {_values(found.std)} {tried}, expected about 0 and 1. {_remedy(found, pixels)}"
        )
    if (found.flat == 1).all():
        limits = "" if pixels.clip_low is None else ", or check --clip-low and --clip-high"
        raise ValueError(
            f"Each patch has one value {tried}; the model has nothing to learn. Remove blank images{limits}."
        )


def _options_to_check(pixels: Pixels) -> str:
    """The options that can make all pixels equal."""
    options = ["--mean", "--std"]
    named = (("--divide", pixels.divide), ("--clip-low", pixels.clip_low), ("--clip-high", pixels.clip_high))
    for name, value in named:
        values = value if isinstance(value, tuple) else (value,)
        options += [] if value is None else [" ".join([name, *(f"{v:g}" for v in values)])]
    options += ["--dicom-window"] * (pixels.dicom_window is not None)
    return _list(options) + " (after the division)" * (pixels.clip_low is not None)


def _scale(pixels: Pixels) -> str:
    """The first thing that happens to stored values."""
    if pixels.divide is not None:
        return f"Pixels are divided by {pixels.divide:g} first."
    return "Pixels are divided first: 8-bit by 255, 16-bit by 65535, floats not at all."


def input_warnings(found: InputStatistics, pixels: Pixels = PLAIN) -> list[str]:
    """Warnings about an unusual input; none for most images."""
    warnings, constant = [], found.constant
    usual = (found.mean.abs() <= LARGEST_MEAN) & (found.std >= SMALLEST_STD) & (found.std <= LARGEST_STD)
    if wrong := [c for c, fits in enumerate(usual.tolist()) if not fits and c not in constant]:
        warnings.append(
            f"--mean and --std do not fit the images: after normalisation {_channels(wrong, found)} mean "
            f"{_values(found.mean[wrong])} and std {_values(found.std[wrong])}, expected about 0 and 1. "
            f"{_remedy(found, pixels)}"
        )
    if constant:
        warnings.append(f"{_channels(constant, found)} one value in all {found.images} images tried.".capitalize())
    for group in found.equal:
        grey = len(group) == len(found.mean) == 3
        remedy = "Read grey images with --in-chans 1, unless the weights to start from need three channels."
        warnings.append(
            f"Channels {_list(c + 1 for c in group)} are equal in all {found.images} images tried. "
            + (remedy if grey else "Is --in-chans what the files have?")
        )
    return warnings


def _values(values: torch.Tensor, form: str = ".2g") -> str:
    """The numbers of up to four channels, the range for more."""
    texts = [f"{v:{form}}" for v in (values.tolist() if len(values) <= 4 else [values.min(), values.max()])]
    return (" " if len(values) <= 4 else " to ").join(texts)


def _list(items: Iterable[object]) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last


def _channels(which: list[int], found: InputStatistics) -> str:
    """The subject of a sentence about channels, with its verb."""
    if len(found.mean) == 1:
        return "pixels have"
    if len(which) == len(found.mean):
        return "all channels have"
    return f"channel{'s' * (len(which) > 1)} {_list(c + 1 for c in which)} {'have' if len(which) > 1 else 'has'}"


def _remedy(found: InputStatistics, pixels: Pixels) -> str:
    """The measured options that fit; a constant channel keeps the given ones."""
    mean, std = found.stored_mean, found.stored_std
    mean[found.constant], std[found.constant] = found.given_mean[found.constant], found.given_std[found.constant]
    low, high = float(_stored(found, found.low).min()), float(_stored(found, found.high).max())
    if not (mean.isfinite().all() and std.isfinite().all()):
        return f"{_scale(pixels)} They range from {low:.3g} to {high:.3g} here."
    pairs = [*zip(mean.tolist(), std.tolist(), strict=True)]
    means = " ".join(f"{m:.{max(0, 2 - math.floor(math.log10(s)))}f}" for m, s in pairs)
    stds = " ".join(f"{float(f'{s:.3g}'):g}" for _, s in pairs)
    return (
        f"{_scale(pixels)} They range from {low:.3g} to {high:.3g} here and are measured as --mean {means} --std {stds}"
    )


def _stored(found: InputStatistics, values: torch.Tensor) -> torch.Tensor:
    return values.double() * found.given_std + found.given_mean
