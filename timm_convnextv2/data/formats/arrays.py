"""Arrays of stored values as tensors, and `.npy` files."""

from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from .errors import ImageError, wrong_channels
from .files import check_size
from .nodata import Nodata, fill_nodata, find_nodata, refuse_nodata


def scaled(x: np.ndarray, nodata: Nodata, bits: int | None = None) -> torch.Tensor:
    """uint8 as it is, other numbers as float32 in the units that `load_image` promises; nodata replaced.

    With a divisor, or where stored values are asked for, uint8 is float32, too.

    Args:
        x: `[C, H, W]` as stored.
        nodata: What to replace, and the divisor.
        bits: Of unsigned integers, those in use; all by default.

    Raises:
        ImageError: (a ValueError) A type that has no scale, or values that can only be nodata.
    """
    if 0 in x.shape:
        raise ImageError(f"is empty, shape {x.shape}")
    check_dtype(x.dtype, nodata.divide)
    gone = find_nodata(x, nodata) if nodata.stored is not None else None
    x = fill_nodata(x, nodata)
    if x.dtype.kind == "f" or x.dtype.kind == "i":
        refuse_nodata(x, nodata)
    plain = nodata.divide is None and gone is None
    if x.dtype == np.uint8 and bits in (None, 8) and plain:
        return torch.from_numpy(np.array(x))
    largest = largest_value(x.dtype, bits)
    unit = nodata.divide or largest or 1
    pixels = torch.from_numpy(_divided(x, unit))
    if nodata.stored is not None and gone is not None:
        kind = str(x.dtype) if bits in (None, 8 * x.dtype.itemsize) else f"{x.dtype} ({bits} bits)"
        nodata.stored.note(kind, unit, None if largest is None else largest / unit)
        pixels[torch.from_numpy(gone)] = torch.nan
    return pixels


def _divided(x: np.ndarray, unit: float) -> np.ndarray:
    """As float32; 32-bit integers and more are divided before, which keeps their last digits."""
    if x.dtype.kind in "iu" and x.dtype.itemsize > 2 or x.dtype == np.float64 and unit != 1:
        return (x / unit).astype(np.float32)
    x = x.astype(np.float32)
    return x if unit == 1 else x / np.float32(unit)


def largest_value(dtype: np.dtype, bits: int | None = None) -> int | None:
    """The largest value of an integer type, or of so many bits of it; 1 of bool, None of floats."""
    if dtype.kind in "bf":
        return 1 if dtype.kind == "b" else None
    return int(np.iinfo(dtype).max) if bits is None else 2**bits - 1


def check_dtype(dtype: np.dtype, divide: float | None = None) -> None:
    """Refuses types without scale: 32 and 64-bit integers rarely use their range, and divided by it they are black.

    Raises:
        ImageError: (a ValueError) It is none of uint8, int8, uint16, int16, bool and float types.
    """
    if dtype.kind not in "bf" and not (dtype.kind in "iu" and (dtype.itemsize <= 2 or divide is not None)):
        raise ImageError(
            f"holds {dtype}, expected uint8, int16, uint16, bool or a float type; name the largest value of your data "
            "with --divide, or divide by it and save as float32"
        )


class NpyLayout(NamedTuple):
    """Where the values of a `.npy` file are.

    Attributes:
        dtype: Of the values.
        offset: Of the first one in the file, in bytes.
        shape: Of the array.
        fortran: Whether the first axis is the one that changes fastest.
        channels_last: Whether it is `[H, W, C]`; else `[C, H, W]` or `[H, W]`.
    """

    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    fortran: bool
    channels_last: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.shape[:2] if self.channels_last else self.shape[-2:]
        return height, width


def read_npy_layout(file: BinaryIO, in_chans: int, nodata: Nodata) -> NpyLayout:
    """Reads and judges the header of a `.npy` file.

    Raises:
        ImageError: (a ValueError) Another shape or type than images have.
        ValueError: No such file.
    """
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ImageError("holds pickled objects, which are never loaded (allow_pickle)")
    channels_last = len(shape) == 3 and shape[2] == in_chans
    if not channels_last and not (len(shape) == 3 and shape[0] == in_chans) and not (len(shape) == 2 and in_chans == 1):
        raise wrong_channels(f"shape {shape}", in_chans)
    check_dtype(dtype, nodata.divide)
    return NpyLayout(dtype, file.tell(), shape, fortran, channels_last)


def load_npy(file: BinaryIO, in_chans: int, nodata: Nodata) -> torch.Tensor:
    """A `.npy` file, `[H, W]`, `[H, W, C]` or `[C, H, W]`, as `[C, H, W]`; its header is judged before its values.

    Raises:
        ImageError: (a ValueError) Another shape or type, or too large.
        ValueError: No such file, or a damaged one.
    """
    layout = read_npy_layout(file, in_chans, nodata)
    check_size(*layout.size)
    file.seek(0)
    x = np.lib.format.read_array(file, allow_pickle=False)
    return scaled(x.transpose(2, 0, 1) if layout.channels_last else x.reshape(in_chans, *x.shape[-2:]), nodata)
