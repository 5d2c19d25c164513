"""Measures the pixels of a data set on a seeded sample that is as large as the wanted precision asks for."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..formats.errors import ImageError
from ..formats.header import Header, groups_of, read_header
from ..formats.pixels import Pixels, Stored
from ..sources.stream import TimmStream
from .pixel_statistics import PixelStatistics

ERROR = 0.02  # of the mean, in standard deviations
_LEAST = 32  # images before the error is trusted
_MOST = 2000
_CHUNK = 8
_HEADERS = 64  # files whose headers are compared
_NAMED = 3


class Measured(NamedTuple):
    """Statistics of a sample.

    Attributes:
        pixels: The statistics, in units of the pixels that mean and std are of.
        kind: Type of the stored values.
        unit: What they were divided by.
        total: Images of the data set; None of a stream.
        error: The standard error of the mean that was reached, in standard deviations, of the worst channel.
        wanted: The one that was asked for.
        bad: Why images were left out.
        stored: Smallest and largest stored value, before any clipping.
    """

    pixels: PixelStatistics
    kind: str
    unit: float
    total: int | None
    error: float
    wanted: float
    bad: list[str]
    stored: tuple[float, float]

    @property
    def source(self) -> str:
        """In words: what was measured, and how exactly."""
        of = "the first of a stream" if self.total is None else f"of {self.total}"
        return (
            f"measured on {self.pixels.images} images ({of}), standard error of the mean {self.error:.2g} standard "
            f"deviations"
        )


class _Look(NamedTuple):
    """What a worker tells of an image: its statistics, or why there are none."""

    name: str
    pixels: PixelStatistics | None
    kind: str = ""
    unit: float = 1.0
    why: str = ""


class _Looks(Dataset):
    """`_Look` by index."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, i: int) -> _Look:
        return _look(lambda: self.source[i], lambda: self.source.name(i), self.source)


def _look(load: Callable[[], Any], name: Callable[[], str], source: Any) -> _Look:
    stored: Stored | None = source.pixels.stored
    try:
        image = load()
    except (ImageError, OSError) as error:
        return _Look(name(), None, why=str(error))
    if image.dtype == torch.uint8:  # of a source whose images are always 8-bit
        image, kind, unit, largest = image.float() / 255, "uint8", 255.0, 1.0
    else:
        kind, unit, largest = (stored.kind, stored.unit, stored.largest) if stored else (str(image.dtype), 1.0, None)
    own = PixelStatistics(len(image))
    own.add(image.numpy(), largest)
    return _Look(name(), own, kind, unit)


def measuring(pixels: Pixels) -> Pixels:
    """The record for a source that is to be measured: nodata comes as NaN, types are noted."""
    return pixels._replace(stored=Stored())


def measure(
    source: Any,
    *,
    seed: int = 0,
    error: float = ERROR,
    max_images: int = _MOST,
    workers: int = 0,
    tick: Callable[[int], None] | None = None,
) -> Measured:
    """Measures images of a source in a seeded random order until the mean of each channel is known well enough.

    Images of one data set differ more from each other than their pixels suggest, so the error is estimated from the
    variance between images: after 32 and every eight more. A stream is measured from its beginning. The result depends
    on the source and the seed, not on the workers.

    Args:
        source: Map-style or a stream, opened with `pixels=measuring(...)`.
        seed: Of the order.
        error: Wanted standard error of the mean, in standard deviations of the pixels.
        max_images: Largest number of images to read.
        workers: Processes that decode; 0: this one.
        tick: Called with the number of images that were just read.

    Raises:
        ValueError: No image can be decoded, or they are of different types.
    """
    if not error > 0 or max_images < 2:
        raise ValueError(f"The standard error must be above 0 and images at least 2, got {error} and {max_images}.")
    total = None if isinstance(source, TimmStream) else len(source)
    kinds: dict[str, list[Any]] = {}
    bad: list[str] = []
    found: PixelStatistics | None = None
    unit = 1.0
    for number, look in enumerate(_looks(source, seed, max_images, workers), 1):
        if tick is not None:
            tick(1)
        if look.pixels is None:
            bad.append(look.why)
        else:
            entry = kinds.setdefault(look.kind, [0, look.name])
            entry[0] += 1
            unit = look.unit
            found = found or PixelStatistics(look.pixels.channels)
            found.merge(look.pixels)
        if number >= _LEAST and number % _CHUNK == 0 or number == total:
            if found is not None and _error(found, total) <= error and number != total:
                break
    if found is None:
        reasons = "\n".join(bad[:_NAMED])
        raise ValueError(f"None of {len(bad)} images tried can be read, for example:\n{reasons}")
    if len(kinds) > 1:
        raise _mixed(kinds)
    (kind,) = kinds
    stored = float(found.low.min()) * unit, float(found.high.max()) * unit
    return Measured(found, kind, unit, total, _error(found, total), error, bad, stored)


