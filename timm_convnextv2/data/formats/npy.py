"""`.npy` files, `[H, W]`, `[H, W, C]` or `[C, H, W]`, and uncompressed arrays in other files."""

import io
import itertools
import math
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from .errors import ImageError, channels_of, refuse_page, wrong_channels
from .files import Header, Scene
from .pixels import Pixels
from .values import check_dtype, scaled


def read_box(
    file: BinaryIO, dtype: np.dtype, offset: int, shape: tuple[int, ...], box: tuple[slice | int, ...]
) -> np.ndarray:
    """The part `box` of an uncompressed row-major array that begins `offset` bytes into the file.

    `box` has a number, or a slice with step 1, for each axis. A file that ends before the part does is an ImageError.
    """
    picked = [range(i, i + 1) if isinstance(i, int) else range(*i.indices(n)) for i, n in zip(box, shape, strict=True)]
    x = np.empty([len(r) for r in picked], dtype)
    # axes after the last one that is not read whole are contiguous: a read for each entry of the axes before
    last = max((k for k, (r, n) in enumerate(zip(picked, shape, strict=True)) if len(r) < n), default=0)
    inner = math.prod(shape[last + 1 :]) * dtype.itemsize
    for to, at in zip(np.ndindex(*x.shape[:last]), itertools.product(*picked[:last]), strict=True):
        number = int(np.ravel_multi_index((*at, picked[last].start), shape[: last + 1]))
        file.seek(offset + number * inner)
        # not memory-mapped: a file that shrinks would kill the process
        values = x[to].reshape(-1).view(np.uint8)
        found = cast(io.BufferedIOBase, file).readinto(values.data)
        if found < values.nbytes:
            raise ImageError(f"is truncated: expected {values.nbytes} bytes of pixels, found {found}")
    return x[tuple(0 if isinstance(i, int) else slice(None) for i in box)]


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis changes fastest (Fortran), and type; leaves the file at the first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def is_npy(file: BinaryIO, name: str) -> bool:
    """Whether the name ends in `.npy`."""
    return name.lower().endswith(".npy")


class NpyScene(Scene):
    """A `.npy` file, of which the header is checked before any value is read."""

    def __init__(self, file: BinaryIO, in_chans: int, pixels: Pixels) -> None:
        refuse_page(pixels.page, 1)
        self.file, self.pixels = file, pixels
        self.shape, self.fortran, self.dtype = shape, _, dtype = _read_header(file)
        self.offset = file.tell()
        if dtype.hasobject:
            raise ImageError("holds pickled objects, which are never loaded (allow_pickle)")
        self.channels_last = len(shape) == 3 and shape[2] == in_chans
        channels_first = len(shape) == 3 and shape[0] == in_chans or len(shape) == 2 and in_chans == 1
        if not self.channels_last and not channels_first:
            raise wrong_channels(f"shape {shape}", in_chans, channels_of(shape))
        check_dtype(dtype, pixels.divide)
        if 0 in shape:
            raise ImageError(f"is empty, shape {shape}")
        self.size = (shape[0], shape[1]) if self.channels_last else (shape[-2], shape[-1])

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        shape, last = self.shape, self.channels_last
        part = slice(top, top + height), slice(left, left + width)
        box = (*part, slice(None)) if last else (slice(None), *part)[-len(shape) :]
        if self.fortran:
            x = read_box(self.file, self.dtype, self.offset, shape[::-1], box[::-1]).transpose()
        else:
            x = read_box(self.file, self.dtype, self.offset, shape, box)
        x = x.transpose(2, 0, 1) if last else x.reshape(-1, height, width)
        return self.pixels.clip(scaled(x, self.pixels))


def npy_header(file: BinaryIO, page: Any) -> Header:
    """See `decode.read_header`."""
    shape, _, dtype = _read_header(file)
    if len(shape) not in (2, 3):
        raise ImageError(f"has shape {shape}, expected [H, W], [H, W, C] or [C, H, W]")
    if len(shape) == 2:
        return Header("npy", *shape, 1, str(dtype))
    # fewer channels than rows
    height, width, channels = shape if shape[2] <= shape[0] else (shape[1], shape[2], shape[0])
    return Header("npy", height, width, channels, str(dtype))
