"""Measures pixel statistics on a seeded sample that is as large as the requested precision requires."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ...console import count
from ..config import ERROR
from ..formats.decode import groups_of, read_header
from ..formats.errors import ImageError, listed
from ..formats.files import Header
from ..formats.pixels import Pixels
from ..formats.values import noting_stored
from ..samples.batches import load_batches
from ..sources.source import Source
from ..sources.stream import TimmStream
from .pixel_statistics import PixelStatistics

_LEAST = 32  # images before the error is trusted
_MOST = 2000
_CHUNK = 8
_HEADERS = 64  # files whose headers are compared
_NAMED = 3
_BLANK = 0.01  # share of pixels that are 0 in all channels, from which they may have no data
_COLOURS = 4  # most channels of photographs; files with more are rasters
_SCALES = {255: "8 bits", 1023: "10 bits", 4095: "12 bits", 10000: "reflectances times 10000", 16383: "14 bits"}
_REFLECTANCE = 10000


class Measured(NamedTuple):
    """Statistics of a sample."""

    pixels: PixelStatistics  # in units of the pixels that mean and std refer to
    kind: str  # type of the stored values
    unit: float  # their divisor
    total: int | None  # images of the data set; None for a stream
    error: float  # standard error of the mean that was reached, in standard deviations, largest of all channels
    bad: list[str]  # reasons why images were left out
    stored: tuple[float, float]  # smallest and largest stored value, before measured limits clip
    blank: float  # fraction of pixels that are 0 in all channels, before measured limits clip

    @property
    def source(self) -> str:
        """The sample and its precision, in words."""
        of = "the first of a stream" if self.total is None else f"of {self.total}"
        return (
            f"measured on {count(self.pixels.images, 'image')} ({of}), standard error of the mean {self.error:.2g} "
            "standard deviations"
        )


class _Image(NamedTuple):
    """The statistics of one image, or the reason why it has none."""

    name: str
    pixels: PixelStatistics | None
    kind: str = ""
    unit: float = 1.0
    why: str = ""


def _measured(load: Callable[[], Any], name: str) -> _Image:
    try:
        with noting_stored() as stored:
            image = load()
    except (ImageError, OSError) as error:
        return _Image(name, None, why=str(error))
    kind, unit, largest = stored.kind or str(image.dtype), stored.unit, stored.largest
    if image.dtype == torch.uint8:  # from a source whose images are always 8-bit
        image, kind, unit, largest = image.float() / 255, "uint8", 255.0, 1.0
    own = PixelStatistics(len(image))
    own.add(image.numpy(), largest)
    return _Image(name, own, kind, unit)


def _measured_at(source: Source, i: int) -> _Image:
    return _measured(partial(source.__getitem__, i), source.name(i))


def _images(source: Source | TimmStream, seed: int, most: int, workers: int) -> Iterator[_Image]:
    if isinstance(source, TimmStream):
        return (_measured(load, name) for name, load in islice(source.undecoded(), most))
    order = random.Random(seed).sample(range(len(source)), min(most, len(source)))
    chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]
    return chain.from_iterable(load_batches(partial(_measured_at, source), chunks, workers))


def measure(
    source: Source | TimmStream,
    *,
    seed: int = 0,
    error: float = ERROR,
    max_images: int = _MOST,
    workers: int = 0,
    tick: Callable[[int], Any] = lambda count: None,
) -> Measured:
    """Measures images of a source in a seeded random order until the mean of each channel is known precisely enough.

    Images of one data set differ more from each other than their pixels suggest, so the error is estimated from the
    variance between images: after 32 and every eight more. A stream is measured from its beginning. The result depends
    on the source and the seed, not on the workers.

    Args:
        error: Wanted standard error of the mean, in standard deviations of the pixels.
        max_images: Largest number of images to read.
        workers: Processes that decode; 0: this one.
        tick: Called with the number of images that were just read.
    """
    if not error > 0 or max_images < 2:
        raise ValueError(f"The standard error must be above 0 and images at least 2, got {error} and {max_images}.")
    total = None if isinstance(source, TimmStream) else len(source)
    kinds: dict[str, list[str]] = {}
    bad: list[str] = []
    found, unit = None, 1.0
    for number, image in enumerate(_images(source, seed, max_images, workers), 1):
        tick(1)
        if image.pixels is None:
            bad.append(image.why)
        else:
            kinds.setdefault(image.kind, []).append(image.name)
            unit = image.unit
            found = found or PixelStatistics(image.pixels.channels)
            found.merge(image.pixels)
        enough = number >= _LEAST and number % _CHUNK == 0 and number != total
        if enough and found and found.standard_error(total).max() <= error:
            break
    if found is None:
        raise _none_readable(bad)
    if len(kinds) > 1:
        groups = sorted(kinds.items(), key=lambda item: -len(item[1]))
        shown = "; ".join(f"{len(names)} of {kind} ({names[0]})" for kind, names in groups)
        raise ValueError(
            f"The images have {len(kinds)} types, which need different means and scales: {shown}. Convert them to one, "
            "or keep each type in a folder of its own; to train on the mixture anyway, give --mean and --std."
        )
    (kind,), reached = kinds, float(found.standard_error(total).max())
    stored = float(found.low.min()) * unit, float(found.high.max()) * unit
    blank = found.blank / max(1, int(found.count[0] + found.missing[0]))
    return Measured(found, kind, unit, total, reached, bad, stored, blank)


def _none_readable(bad: list[str]) -> ValueError:
    return ValueError(f"None of {len(bad)} images tried can be read, for example:\n{listed(bad, _NAMED)}")


def find_channels(source: Source, seed: int = 0, page: int | str | None = None) -> int:
    """Channels of a source's files by the headers of a sample; 3 if grey and colour images are mixed."""
    headers: list[tuple[str, Header]] = []
    bad: list[str] = []
    for i in random.Random(seed).sample(range(len(source)), min(_HEADERS, len(source))):
        try:
            headers.append((source.name(i), read_header(source.path(i), page)))
        except (ImageError, OSError) as error:
            bad.append(source.reason(i, error))
    if not headers:
        raise _none_readable(bad)
    channels = {header.channels for _, header in headers}
    if len(channels) > 1 and channels != {1, 3}:
        raise ValueError(
            f"The images differ in channels ({len(headers)} headers read): {groups_of(headers)}. Keep each kind in a "
            "folder of its own, or name the one to read with --in-chans."
        )
    return max(channels)


