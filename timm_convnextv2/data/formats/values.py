"""Scales stored values to pixels; fills named nodata and refuses unnamed nodata."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import EmptyError, ImageError
from .pixels import Pixels

_HUGE = 1e18  # never a measured pixel: squares of such numbers overflow float32
# conventional nodata values; refused if they also lie far from all others
_SENTINELS = (-999.0, -9999.0, -99999.0, -999999.0, -32768.0, 9999.0, 99999.0, 999999.0)


@dataclass
class Stored:
    """The stored values of the last image that was decoded within `noting_stored`."""

    kind: str = ""  # type of the values, such as 'uint16'; '' before the first image
    unit: float = 1.0  # their divisor
    largest: float | None = None  # largest value of the type, divided; None for floats
    clear: float = 0.0  # fraction of the pixels whose alpha is 0 and whose colours are used all the same
    measure: bool = True  # decoding leaves nodata as NaN instead of a mean


_NOTED: ContextVar[Stored | None] = ContextVar("noted", default=None)


@contextmanager
def noting_stored(measure: bool = True) -> Iterator[Stored]:
    """Decoding notes the type of stored values; in measurements it leaves nodata as NaN instead of a mean."""
    token = _NOTED.set(stored := Stored(measure=measure))
    try:
        yield stored
    finally:
        _NOTED.reset(token)


def gaps_stay(pixels: Pixels) -> bool:
    """Whether decoding leaves nodata as NaN: in measurements, and until an image is standardised."""
    return noting() or pixels.standardize is not None


def noting() -> bool:
    """Whether a measurement is running."""
    return (stored := _NOTED.get()) is not None and stored.measure


def note_clear(image: Any) -> None:
    """Records the pixels of a Pillow image whose alpha is 0 and will be dropped, within `noting_stored`."""
    if (stored := _NOTED.get()) is not None:
        stored.clear = float((np.asarray(image.getchannel("A")) == 0).mean())


def note_stored(kind: str, unit: float, largest: float | None) -> None:
    """Records the type of an image's values within `noting_stored`."""
    if (stored := _NOTED.get()) is not None:
        stored.kind, stored.unit, stored.largest = kind, unit, None if largest is None else largest / unit


def scaled(
    x: np.ndarray,
    pixels: Pixels,
    tag: float | None = None,
    bits: int | None = None,
    masked: np.ndarray | None = None,
) -> torch.Tensor:
    """Stored values on the scale that `load_image` promises, nodata filled.

    8-bit values stay uint8, unless a divisor or a measurement needs float32; all others become float32.

    Args:
        x: `[C, H, W]` as stored.
        pixels: Names nodata and the divisor.
        tag: A second value that means "no data", from the file's metadata.
        bits: Bits in use of unsigned integers; all by default.
        masked: Bool `[H, W]`, pixels that are nodata whatever their value.
    """
    if 0 in x.shape:
        raise ImageError(f"is empty, shape {x.shape}")
    check_dtype(x.dtype, pixels.divide)
    x, gone = fill_nodata(x, pixels, tag, masked)
    if x.dtype.kind in "fi":
        _refuse_unnamed(x, guess=pixels.nodata is None)
    needs_float = pixels.divide is not None or noting() or gaps_stay(pixels) and gone.any()
    if x.dtype == np.uint8 and bits in (None, 8) and not needs_float:
        return torch.from_numpy(np.array(x))
    largest = largest_value(x.dtype, bits)
    unit = pixels.divide or largest or 1
    if x.dtype.kind in "iu" and x.dtype.itemsize > 2 or x.dtype == np.float64 and unit != 1:
        divided = (x / unit).astype(np.float32)  # before the conversion, which keeps the last digits
    else:
        divided = x.astype(np.float32) if unit == 1 else x.astype(np.float32) / np.float32(unit)
    found = torch.from_numpy(divided)
    # a divisor puts images with other bits on one scale
    whole = bits in (None, 8 * x.dtype.itemsize) or pixels.divide is not None
    note_stored(str(x.dtype) if whole else f"{x.dtype} ({bits} bits)", unit, largest)
    if gaps_stay(pixels):
        found[torch.from_numpy(gone)] = torch.nan
    return found


def largest_value(dtype: np.dtype, bits: int | None = None) -> int | None:
    """The largest value of an integer type, or of its first `bits`; 1 for bool, None for floats."""
    if dtype.kind in "bf":
        return 1 if dtype.kind == "b" else None
    return int(np.iinfo(dtype).max) if bits is None else 2**bits - 1


def check_dtype(dtype: np.dtype, divide: float | None = None) -> None:
    """Refuses 32 and 64-bit integers without a divisor: few images use their range, so they would be black."""
    if dtype.kind not in "bf" and not (dtype.kind in "iu" and (dtype.itemsize <= 2 or divide is not None)):
        raise ImageError(
            f"holds {dtype}, expected uint8, int16, uint16, bool or a float type; name the largest value of your data "
            "with --divide, or divide by it and save as float32"
        )