def _error(found: PixelStatistics, total: int | None) -> float:
    return float(found.standard_error(total).max())


def _looks(source: Any, seed: int, most: int, workers: int) -> Iterator[_Look]:
    if isinstance(source, TimmStream):
        for name, load in islice(source.undecoded(), most):
            yield _look(load, lambda name=name: name, source)
        return
    order = random.Random(seed).sample(range(len(source)), min(most, len(source)))
    chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]
    loader = DataLoader(
        _Looks(source), batch_sampler=chunks, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    for looks in loader:
        yield from looks


def _mixed(kinds: dict[str, list[Any]]) -> ValueError:
    groups = sorted(kinds.items(), key=lambda item: -item[1][0])
    shown = "; ".join(f"{count} of {kind} ({name})" for kind, (count, name) in groups)
    return ValueError(
        f"The images are of {len(kinds)} types, and one mean and one scale do not fit them: {shown}. Convert them to "
        "one, or keep each type in a folder of its own; to train on the mixture all the same, give --mean and --std."
    )


def find_channels(source: Any, seed: int = 0, page: int | str | None = None) -> int:
    """Channels of the files of a source that has `path(i)`, by the headers of a few; grey and colour together are 3.

    Args:
        source: Of files.
        seed: Of the choice.
        page: As of `read_header`.

    Raises:
        ValueError: No header can be read, or files differ in channels; names the groups and how many they are.
    """
    headers: list[tuple[str, Header]] = []
    bad: list[str] = []
    for i in random.Random(seed).sample(range(len(source)), min(_HEADERS, len(source))):
        try:
            headers.append((source.name(i), read_header(source.path(i), page)))
        except (ImageError, OSError) as error:
            bad.append(f"{source.name(i)}: {error}")
    if not headers:
        reasons = "\n".join(bad[:_NAMED])
        raise ValueError(f"None of {len(bad)} images tried can be read, for example:\n{reasons}")
    channels = {header.channels for _, header in headers}
    if len(channels) > 1 and channels != {1, 3}:
        raise ValueError(
            f"The images differ in their channels, of {len(headers)} tried: {groups_of(headers)}. Keep each kind in a "
            "folder of its own, or name the one to read with --in-chans."
        )
    return max(channels)


def measured_options(found: PixelStatistics) -> tuple[list[float], list[float]]:
    """Mean and standard deviation as options take them, to six digits; a constant channel has the deviation 1.

    Divided by a deviation of 0, it would not be a number.
    """
    mean = [float(f"{v:.6g}") for v in found.mean]
    varies = found.high > found.low
    std = [float(f"{v:.6g}") if more else 1.0 for v, more in zip(found.std, varies, strict=True)]
    return mean, std


def measure_pixels(
    open_source: Callable[[Pixels], Any],
    pixels: Pixels,
    clip_percentiles: tuple[float, float] | None = None,
    **options: Any,
) -> tuple[Measured, Pixels]:
    """Measures a data set; with percentiles, finds the limits first and measures the clipped pixels of a second look.

    Args:
        open_source: Opens the source with this record.
        pixels: The record as far as it is known.
        clip_percentiles: Low and high, 0..100.
        options: Those of `measure`.

    Returns:
        What was found; the record with the limits.

    Raises:
        ValueError: See `measure`; or almost all pixels of a channel have one value, which leaves no room for limits.
    """
    source = open_source(measuring(pixels))
    found = measure(source, **options)
    if clip_percentiles is None:
        return found, pixels
    limits = [_limits(found.pixels, c, clip_percentiles) for c in range(found.pixels.channels)]
    low, high = zip(*limits, strict=True)
    pixels = pixels._replace(clip_low=low, clip_high=high)
    if isinstance(source, TimmStream):
        source = open_source(measuring(pixels))
    else:
        source = source.reading(source.in_chans, measuring(pixels))  # neither listed nor scanned again
    return measure(source, **options)._replace(stored=found.stored), pixels


def _limits(found: PixelStatistics, c: int, percentiles: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(f"{found.percentile(p)[c]:.6g}") for p in percentiles)
    if not low < high:
        if found.high[c] > found.low[c]:
            raise ValueError(
                f"--clip-percentiles {percentiles[0]:g} {percentiles[1]:g} leave one value in channel {c + 1}, "
                f"{low:g}, and pixels range from {found.low[c]:g} to {found.high[c]:g}: choose wider ones, "
                "such as 0 99.9, or name the value with --nodata if it is none."
            )
        high = low + 1  # a constant channel
    return low, high
