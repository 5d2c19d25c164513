"""`.npy` files, `[H, W]`, `[H, W, C]` or `[C, H, W]`, and arrays that lie uncompressed in a file."""

import io
import itertools
import math
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from .errors import ImageError, refuse_page, wrong_channels
from .files import Header, check_size
from .pixels import Pixels
from .values import check_dtype, scaled


def read_box(
    file: BinaryIO, dtype: np.dtype, offset: int, shape: tuple[int, ...], box: tuple[slice | int, ...], planes: int
) -> np.ndarray:
    """The part `box` of an uncompressed array in row-major order.

    Only the rows of the box are mapped into memory, so that an image may be larger than the address space.

    Args:
        file: The file.
        dtype: Type of the array, with its byte order.
        offset: Position of the first value, in bytes.
        shape: Shape of the array.
        box: A slice with step 1, or a number, for each axis.
        planes: Number of axes before the rows.

    Raises:
        ValueError, TypeError: The file ends before the part.
    """
    if isinstance(file, io.BytesIO):
        return np.ndarray(shape, dtype, file.getvalue(), offset)[box].copy()
    picked = [range(i, i + 1) if isinstance(i, int) else range(*i.indices(n)) for i, n in zip(box, shape, strict=True)]
    rows, rest = picked[planes], shape[planes + 1 :]
    x = np.empty([len(r) for r in picked], dtype)
    columns = tuple(slice(r.start, r.stop) for r in picked[planes + 1 :])
    for to, plane in zip(np.ndindex(*x.shape[:planes]), itertools.product(*picked[:planes]), strict=True):
        number = 0
        for i, n in zip(plane, shape, strict=False):
            number = number * n + i
        start = offset + (number * shape[planes] + rows.start) * math.prod(rest) * dtype.itemsize
        x[to] = np.memmap(file, dtype, "r", start, (len(rows), *rest))[(slice(None), *columns)]
    return x[tuple(0 if isinstance(i, int) else slice(None) for i in box)]


class NpyLayout(NamedTuple):
    """Where the values of a `.npy` file are.

    Attributes:
        dtype: Type of the values.
        offset: Position of the first one, in bytes.
        shape: Shape of the array.
        fortran: Whether the first axis changes fastest.
    """

    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    fortran: bool


def _read_layout(file: BinaryIO) -> NpyLayout:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return NpyLayout(dtype, file.tell(), shape, fortran)


def is_npy(file: BinaryIO, name: str) -> bool:
    """Whether the name ends in `.npy`."""
    return name.lower().endswith(".npy")


class NpyScene:
    """A `.npy` file of which parts are read; see `decode.Scene`.

    Raises:
        ImageError: (a ValueError) Shape or type are not those of an image.
    """

    whole = False

    def __init__(self, file: BinaryIO, in_chans: int, pixels: Pixels) -> None:
        refuse_page(pixels.page, 1)
        self.file, self.pixels, self.layout = file, pixels, _read_layout(file)
        if self.layout.dtype.hasobject:
            raise ImageError("holds pickled objects, which are never loaded (allow_pickle)")
        shape = self.layout.shape
        self.channels_last = len(shape) == 3 and shape[2] == in_chans
        channels_first = len(shape) == 3 and shape[0] == in_chans or len(shape) == 2 and in_chans == 1
        if not self.channels_last and not channels_first:
            raise wrong_channels(f"shape {shape}", in_chans)
        check_dtype(self.layout.dtype, pixels.divide)
        if 0 in shape:
            raise ImageError(f"is empty, shape {shape}")
        self.size: tuple[int, int] = (shape[0], shape[1]) if self.channels_last else (shape[-2], shape[-1])

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        dtype, offset, shape, fortran = self.layout
        part = slice(top, top + height), slice(left, left + width)
        box = (*part, slice(None)) if self.channels_last else (slice(None), *part)[-len(shape) :]
        if fortran:
            planes = 1 if self.channels_last else 0
            x = read_box(self.file, dtype, offset, shape[::-1], box[::-1], planes).transpose()
        else:
            planes = 0 if self.channels_last else len(shape) - 2
            x = read_box(self.file, dtype, offset, shape, box, planes)
        x = x.transpose(2, 0, 1) if self.channels_last else x.reshape(-1, height, width)
        return self.pixels.clip(scaled(x, self.pixels))

    def close(self) -> None:
        self.file.close()


def load_npy(file: BinaryIO, in_chans: int, pixels: Pixels) -> torch.Tensor:
    """The whole image `[C, H, W]`; the header is checked before any value is read.

    Raises:
        ImageError: (a ValueError) Shape or type are not those of an image, or it is too large.
    """
    image = NpyScene(file, in_chans, pixels)
    check_size(*image.size)
    return image.read(0, 0, *image.size)


def npy_header(file: BinaryIO, page: Any) -> Header:
    """See `decode.read_header`."""
    layout = _read_layout(file)
    shape = layout.shape
    if len(shape) not in (2, 3):
        raise ImageError(f"has shape {shape}, expected [H, W], [H, W, C] or [C, H, W]")
    if len(shape) == 2:
        return Header("npy", *shape, 1, str(layout.dtype))
    # fewer channels than rows
    height, width, channels = shape if shape[2] <= shape[0] else (shape[1], shape[2], shape[0])
    return Header("npy", height, width, channels, str(layout.dtype))
