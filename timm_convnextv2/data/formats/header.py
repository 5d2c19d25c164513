"""What an image file says of itself: format, size, channels and type, without its pixels."""

import math
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .dicom import dicom_header, is_dicom
from .errors import ImageError, MissingPackageError
from .files import open_image_file
from .tiff import PALETTE, is_tiff
from .zarrs import is_zarr, zarr_axes

_GREY = ("1", "L", "LA", "La", "I", "F")
_NAMED = 5


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        format: As in 'PNG', 'TIFF', 'npy'.
        height: In pixels, as stored: before a rotation by EXIF.
        width: Likewise.
        channels: Those that `load_image` can give without conversion: alpha is none, colours by number are three.
        kind: Type of the stored values, such as 'uint16'.
    """

    format: str
    height: int
    width: int
    channels: int
    kind: str


def read_header(path: str | os.PathLike, page: int | str | None = None) -> Header:
    """Reads the header of an image file, or of the folder of a Zarr image.

    Args:
        path: Of it.
        page: None: channels are those without `--pages`. 'channels': all pages are. Else those of a page.

    Raises:
        ImageError: (a ValueError) It is no image that is known, or no regular file.
    """
    try:
        if is_zarr(path):
            return _of_zarr(path, page)
        with open_image_file(path) as file:
            if os.fspath(path).lower().endswith(".npy"):
                return _of_npy(file)
            if is_dicom(file, os.fspath(path)):
                return Header("DICOM", *dicom_header(file, page))
            if is_tiff(file):
                return _of_tiff(file, page)
            return _of_pillow(file)
    except (ImageError, MissingPackageError):
        raise
    except UnidentifiedImageError:
        raise ImageError("its content is of no format that Pillow reads") from None
    except Exception as error:  # as varied as the formats
        raise ImageError(f"its header cannot be read ({type(error).__name__}: {error})") from error


def _of_npy(file: Any) -> Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if len(shape) not in (2, 3):
        raise ImageError(f"has shape {shape}, expected [H, W], [H, W, C] or [C, H, W]")
    if len(shape) == 2:
        return Header("npy", *shape, 1, str(dtype))
    if shape[2] <= shape[0]:  # channels are fewer than rows
        return Header("npy", shape[0], shape[1], shape[2], str(dtype))
    return Header("npy", shape[1], shape[2], shape[0], str(dtype))


def _of_zarr(path: str | os.PathLike, page: int | str | None) -> Header:
    array, axes = zarr_axes(path)
    axes = axes or {2: "YX"}.get(array.ndim) or ("YXC" if array.shape[2] <= array.shape[0] else "CYX")
    sizes = dict(zip(axes, array.shape, strict=True))
    channels = array.size // (sizes["Y"] * sizes["X"]) if page == "channels" else sizes.get("C", 1)
    return Header("Zarr", sizes["Y"], sizes["X"], channels, str(array.dtype))


def _of_tiff(file: Any, page_wanted: int | str | None) -> Header:
    try:
        import tifffile
    except ImportError:
        return _of_pillow(file)
    with tifffile.TiffFile(file) as tif:
        series = tif.series[0]
        page = series.keyframe
        sizes = dict(zip(series.axes, series.shape, strict=False))
        extras = [extra for extra in page.extrasamples or () if extra in (1, 2)]
        channels = sizes.get("S", 1) - len(extras) if "S" in sizes else sizes.get("C", 0)
        unnamed = [size for axis, size in sizes.items() if axis in "IQ"]
        if page_wanted == "channels":
            channels = math.prod(sizes.values()) // (sizes["Y"] * sizes["X"])
        elif page_wanted is not None:
            channels = channels or 1
        elif not channels:
            channels = unnamed[0] if len(unnamed) == 1 else 1
        bits, kind = page.bitspersample, str(series.dtype)
        kind += f" ({bits} bits)" if isinstance(bits, int) and bits not in (8, 16, 32, 64) and "uint" in kind else ""
        channels = 3 if page.photometric == PALETTE else channels
        return Header("TIFF", page.imagelength, page.imagewidth, channels, kind)


def _of_pillow(file: Any) -> Header:
    with Image.open(file) as image:
        wide = image.mode.startswith("I")
        channels = 1 if image.mode in _GREY or wide else 3
        kind = "float32" if image.mode == "F" else "uint16" if wide else "uint8"
        return Header(image.format or "?", image.height, image.width, channels, kind)


def groups_of(headers: Iterable[tuple[str, Header]]) -> str:
    """Files grouped by channels and type, the largest group first, with how many and one name each.

    Args:
        headers: `(name, header)` of files.
    """
    counts: Counter[tuple[int, str]] = Counter()
    names: dict[tuple[int, str], str] = {}
    for name, header in headers:
        group = header.channels, header.kind
        counts[group] += 1
        names.setdefault(group, name)
    shown = [
        f"{count} {'has' if count == 1 else 'have'} {chans} channel{'s' * (chans != 1)} of {kind} "
        f"({names[chans, kind]})"
        for (chans, kind), count in counts.most_common(_NAMED)
    ]
    return "; ".join(shown) + (f"; and {len(counts) - _NAMED} more groups" if len(counts) > _NAMED else "")
