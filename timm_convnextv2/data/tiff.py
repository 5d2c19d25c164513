"""TIFF beyond Pillow: which files these are, and how tifffile reads them."""

import json
import math
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .arrays import largest_value, scaled
from .errors import ImageError, MissingPackageError, wrong_channels
from .files import check_size
from .nodata import Nodata, parse_tag

__all__ = ["NODATA_TAG", "PALETTE", "is_tiff", "pillow_keeps_all", "read_tiff"]

NODATA_TAG = 42113  # GDAL_NODATA
_DESCRIPTION, _SUBFILE_TYPE, _SUB_IFDS = 270, 254, 330
_WEBP = 50001  # opened by Pillow, whose libtiff mostly does not decode it
# LSM, MetaMorph (STK), FluoView, Micro-Manager: axes that only tifffile knows
_MICROSCOPES = (34412, 33628, 33629, 34361, 34362, 51123)
PALETTE, _CMYK, _YCBCR, _LAB = 3, 5, 6, 8
_COLOURS_OF_PILLOW = (PALETTE, _CMYK, _YCBCR, _LAB)
_MIN_IS_WHITE, _RGB = 0, 2
_ASSOCIATED, _UNASSOCIATED = 1, 2  # alpha, by the tag of extra samples
_LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


def is_tiff(file: BinaryIO) -> bool:
    """Whether a file begins as TIFF or BigTIFF do; leaves it at its beginning."""
    head = file.read(4)
    file.seek(0)
    return head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def pillow_keeps_all(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow gives all bands, bits and signs of an opened TIFF, and what it drops means nothing.

    It takes 16-bit RGB as 8-bit, leaves out extra bands, reads int8 as uint8, does not invert 16-bit MinIsWhite, and
    knows nothing of axes and of what sub-IFDs are.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    if _names_axes(image) or _SUB_IFDS in tags or tags.get(_SUBFILE_TYPE, 0) & 1 or tags.get(259) == _WEBP:
        return False
    bits, samples, photometric = tags.get(258, (1,)), tags.get(277, 1), tags.get(262, _MIN_IS_WHITE)
    if in_chans == 4:
        return image.mode == "RGBA" and max(bits) <= 8
    if in_chans not in (1, 3):
        return False
    if photometric in _COLOURS_OF_PILLOW:
        return True
    if any(kind != 1 for kind in tags.get(339, (1,))) and (image.mode != "F" or photometric == _MIN_IS_WHITE):
        return False
    if max(bits) not in (1, 2, 4, 8, 16, 32) or max(bits) > 8 and photometric == _MIN_IS_WHITE:
        return False
    colours = samples - sum(extra in (_ASSOCIATED, _UNASSOCIATED) for extra in tags.get(338, ()))
    if image.mode == "I" or colours not in (1, 3) or samples > 1 and max(bits) > 8:
        return False
    # as many pages as channels: are they these?
    return not (in_chans == 3 and colours == 1 and getattr(image, "n_frames", 1) == 3)


def _names_axes(image: Image.Image) -> bool:
    """Whether a TIFF is more than its first page, and says what the others are."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if any(tag in tags for tag in _MICROSCOPES):
        return True
    text = tags.get(_DESCRIPTION, "")
    text = text if isinstance(text, str) else str(text)
    if not text:
        return False
    if text.startswith("{"):  # of tifffile
        try:
            page = image.width * image.height * tags.get(277, 1)
            return math.prod(json.loads(text)["shape"]) != page
        except (ValueError, TypeError, KeyError):
            return getattr(image, "n_frames", 1) > 1
    # an ImageJ file may have one page for all
    return "<OME" in text or bool(re.match(r"ImageJ=.*\nimages=", text)) or getattr(image, "n_frames", 1) > 1


def read_tiff(file: BinaryIO, in_chans: int, nodata: Nodata, by_pillow: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The first image of a TIFF with tifffile, see `load_image`.

    Args:
        file: At its beginning.
        in_chans: Channels wanted.
        nodata: That of the option; the tag is added.
        by_pillow: Reads the first page, for colours that only Pillow converts.

    Raises:
        ImageError: (a ValueError) Axes, channels, tags or size that do not fit.
        MissingPackageError: (a ValueError) tifffile or imagecodecs is needed and not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise MissingPackageError(
            "TIFF that is multi-band, 16-bit colour or otherwise beyond Pillow; run `pip install tifffile imagecodecs`"
        ) from error
    with tifffile.TiffFile(file) as tif:
        series = tif.series[0]
        page = series.keyframe
        _refuse_parts(series, page)
        wanted = _choose_axes(series.axes, series.shape, page, in_chans)
        check_size(page.imagelength, page.imagewidth)
        if page.is_tiled:
            check_size(page.tilelength, page.tilewidth, "tile")
        if page.photometric in _COLOURS_OF_PILLOW and in_chans in (1, 3):
            if "C" in wanted:
                raise ImageError("has channels in palette, CMYK, YCbCr or Lab colours; save them as MinIsBlack")
            return by_pillow()
        try:
            x = _read_pages(tif, series, page, wanted)
        except Exception as error:
            raise _codec_missing(page, error) or error from None
        return _to_channels(x, page, in_chans, parse_tag(nodata, page.tags.valueof(NODATA_TAG)))


def _refuse_parts(series: Any, page: Any) -> None:
    """Refuses files whose first page is a thumbnail, or that are one of several files of an image."""
    if page.subfiletype & 1:
        raise ImageError(
            "has a thumbnail as its first page, the image itself is another page or sub-IFD, as in raw files of "
            "cameras; convert it to a plain TIFF"
        )
    if series.is_multifile or series.transform is not None:
        raise ImageError(f"is one of several files of an image, or of a kind ({series.kind}) to be converted first")
    for sub in page.pages or ():
        if sub.imagewidth * sub.imagelength > page.imagewidth * page.imagelength:
            raise ImageError(
                f"has a larger image in a sub-IFD ({sub.imagelength} x {sub.imagewidth}) than in its first page "
                f"({page.imagelength} x {page.imagewidth}); convert it to a plain TIFF"
            )


def _choose_axes(axes: str, shape: tuple[int, ...], page: Any, in_chans: int) -> str:
    """The axes to read of a series: Y and X, and the one of the channels if there is one; of others the first entry.

    C, the samples of a pixel (S), and where these are missing an axis without meaning (Q, or I: plain pages) that has
    `in_chans` entries. Never depth, time or another axis that has a name.
    """
    import tifffile

    sizes = dict(zip(axes, shape, strict=True))
    if not {"Y", "X"} <= set(axes) or len(sizes) != len(axes):
        raise ImageError(f"has axes {axes}, expected images with axes Y and X")
    named = [axis for axis in axes if axis not in "YXSCIQ"]
    if named:
        names = ", ".join(f"{tifffile.TIFF.AXES_NAMES.get(axis, axis)} ({axis}: {sizes[axis]})" for axis in named)
        raise ImageError(
            f"is a stack with axes {axes}, it has the axis {names}, which is no channel; save each slice as an image "
            "of its own or, if the slices are the channels, name that axis C: tifffile.imwrite(FILE, stack, "
            "imagej=True, metadata={'axes': 'CYX'})"
        )
    if "S" in axes and "C" in axes:
        raise ImageError(f"has axes {axes}, colours in each of {sizes['C']} channels; save it as .npy with one axis")
    if "C" in axes and sizes["C"] != in_chans:
        raise wrong_channels(f"{sizes['C']} channels (axes {axes})", in_chans)
    if "S" in axes or "C" in axes:
        return "".join(axis for axis in axes if axis in "YXSC")
    unnamed = [axis for axis in axes if axis in "IQ"]
    if len(unnamed) == 1 and sizes[unnamed[0]] == in_chans:
        if unnamed == ["I"] and in_chans == 3:
            raise ImageError(
                "has 3 pages of one channel and does not say whether they are channels; save it with axes CYX "
                "(tifffile.imwrite(FILE, x, imagej=True, metadata={'axes': 'CYX'})), or each page as a file of its own"
            )
        return axes
    if "Q" in unnamed:
        raise wrong_channels(f"axes {axes} of {shape}, the first without a name", in_chans)
    return "YX"


def _read_pages(tif: Any, series: Any, page: Any, wanted: str) -> np.ndarray:
    """Reads the pages that the wanted axes are in, no others: `[C, Y, X]`."""
    axes, shape = series.axes, series.shape
    leading = len(axes) - len(page.axes)
    if leading == 0 or axes[leading:] != page.axes or all(axis in wanted for axis in axes):
        x = series.asarray()
    else:
        numbers = np.arange(math.prod(shape[:leading])).reshape(shape[:leading])
        chosen = numbers[tuple(slice(None) if axis in wanted else 0 for axis in axes[:leading])]
        x = tif.asarray(series=0, key=chosen.ravel().tolist())
        x = x.reshape(*chosen.shape, *page.shape)
        axes = "".join(axis for i, axis in enumerate(axes) if i >= leading or axis in wanted)
    x = x[tuple(slice(None) if axis in wanted else 0 for axis in axes)]
    axes = "".join(axis for axis in axes if axis in wanted)
    channel = next((axis for axis in axes if axis not in "YX"), "")
    # X before Y, as some instruments write it
    order = [axes.index(axis) for axis in f"{channel}YX"]
    return x.transpose(order) if channel else x.transpose(order)[None]


def _codec_missing(page: Any, error: Exception) -> MissingPackageError | None:
    """The error of a compression that only imagecodecs decodes; None where it is not the cause."""
    if not isinstance(error, ImportError) and "imagecodecs" not in str(error):
        return None
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        pass
    else:
        return None
    name = getattr(page.compression, "name", page.compression)
    return MissingPackageError(f"TIFF with compression {name}; run `pip install imagecodecs`")


def _to_channels(x: np.ndarray, page: Any, in_chans: int, nodata: Nodata) -> torch.Tensor:
    """Stored values `[C, H, W]` as the channels asked for."""
    x = _without_alpha(x, tuple(page.extrasamples or ()), in_chans)
    bits = page.bitspersample if x.dtype.kind == "u" else None
    if page.photometric == _MIN_IS_WHITE and x.dtype.kind not in "bu":
        raise ImageError(f"holds {x.dtype} with MinIsWhite, which says nothing; save as MinIsBlack")
    pixels = scaled(_rotate(x, page.tags.valueof(274, 1)), nodata, bits)
    white = 255 if pixels.dtype == torch.uint8 else 1
    if page.photometric == _MIN_IS_WHITE:
        pixels = ((largest_value(x.dtype, bits) or 1) / nodata.divide if nodata.divide else white) - pixels
    # the conversions that 8-bit images get
    if len(pixels) == 1 and in_chans == 3:
        pixels = pixels.repeat(3, 1, 1)
    elif len(pixels) == 3 and in_chans == 1 and page.photometric == _RGB:
        pixels = (pixels.float() / white * _LUMA).sum(0, keepdim=True)
    if len(pixels) != in_chans:
        raise wrong_channels(f"{len(pixels)} channels", in_chans)
    return pixels


def _without_alpha(x: np.ndarray, extras: tuple[int, ...], in_chans: int) -> np.ndarray:
    """Drops alpha where there are more channels than asked for; colours that are multiplied by it are divided first."""
    first = len(x) - len(extras)
    if first < 1:
        return x
    for k, extra in enumerate(extras):
        if extra == _ASSOCIATED:
            alpha = x[first + k].astype(np.float64)
            largest = np.iinfo(x.dtype).max if x.dtype.kind in "iu" else 1
            with np.errstate(divide="ignore", invalid="ignore"):
                colours = np.where(alpha > 0, x[:first] * (largest / alpha), 0)
            if x.dtype.kind in "iu":
                colours = np.rint(colours).clip(0, largest)
            x = np.concatenate([colours.astype(x.dtype), x[first:]])
            break
    if len(x) == in_chans:
        return x
    return x[[*range(first), *(first + k for k, extra in enumerate(extras) if extra not in (1, 2))]]


def _rotate(x: np.ndarray, orientation: int) -> np.ndarray:
    """Applies the TIFF / EXIF orientation 1..8 to `[C, H, W]`."""
    if orientation in (5, 6, 7, 8):
        x = x.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        x = x[:, ::-1]
    if orientation in (2, 3, 6, 7):
        x = x[:, :, ::-1]
    return x
