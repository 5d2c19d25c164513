"""Arrays of stored values as tensors, and `.npy` files."""

from typing import BinaryIO

import numpy as np
import torch

from .errors import ImageError, wrong_channels
from .files import check_size
from .nodata import Nodata, fill_nodata, refuse_nodata

__all__ = ["load_npy", "scaled"]


def scaled(x: np.ndarray, nodata: Nodata, bits: int | None = None) -> torch.Tensor:
    """uint8 as it is, other numbers as float32 in the units that `load_image` promises; nodata replaced.

    Args:
        x: `[C, H, W]` as stored.
        nodata: What to replace.
        bits: Of unsigned integers, those in use; all by default.

    Raises:
        ImageError: (a ValueError) A type that has no scale, or values that can only be nodata.
    """
    if 0 in x.shape:
        raise ImageError(f"is empty, shape {x.shape}")
    check_dtype(x.dtype)
    x = fill_nodata(x, nodata)
    if x.dtype.kind == "f" or x.dtype.kind == "i":
        refuse_nodata(x, nodata)
    if x.dtype.kind in "bf":
        return torch.from_numpy(x.astype(np.float32))
    if x.dtype == np.uint8 and bits in (None, 8):
        return torch.from_numpy(np.array(x))
    largest = np.iinfo(x.dtype).max if bits is None else 2**bits - 1
    return torch.from_numpy(x.astype(np.float32) / np.float32(largest))


def check_dtype(dtype: np.dtype) -> None:
    """Refuses types without scale: 32 and 64-bit integers rarely use their range, and divided by it they are black.

    Raises:
        ImageError: (a ValueError) It is none of uint8, int8, uint16, int16, bool and float types.
    """
    if dtype.kind not in "bf" and not (dtype.kind in "iu" and dtype.itemsize <= 2):
        raise ImageError(
            f"holds {dtype}, expected uint8, int16, uint16, bool or a float type; divide by the largest value of "
            "your data and save as float32"
        )


def load_npy(file: BinaryIO, in_chans: int, nodata: Nodata) -> torch.Tensor:
    """A `.npy` file, `[H, W]`, `[H, W, C]` or `[C, H, W]`, as `[C, H, W]`; its header is judged before its values.

    Raises:
        ImageError: (a ValueError) Another shape or type, or too large.
        ValueError: No such file, or a damaged one.
    """
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ImageError("holds pickled objects, which are never loaded (allow_pickle)")
    channels_last = len(shape) == 3 and shape[2] == in_chans
    if not channels_last and not (len(shape) == 3 and shape[0] == in_chans) and not (len(shape) == 2 and in_chans == 1):
        raise wrong_channels(f"shape {shape}", in_chans)
    check_dtype(dtype)
    height, width = shape[:2] if channels_last else shape[-2:]
    check_size(height, width)
    file.seek(0)
    x = np.lib.format.read_array(file, allow_pickle=False)
    return scaled(x.transpose(2, 0, 1) if channels_last else x.reshape(in_chans, *x.shape[-2:]), nodata)
