"""Mean, spread, percentiles and histogram of the pixels of a data set, per channel; parts merge exactly."""

import math
from typing import Any

import numpy as np

PERCENTILES = (1, 5, 50, 95, 99)
_BINS = 8192
_DIGITS = 40  # binary digits of a bin's number, of the 53 of a float64


class PixelStatistics:
    """Statistics in which each pixel counts the same, in float64. `add` takes images, `merge` other statistics.

    Count, mean and sum of squared deviations are merged by Chan's formulas. The bins of a channel's histogram have a
    power of two as width and multiples of it as edges: two histograms merge without loss at the coarser width, in any
    order. The width is the smallest at which at most 8192 bins hold all values; it is `resolution`, the largest error
    of a percentile. Each bin keeps its smallest value: a percentile is a value that occurs, and exact if a bin holds
    one value, as with 8 and 12 bits, or if it is 0.

    Attributes (by channel, `[C]`, but for `blank`, the number of pixels that are 0 in all channels):
        count, missing: Pixels that have a value; those that have none (NaN, infinity, nodata).
        mean, low, high: Mean (NaN if no pixel has a value), smallest and largest value.
        zeros, saturated: Pixels that are 0, and that have the largest value of the type.
    """

    def __init__(self, channels: int) -> None:
        self.images, self.channels, self.blank = 0, channels, 0
        self.count, self.missing, self.zeros, self.saturated = (np.zeros(channels, np.int64) for _ in range(4))
        self.mean, self.squares = np.zeros(channels), np.zeros(channels)
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._bins: list[_Bins] = [_NO_BINS] * channels
        self._of_images: list[np.ndarray] = []  # pixels and sum of each image, for the standard error of the mean

    def add(self, image: np.ndarray, largest: float | None = None) -> None:
        """Adds an image."""
        own = PixelStatistics(self.channels)
        own.images, own.blank = 1, int((np.asarray(image) == 0).all(0).sum())
        sums = np.zeros((2, self.channels))
        for c, channel in enumerate(np.asarray(image, np.float64)):
            values = channel[np.isfinite(channel)]
            own.count[c], own.missing[c] = values.size, channel.size - values.size
            if not values.size:
                continue
            own.mean[c] = values.mean()
            own.squares[c] = np.square(values - own.mean[c]).sum()
            own.low[c], own.high[c] = values.min(), values.max()
            own.zeros[c] = np.count_nonzero(values == 0)
            # float32 holds an integer's largest value, divided, to half of its last digit
            own.saturated[c] = 0 if largest is None else np.count_nonzero(values >= largest * (1 - 1e-7))
            own._bins[c] = _histogram(values)
            sums[:, c] = values.size, values.sum()
        own._of_images = [sums]
        self.merge(own)

    def merge(self, other: "PixelStatistics") -> None:
        """Adds the statistics of other images."""
        if self.channels != other.channels:
            raise ValueError(f"Statistics of {other.channels} channels cannot be added to those of {self.channels}.")
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        self.squares = self.squares + other.squares + np.square(delta) * self.count * share
        self.mean = self.mean + delta * share
        self.count, self.missing = count, self.missing + other.missing
        self.zeros, self.saturated = self.zeros + other.zeros, self.saturated + other.saturated
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self._bins = [_merged(*pair) for pair in zip(self._bins, other._bins, strict=True)]
        self._of_images += other._of_images
        self.images, self.blank = self.images + other.images, self.blank + other.blank

    @property
    def std(self) -> np.ndarray:
        """Standard deviation over all pixels, `[C]`."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    @property
    def between(self) -> np.ndarray:
        """Standard deviation of the means of images, weighted by their pixels, `[C]`."""
        pixels, sums = np.stack(self._of_images).transpose(1, 0, 2)
        deviations = sums / np.maximum(pixels, 1) - self.mean
        return np.sqrt((pixels * np.square(deviations)).sum(0) / np.maximum(self.count, 1))

    @property
    def within(self) -> np.ndarray:
        """Standard deviation of pixels around the mean of their image, `[C]`."""
        return np.sqrt(np.maximum(np.square(self.std) - np.square(self.between), 0))

    @property
    def resolution(self) -> np.ndarray:
        """Width of the histogram's bins, `[C]`."""
        return np.array([math.ldexp(1.0, power) for power, *_ in self._bins])

    def standard_error(self, total: int | None = None) -> np.ndarray:
        """Standard error of the mean, in standard deviations of the pixels, `[C]`; 0 if all `total` images were seen.

        The sample consists of images, because the pixels of one image are alike. Images may differ in size, so this is
        the error of a ratio of sums (Cochran, Sampling Techniques, 1977, section 6.4).
        """
        n = len(self._of_images)
        std = self.std
        constant = ~(self.high > self.low)  # rounding may leave a small deviation
        if n < 2:
            return np.where(constant, 0.0, 0.0 if total == n else np.inf)
        pixels, sums = np.stack(self._of_images).transpose(1, 0, 2)
        residuals = sums - self.mean * pixels
        variance = np.square(residuals).sum(0) / (n - 1) / n / np.square(np.maximum(pixels.mean(0), 1e-300))
        left = 1.0 if total is None else max(0.0, 1 - n / total)
        return np.where(constant, 0.0, np.sqrt(variance * left) / np.where(constant, 1, std))

    def percentile(self, percent: float) -> np.ndarray:
        """Percentile of each channel, `[C]`, to within `resolution`; NaN without pixels."""
        return np.array([self._percentile(c, percent) for c in range(self.channels)])

    def _percentile(self, c: int, percent: float) -> float:
        _, _, counts, lows = self._bins[c]
        if not counts.size:
            return math.nan
        if percent == 100:
            return float(self.high[c])
        return float(lows[np.searchsorted(np.cumsum(counts), percent * self.count[c] / 100)])

    def histogram(self, channel: int, bins: int = 128) -> tuple[np.ndarray, np.ndarray]:
        """Edges `[n + 1]` and counts `[n]` of a channel's histogram with at most `bins` bins."""
        power, first, counts, lows = self._bins[channel]
        while counts.size > bins:
            power, first, counts, lows = _coarser(power, first, counts, lows)
        return np.ldexp(np.arange(first, first + counts.size + 1, dtype=np.float64), power), counts

    def channel(self, c: int) -> dict[str, Any]:
        """A channel's statistics for JSON; shares are fractions of the pixels that have a value."""
        count = int(self.count[c])
        if not count:
            return {"pixels": 0, "missing": 1.0}
        named = {f"p{p}": self._percentile(c, p) for p in PERCENTILES}
        values = {"mean": self.mean[c], "std": self.std[c], "between": self.between[c], "within": self.within[c]}
        values |= {"min": self.low[c], **named, "max": self.high[c]}
        values |= {"zeros": self.zeros[c] / count, "saturated": self.saturated[c] / count}
        values |= {"missing": self.missing[c] / (count + self.missing[c]), "resolution": self.resolution[c]}
        return {name: float(value) for name, value in values.items()} | {"pixels": count}


