"""Parts of TIFF pages, of which only the tiles and strips that they touch are decoded."""

import math
from typing import Any, BinaryIO

import numpy as np

from .axes import Layout
from .boxes import read_box
from .files import check_size

__all__ = ["can_read_part", "read_part"]


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
