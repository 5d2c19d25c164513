"""A look at what reaches the network, before the start: one line, warnings, and a refusal where nothing is left.

A normalisation that does not fit trains without an error, to a low loss and features that are constant: the target of
the loss is normalised per patch, and its eps hides what has no variance.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..commands.images import pixels_of
from ..data import InputStatistics, Pixels
from ..data.measure.measure import Measured, measure_pixels, measured_options
from ..runs.progress import ImageProgress
from ..runs.world import World
from .config import AUTO


def resolve_auto(
    args: argparse.Namespace, before: dict[str, Any] | None, open_source: Callable[[Pixels], Any], world: World
) -> str:
    """Sets what is to be measured: `mean`, `std`, `clip_low` and `clip_high`, the same on all processes.

    The first process measures; a run that is resumed takes what was measured at its start.

    Args:
        args: Of `parse_options`; changed.
        before: The settings of the run that is resumed; None for a new one.
        open_source: Opens the images with a record.
        world: The processes of the run.

    Returns:
        Where the numbers are from, in a line; '' where nothing was to be measured.

    Raises:
        ValueError: The images cannot be measured.
    """
    limits = args.clip_percentiles is not None and args.clip_low is None
    wanted = [name for name in ("mean", "std") if getattr(args, name) == AUTO]
    if not wanted and not limits:
        return ""
    if before is not None and _keep(args, before, wanted, limits):
        return f"{_listed(wanted, limits)}: as measured when the run began"
    found = error = None
    if world.primary:
        try:
            found = _measure(args, open_source, limits)
        except ValueError as e:  # the others must not wait
            error = str(e)
    found, error = world.share((found, error))
    if found is None:
        raise ValueError(error)
    values, source = found
    for name, value in values.items():
        if name in wanted or limits and name.startswith("clip"):
            setattr(args, name, value)
    return f"{_listed(wanted, limits)}: {source}"


def _keep(args: argparse.Namespace, before: dict[str, Any], wanted: list[str], limits: bool) -> bool:
    """Takes the numbers of a run that is resumed, if it has them for the same channels."""
    if before.get("in_chans") != args.in_chans:
        return False
    names = [*wanted, *(("clip_low", "clip_high") if limits else ())]
    if not all(isinstance(before.get(name), list) for name in names):
        return False
    if limits and before.get("clip_percentiles") != args.clip_percentiles:
        return False
    for name in names:
        setattr(args, name, before[name])
    return True


def _measure(
    args: argparse.Namespace, open_source: Callable[[Pixels], Any], limits: bool
) -> tuple[dict[str, Any], str]:
    bar = ImageProgress(None)
    try:
        found, pixels = measure_pixels(
            open_source,
            pixels_of(args),
            tuple(args.clip_percentiles) if limits else None,
            seed=args.seed,
            workers=args.workers,
            tick=bar.update,
        )
    finally:
        bar.close()
    _check_share(found, args.max_bad_images)
    low, high = (None if values is None else list(values) for values in (pixels.clip_low, pixels.clip_high))
    mean, std = measured_options(found.pixels)
    values = {"mean": mean, "std": std, "clip_low": low, "clip_high": high}
    return values, found.source + (f"; {len(found.bad)} left out, the first: {found.bad[0]}" if found.bad else "")


def _check_share(found: Measured, max_bad_images: float) -> None:
    """Refuses where what was measured is not what the run will see."""
    tried = found.pixels.images + len(found.bad)
    if found.total is not None and len(found.bad) > max(1, max_bad_images * found.total):
        raise ValueError(
            f"{len(found.bad)} of {tried} images tried cannot be read, more than --max-bad-images {max_bad_images:g} "
            f"of {found.total}, for example: {found.bad[0]}."
        )


def _listed(wanted: list[str], limits: bool) -> str:
    names = [f"--{name} {AUTO}" for name in wanted] + ["--clip-percentiles"] * limits
    return ", ".join(names)


# Pixels in [0, 1] with ImageNet's mean and std give at most |mean| 2.7 and std 2.3; dark microscopy has std 0.2.
LARGEST_MEAN = 3.0


SMALLEST_STD, LARGEST_STD = 0.1, 4.0


SCALED = "Pixels are scaled before it: 8-bit by 255, 16-bit by 65535, floats not at all."


NOTHING_LEFT = 0.01  # std: a patch then has a variance of some 1e-5, near the 1e-6 that the loss adds


def input_line(found: InputStatistics) -> str:
    """Mean, std, range and flat patches after normalisation, in one line."""
    images = f"{found.images} image{'s' * (found.images != 1)}"
    return (
        f"Input after normalisation, of {images}: mean {_values(found.mean)}, std {_values(found.std)}, range "
        f"{float(found.low.min()):.3g} to {float(found.high.max()):.3g}, flat patches "
        f"{_values(100 * found.flat, '.0f')} %, median variance of a patch {found.patch_variance:.2g}"
    )


def check_input(found: InputStatistics) -> None:
    """Refuses a normalisation or images that leave the network and the loss nothing to learn from.

    Raises:
        ValueError: All images are constant, or almost so after normalisation; with the mean and std that fit.
    """
    tried = f"in all {found.images} images tried"
    if len(found.constant) == len(found.mean):
        raise ValueError(
            f"There is nothing to learn: all pixels have one value {tried}, {_values(found.mean)} after normalisation. "
            f"Remove blank images; or check --mean and --std. {SCALED}"
        )
    if (found.std < NOTHING_LEFT).all():
        raise ValueError(
            f"--mean and --std leave nothing to learn from: after normalisation, pixels have a standard deviation of "
            f"{_values(found.std)} around {_values(found.mean)} {tried}, and about 1 and 0 are usual. {_remedy(found)}"
        )
    if (found.flat == 1).all():
        raise ValueError(f"There is nothing to learn: each patch has one value {tried}. Remove blank images.")


def input_warnings(found: InputStatistics) -> list[str]:
    """What is far from usual in the input, a sentence or more each; nothing for most images."""
    warnings = []
    constant = found.constant
    wrong = [
        c
        for c, (mean, std) in enumerate(zip(found.mean.tolist(), found.std.tolist(), strict=True))
        if c not in constant and not (abs(mean) <= LARGEST_MEAN and SMALLEST_STD <= std <= LARGEST_STD)
    ]
    if wrong:
        warnings.append(
            f"--mean and --std do not fit the images: after normalisation {_channels(wrong, found)} mean "
            f"{_values(found.mean[wrong])} and std {_values(found.std[wrong])}, and about 0 and 1 are usual. "
            f"{_remedy(found)}"
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
    """Numbers of a few channels, the range of those of many."""
    texts = [f"{v:{form}}" for v in (values.tolist() if len(values) <= 4 else [values.min(), values.max()])]
    return (" " if len(values) <= 4 else " to ").join(texts)


def _list(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _channels(which: list[int], found: InputStatistics) -> str:
    """The subject of a sentence with its 'has'."""
    if len(found.mean) == 1:
        return "pixels have"
    if len(which) == len(found.mean):
        return "all channels have"
    return f"channel{'s' * (len(which) > 1)} {_list(c + 1 for c in which)} {'have' if len(which) > 1 else 'has'}"


def _remedy(found: InputStatistics) -> str:
    """The options that fit, measured; a channel that is constant keeps what was given."""
    mean, std = found.stored_mean, found.stored_std
    mean[found.constant], std[found.constant] = found.given_mean[found.constant], found.given_std[found.constant]
    low, high = float(_stored(found, found.low).min()), float(_stored(found, found.high).max())
    if not (mean.isfinite().all() and std.isfinite().all()):
        return f"{SCALED} They range from {low:.3g} to {high:.3g} here."
    pairs = [*zip(mean.tolist(), std.tolist(), strict=True)]
    means = " ".join(f"{m:.{max(0, 2 - math.floor(math.log10(s)))}f}" for m, s in pairs)
    stds = " ".join(f"{float(f'{s:.3g}'):g}" for _, s in pairs)
    return (
        f"{SCALED} They range from {low:.3g} to {high:.3g} here, and what was measured on them is: --mean {means} "
        f"--std {stds}"
    )


def _stored(found: InputStatistics, values: torch.Tensor) -> torch.Tensor:
    return values.double() * found.given_std + found.given_mean
