"""TIFF beyond Pillow: which files these are, and how tifffile reads them."""

import io
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .arrays import largest_value, scaled
from .axes import Layout, Page, choose_axes, count_pages
from .errors import ImageError, MissingPackageError, refuse_page, wrong_channels
from .files import check_size
from .nodata import Nodata, parse_tag

_AT_ONCE = 2**16  # bytes that are read in one piece, whatever of them is needed


def read_box(
    file: BinaryIO, dtype: np.dtype, offset: int, shape: tuple[int, ...], box: tuple[slice | int, ...]
) -> np.ndarray:
    """The part `box` of an array in row-major order.

    Rows are read by position, not by a memory map, which would fetch what lies around each row and need address space.

    Args:
        file: Open to read.
        dtype: Of the array, with its byte order.
        offset: Of the first value, in bytes.
        shape: Of the array.
        box: A slice with step 1, or a number, for each axis.

    Raises:
        EOFError: The file ends before.
    """
    ranges = [range(i, i + 1) if isinstance(i, int) else range(*i.indices(n)) for i, n in zip(box, shape, strict=True)]
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    x = np.empty([len(r) for r in ranges], dtype)
    _read(file, x, offset, ranges, strides)
    return x[tuple(0 if isinstance(i, int) else slice(None) for i in box)]


def _read(file: BinaryIO, out: np.ndarray, offset: int, ranges: list[range], strides: list[int]) -> None:
    """Fills `out` with the values that stand at these ranges."""
    first = sum(r[0] * s for r, s in zip(ranges, strides, strict=True))
    span = sum((len(r) - 1) * s for r, s in zip(ranges, strides, strict=True)) + 1
    if span > out.size and span * out.itemsize > _AT_ONCE:
        axis = next(k for k, r in enumerate(ranges) if len(r) > 1)
        inner = sum((len(r) - 1) * s for r, s in zip(ranges[axis + 1 :], strides[axis + 1 :], strict=True)) + 1
        if inner * len(ranges[axis]) == out.size:  # each entry of the axis is one piece
            step, size = strides[axis] * out.itemsize, inner * out.itemsize
            pieces = out.reshape(-1).view(np.uint8).data
            for number in range(len(ranges[axis])):
                piece = pieces[number * size : (number + 1) * size]
                _fill(file, piece, offset + first * out.itemsize + number * step)
            return
        for number, i in enumerate(ranges[axis]):
            part = [*ranges[:axis], range(i, i + 1), *ranges[axis + 1 :]]
            _read(file, out[(*(slice(None),) * axis, slice(number, number + 1))], offset, part, strides)
        return
    values = np.empty(span, out.dtype)
    _fill(file, values.view(np.uint8).data, offset + first * out.itemsize)
    steps = [s * out.itemsize for s in strides]
    out[...] = np.lib.stride_tricks.as_strided(values, out.shape, steps, writeable=False)


def _fill(file: BinaryIO, piece: memoryview, position: int) -> None:
    """Reads what stands at this position of the file."""
    if hasattr(os, "preadv") and not isinstance(file, io.BytesIO):
        done = os.preadv(file.fileno(), [piece], position)
        if done == len(piece):
            return
        piece, position = piece[done:], position + done  # a signal, or an end
    file.seek(position)
    if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
        raise EOFError("the file ends before its last pixels")


def can_read_part(series: Any) -> bool:
    """Whether rows and columns of a series of tifffile are rows and columns of its pages."""
    page = series.keyframe
    return series.dataoffset is not None or series.axes.endswith(page.axes) and page.imagedepth == 1


