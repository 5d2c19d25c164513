"""Parts of arrays that lie uncompressed in a file: only what they touch is read."""

import io
import math
import os
from typing import BinaryIO

import numpy as np

__all__ = ["read_box"]

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
