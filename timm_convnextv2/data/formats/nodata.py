"""Pixels that are no data: named, replaced where their value is known, and refused where it shows."""

from typing import NamedTuple

import numpy as np

from .errors import EmptyError, ImageError
from .pixels import Pixels, Stored

# no measured pixel: the squares of such numbers leave float32
_HUGE = 1e18
# values that stand for nodata by convention; refused where they also lie far from all others
_SENTINELS = (-999.0, -9999.0, -99999.0, -999999.0, -32768.0, 9999.0, 99999.0, 999999.0)


class Nodata(NamedTuple):
    """What stands for nodata in an image, in units of the stored values.

    Attributes:
        values: These do.
        given: The user has named a value: NaN and infinities are nodata, too, and none is guessed.
        divide: What stored values are divided by, see `Pixels`.
        stored: Asks for what was stored, see `Stored`: NaN and infinities are nodata, and nodata comes as NaN.
    """

    values: tuple[float, ...] = ()
    given: bool = False
    divide: float | None = None
    stored: Stored | None = None

    @classmethod
    def of(cls, pixels: Pixels) -> "Nodata":
        """The part of the record that is about stored values."""
        named = () if pixels.nodata is None else (float(pixels.nodata),)
        return cls(named, bool(named), pixels.divide, pixels.stored)


def parse_tag(nodata: Nodata, tag: str | bytes | None) -> Nodata:
    """Adds the value of a TIFF's tag 42113 (GDAL_NODATA), which is text.

    Raises:
        ImageError: (a ValueError) The tag is no number.
    """
    if tag is None:
        return nodata
    text = (tag.decode("latin-1") if isinstance(tag, bytes) else str(tag)).strip("\0 \n")
    try:
        return nodata._replace(values=(*nodata.values, float(text)))
    except ValueError:
        raise ImageError(f"has the nodata tag (42113) '{text}', expected a number") from None


def fill_nodata(x: np.ndarray, nodata: Nodata) -> np.ndarray:
    """Replaces nodata by the mean of the channel's other pixels in this image.

    Of signed integers and floats each value counts by itself. Of unsigned integers, where nodata is mostly 0 or the
    largest value and single channels have these as data, a pixel is nodata if all its channels have the value.

    Args:
        x: `[C, H, W]` as stored.
        nodata: What to replace.

    Returns:
        `[C, H, W]` of the same type; `x` itself where nothing is replaced.

    Raises:
        EmptyError: (an ImageError) A channel has nothing else.
    """
    gone = find_nodata(x, nodata)
    if not gone.any():
        return x
    valid = (~gone).sum((1, 2))
    if not valid.all():
        where = "is nodata everywhere" if not valid.any() else f"is nodata everywhere in channel {valid.argmin() + 1}"
        raise EmptyError(f"{where} ({' or '.join(map(_text, nodata.values)) or 'NaN'})")
    mean = np.where(gone, 0, x).sum((1, 2), dtype=np.float64) / valid
    if x.dtype.kind in "iu":
        mean = np.rint(mean)
    return np.where(gone, mean[:, None, None].astype(x.dtype), x)


def find_nodata(x: np.ndarray, nodata: Nodata) -> np.ndarray:
    """Which values of `x`, `[C, H, W]` as stored, are nodata: bool of the same shape; see `fill_nodata`."""
    gone = np.zeros(x.shape, bool)
    for value in nodata.values:
        equal = _equals(x, value)
        gone |= equal.all(0) if x.dtype.kind in "bu" else equal
    if (nodata.given or nodata.stored is not None) and x.dtype.kind == "f":
        gone |= ~np.isfinite(x)
    return gone


def _equals(x: np.ndarray, value: float) -> np.ndarray:
    if np.isnan(value):
        return np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.shape, bool)
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return x == np.asarray(value).astype(x.dtype)  # -3.4028235e+38 as text is no float32 to the last digit
    if x.dtype.kind == "b" or (value.is_integer() and np.iinfo(x.dtype).min <= value <= np.iinfo(x.dtype).max):
        return x == int(value)
    return np.zeros(x.shape, bool)


def refuse_nodata(x: np.ndarray, nodata: Nodata) -> None:
    """Refuses values that can only be nodata and that nobody has named.

    These are NaN, infinities, numbers from 1e18, and, unless a value is given, conventional ones such as -9999 that
    lie further from all others of their channel than these from each other.

    Args:
        x: `[C, H, W]` as stored, after `fill_nodata`; a float or a signed integer type.
        nodata: What was replaced.

    Raises:
        ImageError: (a ValueError) Says which value, in how many pixels, and the remedy.
    """
    low, high = x.min((1, 2)), x.max((1, 2))
    if x.dtype.kind == "f" and not (np.isfinite(low).all() and np.isfinite(high).all()):
        nan = np.isnan(x)
        value = np.nan if nan.any() else x[np.isinf(x)][0]
        found = nan if nan.any() else np.isinf(x)
        what = "NaN" if nan.any() else "infinite values"
        raise ImageError(f"contains {what} {_share(found)}, which is nodata; {_remedy(value)}")
    for value in (low.min(), high.max()):
        if abs(float(value)) >= _HUGE:
            name = _name_of(value, x.dtype)
            raise ImageError(f"contains {_text(value)} {_share(x == value)}, {name}, which is nodata; {_remedy(value)}")
    if nodata.given:
        return
    for channel, bounds in zip(x, zip(low, high, strict=True), strict=True):
        for value in bounds:
            if float(value) in _SENTINELS and _far_off(channel, value):
                raise ImageError(
                    f"contains {_text(value)} {_share(channel == value)} and nothing near it: most likely nodata; "
                    f"{_remedy(value)} (if it is data: --nodata nan)"
                )


def _share(found: np.ndarray) -> str:
    return f"in {100 * found.mean():.2g} % of its values"


def _name_of(value: float, dtype: np.dtype) -> str:
    for kind in (np.float32, np.float64) if dtype.itemsize > 4 else (np.float32,):
        info = np.finfo(kind)
        if float(value) in (float(info.min), float(info.max)):
            return f"the {'smallest' if value < 0 else 'largest'} {info.dtype}"
    return "too large for a pixel" if abs(value) <= np.finfo(np.float32).max else "infinite as float32"


def _text(value: float) -> str:
    return str(value).removesuffix(".0")  # of a numpy scalar: as short as its type allows


def _remedy(value: float) -> str:
    return f"name it with --nodata={_text(value)} to replace it by the mean of the other pixels"


def _far_off(channel: np.ndarray, value: float) -> bool:
    others = channel[channel != value].astype(np.float64)
    return not others.size or np.abs(others - float(value)).min() > others.max() - others.min()