def parse_tag(tag: str | bytes | None) -> float | None:
    """The value of a TIFF's tag 42113 (GDAL_NODATA), which is text."""
    if tag is None:
        return None
    text = (tag.decode("latin-1") if isinstance(tag, bytes) else str(tag)).strip("\0 \n")
    try:
        return float(text)
    except ValueError:
        raise ImageError(f"has the nodata tag (42113) '{text}', expected a number") from None


def fill_nodata(
    x: np.ndarray, pixels: Pixels, tag: float | None = None, masked: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`x`, `[C, H, W]` as stored, with the mean of the channel's other pixels instead of nodata; the mask of nodata.

    In signed integers and floats each value counts by itself. In unsigned integers, where nodata is mostly 0 or the
    largest value and single channels have these as data, a pixel is nodata if all its channels have the value. NaN and
    infinity are nodata if the user names any value, and in measurements.
    """
    gone, named = np.zeros(x.shape, bool), [float(value) for value in (pixels.nodata, tag) if value is not None]
    for value in named:
        equal = _equals(x, value)
        gone |= equal.all(0) if x.dtype.kind in "bu" else equal
    if x.dtype.kind == "f" and (pixels.nodata is not None or noting()):
        gone |= ~np.isfinite(x)
    if masked is not None:
        gone |= masked
    if not gone.any():
        return x, gone
    valid = (~gone).sum((1, 2))
    if not valid.all():
        channel = f" in channel {valid.argmin() + 1}" if valid.any() else ""
        raise EmptyError(f"is nodata everywhere{channel} ({' or '.join(map(_text, named)) or 'NaN, mask or alpha'})")
    mean = np.where(gone, 0, x).sum((1, 2), dtype=np.float64) / valid
    if x.dtype.kind in "iu":
        mean = np.rint(mean)
    return np.where(gone, mean[:, None, None].astype(x.dtype), x), gone


def _equals(x: np.ndarray, value: float) -> np.ndarray:
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):  # '-3.4028235e+38' is not the float32 to the last digit
            return np.isnan(x) if np.isnan(value) else x == np.asarray(value).astype(x.dtype)
    if x.dtype.kind == "b" or value.is_integer() and np.iinfo(x.dtype).min <= value <= np.iinfo(x.dtype).max:
        return x == value
    return np.zeros(x.shape, bool)


def _refuse_unnamed(x: np.ndarray, guess: bool) -> None:
    """Refuses values that can only be nodata unless the user named them.

    These are NaN, infinities, and numbers from 1e18; with `guess` also conventional ones such as -9999 that lie further
    from all other values of their channel than these from each other.
    """
    low, high = x.min((1, 2)), x.max((1, 2))
    if x.dtype.kind == "f" and not (np.isfinite(low).all() and np.isfinite(high).all()):
        nan = np.isnan(x)
        found, what = (nan, "NaN") if nan.any() else (np.isinf(x), "infinite values")
        raise _unnamed(what, found, "which is nodata", x[found][0])
    for value in (low.min(), high.max()):
        if abs(float(value)) >= _HUGE:
            raise _unnamed(_text(value), x == value, f"{_name_of(value, x.dtype)}, which is nodata", value)
    for channel, bounds in zip(x, zip(low, high, strict=True), strict=True):
        for value in bounds if guess else ():
            if float(value) in _SENTINELS and _far_off(channel, value):
                most_likely = "and nothing near it: most likely nodata (if it is data: --nodata nan)"
                raise _unnamed(_text(value), channel == value, most_likely, value)


def _unnamed(what: str, found: np.ndarray, reason: str, value: float) -> ImageError:
    return ImageError(
        f"contains {what} in {100 * found.mean():.2g} % of its values, {reason}; name it with --nodata={_text(value)} "
        "to replace it by the mean of the other pixels"
    )


def _name_of(value: float, dtype: np.dtype) -> str:
    for kind in (np.float32, np.float64) if dtype.itemsize > 4 else (np.float32,):
        info = np.finfo(kind)
        if float(value) in (float(info.min), float(info.max)):
            return f"the {'smallest' if value < 0 else 'largest'} {info.dtype}"
    return "too large for a pixel" if abs(value) <= np.finfo(np.float32).max else "infinite as float32"


def _text(value: float) -> str:
    return str(value).removesuffix(".0")  # a numpy scalar prints as few digits as its type allows


def _far_off(channel: np.ndarray, value: float) -> bool:
    others = channel[channel != value].astype(np.float64)
    return not others.size or np.abs(others - float(value)).min() > others.max() - others.min()