def read_part(file: BinaryIO, tif: Any, series: Any, layout: Layout, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a series: `[C, h, w]` of stored values.

    Args:
        file: The file.
        tif: The same, opened by tifffile.
        series: Of it, see `can_read_part`.
        layout: What of it to read.
        rows: Within it, with step 1.
        columns: Likewise.
    """
    page = series.keyframe
    if series.dataoffset is not None:
        dtype = np.dtype(tif.byteorder + series.dtype.char)
        return layout.arrange(read_box(file, dtype, series.dataoffset, layout.shape, layout.pick(rows, columns)))
    leading = len(layout.axes) - len(page.axes)
    numbers = np.arange(math.prod(layout.shape[:leading])).reshape(layout.shape[:leading])
    chosen = numbers[layout.pick(axes=layout.axes[:leading])]
    parts = [_read_page(file, tif, page, series.pages[k], rows, columns) for k in np.ravel(chosen).tolist()]
    x = np.stack(parts).reshape(*np.shape(chosen), *parts[0].shape)
    # rows and columns are already those asked for
    inner = layout.pick(axes=layout.axes[leading:])
    return layout.arrange(x[(slice(None),) * np.ndim(chosen) + inner])


def _read_page(file: BinaryIO, tif: Any, page: Any, frame: Any, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a page like `page`, with its axes."""
    samples, _, height, width, contiguous = page.shaped  # planes, depth, rows, columns, samples of a pixel
    if frame is not None and frame.is_final:
        dtype = np.dtype(tif.byteorder + page._dtype.char)
        shape = (samples, height, width, contiguous)
        box = (slice(None), rows, columns, slice(None))
        x = read_box(file, dtype, frame.dataoffsets[0], shape, box)
    else:
        x = _decode_segments(tif, frame, page, rows, columns)
    if page.axes.startswith("S"):
        return x[..., 0]
    return x[0] if "S" in page.axes else x[0, ..., 0]


def _decode_segments(tif: Any, frame: Any, page: Any, rows: slice, columns: slice) -> np.ndarray:
    """The part by the tiles or strips that it touches: `[planes, h, w, samples]`."""
    planes, _, height, width, samples = page.shaped
    high, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    check_size(high, wide, "tile" if page.is_tiled else "strip")
    down, across = -(-height // high), -(-width // wide)
    touched_rows = range(rows.start // high, (rows.stop - 1) // high + 1)
    touched_columns = range(columns.start // wide, (columns.stop - 1) // wide + 1)
    indices = [(p * down + r) * across + c for p in range(planes) for r in touched_rows for c in touched_columns]
    x = np.full((planes, rows.stop - rows.start, columns.stop - columns.start, samples), page.nodata, page._dtype)
    if frame is None:  # a page that was never written
        return x
    options: dict[str, Any] = {"_fullsize": False}
    if page.compression in (6, 7, 34892, 33007):  # JPEG, as TiffPage.segments does
        options.update(jpegtables=frame.jpegtables, jpegheader=page.jpegheader)
    offsets, counts = ([values[i] for i in indices] for values in (frame.dataoffsets, frame.databytecounts))
    for data, index in tif.filehandle.read_segments(offsets, counts, indices, flat=True):
        part, (plane, _, top, left, _), shape = page.decode(data, index, **options)
        if part is None:  # a tile that was never written
            continue
        _paste(x[plane], part[0], top - rows.start, left - columns.start)
    return x


def _paste(x: np.ndarray, part: np.ndarray, top: int, left: int) -> None:
    """Copies what of `part`, `[h, w, S]` at (top, left), lies within `x`."""
    height, width = part.shape[:2]
    y0, y1 = max(0, top), min(len(x), top + height)
    x0, x1 = max(0, left), min(x.shape[1], left + width)
    if y0 < y1 and x0 < x1:
        x[y0:y1, x0:x1] = part[y0 - top : y1 - top, x0 - left : x1 - left]


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


def read_tiff(
    file: BinaryIO, in_chans: int, nodata: Nodata, by_pillow: Callable[[], torch.Tensor], page: Page = None
) -> torch.Tensor:
    """The first image of a TIFF with tifffile, see `load_image`.

    Args:
        file: At its beginning.
        in_chans: Channels wanted.
        nodata: That of the option; the tag is added.
        by_pillow: Reads the page, for colours that only Pillow converts.
        page: As of `choose_axes`.

    Raises:
        ImageError: (a ValueError) Axes, channels, tags or size that do not fit.
        MissingPackageError: (a ValueError) tifffile or imagecodecs is needed and not installed.
    """
    with import_tifffile().TiffFile(file) as tif:
        number, layout = choose_series(tif, in_chans, page)
        frame = tif.series[number].keyframe
        check_size(frame.imagelength, frame.imagewidth)
        if frame.is_tiled:
            check_size(frame.tilelength, frame.tilewidth, "tile")
        if needs_pillow(frame, layout, in_chans):
            return by_pillow()
        try:
            x = _read_pages(file, tif, layout, number)
        except Exception as error:
            raise codec_missing(frame, error) or error from None
        return to_channels(x, frame, in_chans, parse_tag(nodata, frame.tags.valueof(NODATA_TAG)))


def import_tifffile() -> Any:
    """The package.

    Raises:
        MissingPackageError: (a ValueError) It is not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise MissingPackageError(
            "TIFF that is multi-band, 16-bit colour or otherwise beyond Pillow; run `pip install tifffile imagecodecs`"
        ) from error
    return tifffile


def choose_series(tif: Any, in_chans: int, page: Page = None) -> tuple[int, Layout]:
    """Which series of an opened TIFF to read, and what of it.

    Args:
        tif: A `tifffile.TiffFile`.
        in_chans: Channels wanted.
        page: As of `choose_axes`; numbers go on from series to series, as pages of different sizes are series.

    Raises:
        ImageError: (a ValueError) Axes or parts that do not fit.
    """
    number = 0
    if isinstance(page, int):
        counts = page_counts(tif)
        refuse_page(page, sum(counts))
        while number < len(counts) - 1 and page >= counts[number]:
            page -= counts[number]
            number += 1
    series = tif.series[number]
    _refuse_parts(series, series.keyframe)
    return number, choose_axes(series.axes, series.shape, in_chans, page)


def page_counts(tif: Any) -> list[int]:
    """Pages of each series of an opened TIFF."""
    return [count_pages(series.axes, series.shape) for series in tif.series]


def needs_pillow(page: Any, layout: Layout, in_chans: int) -> bool:
    """Whether a page of tifffile has colours that only Pillow converts.

    Raises:
        ImageError: (a ValueError) It is one of several channels.
    """
    if page.photometric not in _COLOURS_OF_PILLOW or in_chans not in (1, 3):
        return False
    if "C" in layout.kept:
        raise ImageError("has channels in palette, CMYK, YCbCr or Lab colours; save them as MinIsBlack")
    return True


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


def _read_pages(file: BinaryIO, tif: Any, layout: Layout, number: int) -> np.ndarray:
    """Reads the pages of a series that the wanted axes are in, no others: `[C, Y, X]`."""
    series = tif.series[number]
    page, axes, shape = series.keyframe, layout.axes, layout.shape
    leading = len(axes) - len(page.axes)
    if leading == 0 or axes[leading:] != page.axes or not layout.index:
        return layout.arrange(series.asarray()[layout.pick()])
    if series.dataoffset is not None:  # also where one page holds all
        return read_part(file, tif, series, layout, slice(None), slice(None))
    numbers = np.arange(math.prod(shape[:leading])).reshape(shape[:leading])
    chosen = numbers[layout.pick(axes=axes[:leading])]
    x = tif.asarray(series=number, key=np.ravel(chosen).tolist())
    x = x.reshape(*np.shape(chosen), *page.shape)
    inner = (slice(None),) * np.ndim(chosen) + layout.pick(axes=axes[leading:])
    return layout.arrange(x[inner])


def codec_missing(page: Any, error: Exception) -> MissingPackageError | None:
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


def to_channels(x: np.ndarray, page: Any, in_chans: int, nodata: Nodata) -> torch.Tensor:
    """Stored values `[C, H, W]` as the channels asked for."""
    x = _without_alpha(x, tuple(page.extrasamples or ()), in_chans)
    bits = page.bitspersample if x.dtype.kind == "u" else None
    if page.photometric == _MIN_IS_WHITE and x.dtype.kind not in "bu":
        raise ImageError(f"holds {x.dtype} with MinIsWhite, which says nothing; save as MinIsBlack")
    pixels = scaled(rotate(x, page.tags.valueof(274, 1)), nodata, bits)
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


def rotate(x: np.ndarray, orientation: int) -> np.ndarray:
    """Applies the TIFF / EXIF orientation 1..8 to `[C, H, W]`."""
    if orientation in (5, 6, 7, 8):
        x = x.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        x = x[:, ::-1]
    if orientation in (2, 3, 6, 7):
        x = x[:, :, ::-1]
    return x