def suggestions(found: Measured, pixels: Pixels) -> dict[str, str]:
    """Options that the values suggest, each with its reason; empty if the user has set them.

    `pixels` are the user's, without measured limits. If the user names limits, they are in units of the present
    divisor, and hide the stored values: nothing is suggested.
    """
    channels, (_, high), options = found.pixels.channels, found.stored, {}
    if pixels.clip_low is not None:
        return options
    if pixels.nodata is None and found.blank >= _BLANK and not _is_photo(found) and not found.kind.startswith("DICOM"):
        every = "the channel" if channels == 1 else f"all {channels} channels"
        options["--nodata 0"] = f"{found.blank:.1%} of the pixels are exactly 0 in {every}: probably no data"
    scale = next((scale for scale in _SCALES if scale >= high), None)
    if scale and pixels.divide is None and found.kind.startswith("uint") and 4 * scale <= found.unit:
        usual = f"{_SCALES[scale]} are usual"
        if channels > _COLOURS and scale > 255 and scale != _REFLECTANCE:
            usual = f"{_SCALES[_REFLECTANCE]} are usual in so many bands (or --divide {scale}: {_SCALES[scale]})"
            scale = _REFLECTANCE
        options[f"--divide {scale}"] = f"{high:g} of {found.unit:g} is the largest value: {usual}"
    return options


def _is_photo(found: Measured) -> bool:
    """Whether 0 is black: 8 bits, as lossy formats have them, and no more channels than a photograph."""
    return found.kind.startswith(("uint8", "bool")) and found.pixels.channels <= _COLOURS


def blank_note(found: Measured, pixels: Pixels) -> str:
    """Advice if many pixels of colour images are black; else ''."""
    if pixels.nodata is not None or found.blank < _BLANK or not _is_photo(found) or found.pixels.channels == 1:
        return ""
    every = f"all {found.pixels.channels} channels"
    return f"{found.blank:.1%} of the pixels are 0 in {every}. A burnt-in strip or a black border? Crop it."


def measured_options(found: PixelStatistics) -> tuple[list[float], list[float]]:
    """Mean and standard deviation as options take them, to six digits; a constant channel gets the deviation 1."""
    std = np.where(found.high > found.low, found.std, 1.0)
    return [float(f"{v:.6g}") for v in found.mean], [float(f"{v:.6g}") for v in std]


def measure_pixels(
    open_source: Callable[[Pixels], Any],
    pixels: Pixels,
    clip_percentiles: tuple[float, float] | None = None,
    **options: Any,
) -> tuple[Measured, Pixels]:
    """Measures a data set; with percentiles, finds the limits first and then measures the clipped pixels.

    Pixels are measured before images are standardised.

    Args:
        open_source: Opens the source with a record.
        pixels: The record, without the limits.
        clip_percentiles: Low and high, 0..100.
        options: Options of `measure`.

    Returns:
        The statistics; the record with the limits.
    """
    plain = pixels._replace(standardize=None)
    source = open_source(plain)
    found = measure(source, **options)
    if clip_percentiles is None:
        return found, pixels
    low, high = zip(*(_limits(found.pixels, c, clip_percentiles) for c in range(found.pixels.channels)), strict=True)
    plain = plain._replace(clip_low=low, clip_high=high)
    # an indexed source is not listed or scanned again
    source = open_source(plain) if isinstance(source, TimmStream) else source.reading(source.in_chans, plain)
    found = measure(source, **options)._replace(stored=found.stored, blank=found.blank)
    return found, plain._replace(standardize=pixels.standardize)


def _limits(found: PixelStatistics, c: int, percentiles: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(f"{found.percentile(p)[c]:.6g}") for p in percentiles)
    if low < high:
        return low, high
    if found.high[c] > found.low[c]:
        raise ValueError(
            f"--clip-percentiles {percentiles[0]:g} {percentiles[1]:g} leave one value in channel {c + 1}, {low:g}; "
            f"pixels range from {found.low[c]:g} to {found.high[c]:g}. Choose wider ones, such as 0 99.9, or name the "
            "value with --nodata if it is none."
        )
    return low, low + 1  # a constant channel