# width as a power of two, number of the first bin, pixels in each, smallest value in each
_Bins = tuple[int, int, np.ndarray, np.ndarray]
_NO_BINS: _Bins = (0, 0, np.zeros(0, np.int64), np.zeros(0))


def _power(low: float, high: float) -> int:
    """The smallest power of two at which at most `_BINS` bins hold all values."""
    _, exponent = math.frexp(max(abs(low), abs(high)))
    power = exponent - _DIGITS
    if high > low:
        power = max(power, math.frexp((high - low) / _BINS)[1] - 1)
    while math.floor(math.ldexp(high, -power)) - math.floor(math.ldexp(low, -power)) >= _BINS:
        power += 1
    return power


def _histogram(values: np.ndarray) -> _Bins:
    low, high = float(values.min()), float(values.max())
    power = _power(low, high)
    first = math.floor(math.ldexp(low, -power))
    numbers = np.floor(np.ldexp(values, -power)).astype(np.int64) - first
    counts = np.bincount(numbers)
    lows = np.full(counts.size, np.inf)
    np.minimum.at(lows, numbers, values)
    return power, first, counts, lows


def _coarser(power: int, first: int, counts: np.ndarray, lows: np.ndarray) -> _Bins:
    """Bins of twice the width."""
    more = (first % 2, (first + counts.size) % 2)
    counts, lows = np.pad(counts, more), np.pad(lows, more, constant_values=np.inf)
    return power + 1, first // 2, counts.reshape(-1, 2).sum(1), lows.reshape(-1, 2).min(1)


def _merged(a: _Bins, b: _Bins) -> _Bins:
    if not a[2].size or not b[2].size:
        return a if a[2].size else b
    while a[0] != b[0] or max(a[1] + a[2].size, b[1] + b[2].size) - min(a[1], b[1]) > _BINS:
        a, b = (_coarser(*a), b) if a[0] <= b[0] else (a, _coarser(*b))
    first = min(a[1], b[1])
    size = max(a[1] + a[2].size, b[1] + b[2].size) - first
    counts, lows = np.zeros(size, np.int64), np.full(size, np.inf)
    for _, start, part, smallest in (a, b):
        here = slice(start - first, start - first + part.size)
        counts[here] += part
        lows[here] = np.minimum(lows[here], smallest)
    return a[0], first, counts, lows
